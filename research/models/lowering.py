"""How products and sums are written for XLA's CPU compiler. Only here and in flash.py does a model choose by platform: by that
where it is traced.

Shape letters: B batch, T queries, S keys, H query heads, G key and value heads, K head size.

    nn.Dense(64, dot_general=product)          # the same values as nn.Dense(64)
    x = materialised(x + y)                    # the same values as x + y

Four habits of XLA on CPU slow a Transformer's gradient down (jax 0.10.2; `python -m bench.step_profile --without lowering`; the
figures are in BENCHMARKS.md): sums along the residual stream are fused into each of their readers, and so computed again in
every layer; the gradient of a weight over two axes (B, T) copies both factors; a product of (M, N) and (M, K) over M is
slower if N > K; and a sum over keys that is fused with what it adds up goes number by number. On a GPU or TPU these
functions are what they replace.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

_barrier = jax.jit(lambda x: jax.lax.optimization_barrier(x))


def on_cpu() -> bool:
    """Whether programs that are traced now are compiled for a CPU."""
    return jax.default_backend() == 'cpu'


def materialised(x: jax.Array) -> jax.Array:
    """`x`, written to memory: neither it nor its gradient is computed again by those who read it.

    XLA's CPU compiler drops barriers before it fuses, and fuses across any call that it has inlined, hence a call that it must
    not inline.
    """
    if not on_cpu():
        return x
    with set_xla_metadata(inlineable='false'):
        return _barrier(x)


def product(lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, *args: Any, **options: Any) -> jax.Array:
    """`jax.lax.dot_general`, as one product of two matrices where the last axes of `lhs` meet the first of `rhs`.

    The gradients are then such products too, over one axis, which need no copies. That of `rhs` (K, N) is taken transposed
    where K > N, from a transposed copy of `rhs`, which pays off for K rows or more (not in decoding, which has one).
    """
    (contract_lhs, contract_rhs), batch = dimension_numbers
    count = len(contract_lhs)
    last, first = tuple(range(lhs.ndim - count, lhs.ndim)), tuple(range(count))
    if not on_cpu() or any(batch) or tuple(contract_lhs) != last or tuple(contract_rhs) != first:
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, *args, **options)
    rows, columns = lhs.shape[: lhs.ndim - count], rhs.shape[count:]
    inner = math.prod(rhs.shape[:count])
    lhs, rhs = lhs.reshape(math.prod(rows), inner), rhs.reshape(inner, math.prod(columns))
    # Written down on both sides of the transposition, so that its gradient is not fused into every step of the optimiser.
    if inner > rhs.shape[1] and lhs.shape[0] >= inner:
        found = jax.lax.dot_general(lhs, materialised(materialised(rhs).T), (((1,), (1,)), ((), ())), *args, **options)
    else:
        found = jax.lax.dot_general(lhs, rhs, (((1,), (0,)), ((), ())), *args, **options)
    return found.reshape(*rows, *columns)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """What `jax.nn.dot_product_attention` computes, with the heads before the length; (B, T, H, K).

    The sum over the keys divides the values found and not their weights, so neither pass touches (T, S) for it.

    Args:
      query: (B, T, H, K).
      key: (B, S, G, K).
      value: (B, S, G, K).
      mask: which keys each query sees, broadcastable to (B, 1, T, S); a query that sees none gets the mean of all values.
    """
    batch, length, heads, size = query.shape
    groups, wide = key.shape[2], jnp.promote_types(query.dtype, jnp.float32)
    by_batch = functools.partial(jax.lax.dot_general, preferred_element_type=wide)
    query = query * jnp.asarray(1 / math.sqrt(size), query.dtype)
    by_group = query.reshape(batch, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)  # (B, G, H/G, T, K)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)  # (B, G, S, K)
    scores = by_batch(by_group, key, (((4,), (3,)), ((0, 1), (0, 1))))  # (B, G, H/G, T, S)
    if mask is not None:  # added, so that the gradient needs no second selection
        scores = scores + jnp.where(mask, 0, -0.7 * jnp.finfo(jnp.float32).max).astype(wide)[:, :, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    found = by_batch(weights.astype(value.dtype), value, (((4,), (2,)), ((0, 1), (0, 1))))  # (B, G, H/G, T, K)
    # Broadcast before it is written down, so that its gradient is a sum of numbers that are written down too.
    share = materialised(jnp.broadcast_to(1 / weights.sum(-1, keepdims=True), found.shape))
    found = (found * share).astype(value.dtype)
    return found.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)  # (B, T, H, K)
