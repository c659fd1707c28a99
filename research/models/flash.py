"""Attention that never holds the T x S scores in memory: what stands against it here, and the call on a TPU.

Shape letters: B batch, T queries, S keys, H query heads, G key and value heads, K head size.

cuDNN's kernel is reached through `jax.nn.dot_product_attention`; this file says when. Splash attention is jax's Pallas kernel
for TPUs: `splash(query (2, 256, 4, 64), key (2, 256, 2, 64), value, causal=True)` -> (2, 256, 4, 64).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

BLOCK = 128  # a splash block is a multiple of the lanes of a TPU register


def obstacle_to_cudnn(query: jax.Array, key: jax.Array, masked: bool) -> str | None:
    """Why cuDNN's flash attention is impossible for query (B, T, H, K) and key (B, S, G, K); None if it is possible."""
    if jax.default_backend() != 'gpu':
        return f'needs a GPU, and jax runs on {jax.default_backend()}'
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f'needs bfloat16 or float16, not {query.dtype}'
    if query.shape[-1] % 8 or query.shape[-1] > 128:
        return f'needs a head size that is a multiple of 8 up to 128, not {query.shape[-1]}'
    if masked and (query.shape[1] % 2 or key.shape[1] % 2):
        return f'needs even lengths with segments, not {query.shape[1]} and {key.shape[1]}'
    capability = float(jax.local_devices()[0].compute_capability)
    return f'needs compute capability 8.0 or later, not {capability}' if capability < 8 else None


def obstacle_to_splash(query: jax.Array, key: jax.Array) -> str | None:
    """Why splash attention is impossible for query (B, T, H, K) and key (B, S, G, K); None if it is possible."""
    if jax.default_backend() != 'tpu':
        return f'needs a TPU, and jax runs on {jax.default_backend()}'
    if query.shape[1] % BLOCK or key.shape[1] % BLOCK:
        return f'needs lengths that are multiples of {BLOCK}, not {query.shape[1]} and {key.shape[1]}'
    if jax.device_count() > 1 and jax.sharding.get_abstract_mesh().empty:
        return 'needs to know how several devices share the work: trace under jax.set_mesh(mesh)'
    return None


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    causal: bool,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention; the arguments and the result of `attention.attend`. `interpret`: simulate the kernel on a CPU.

    XLA cannot cut a kernel up by itself. Under `jax.set_mesh` it is therefore mapped over the mesh: the batch over the axis
    'data', the heads over the axis 'model', as far as there are such axes and they divide the heads.
    """
    call = functools.partial(_splash, causal=causal, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    free = [name for name in mesh.axis_names if name not in mesh.manual_axes]
    if not free:
        return call(query, key, value, query_segments, key_segments)
    data, model = ('data' if 'data' in free else None), ('model' if 'model' in free else None)
    if model and (query.shape[2] % mesh.shape[model] or key.shape[2] % mesh.shape[model]):
        model = None  # as for the weights: what the axis does not divide is whole on each of its devices
    heads, rows = PartitionSpec(data, None, model, None), PartitionSpec(data, None)
    specs = (heads, heads, heads, rows, rows)
    mapped = jax.shard_map(call, in_specs=specs, out_specs=heads, axis_names=set(free), check_vma=False)
    return mapped(query, key, value, query_segments, key_segments)


def _splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    *,
    causal: bool,
    interpret: bool,
) -> jax.Array:
    """The kernel on one device."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels  # only where it is used: half a second

    shape = (query.shape[1], key.shape[1])
    mask = kernels.CausalMask(shape) if causal else kernels.FullMask(shape)
    q, k = (next(size for size in (512, 256, BLOCK) if length % size == 0) for length in shape)
    blocks = kernels.BlockSizes(block_q=q, block_kv=k, block_q_dkv=q, block_kv_dkv=k, block_q_dq=q, block_kv_dq=k)
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * query.shape[2]), block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    segments = None
    if query_segments is not None and key_segments is not None:
        segments = kernels.SegmentIds(query_segments, key_segments)
    query, key, value = (x.swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))  # (B, heads, length, K)
    found: Any = jax.vmap(kernel)(query, key, value, segments)  # (B, H, T, K)
    return found.swapaxes(1, 2).astype(query.dtype)  # (B, T, H, K)
