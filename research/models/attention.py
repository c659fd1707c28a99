"""Attention: positions, the one place that chooses an implementation, and the module.

Shape letters: B batch, T queries, S keys, D model, H query heads, G key and value heads (G divides H), K head size.

G = H is multi-head attention (Vaswani et al., 2017, section 3.2), 1 < G < H grouped-query (Ainslie et al., 2023) and G = 1
multi-query attention (Shazeer, 2019).

    attend(query (2, 5, 4, 8), key (2, 5, 2, 8), value (2, 5, 2, 8), causal=True) -> (2, 5, 4, 8)

A *segment* is the number of a document in a packed row; 0 is padding. A query sees the keys of its own segment only, so padding
never influences a token. What a padded query gives is finite and has no meaning.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.core.errors import UsageError
from research.models import flash, lowering
from research.models.layers import check_choice, make_norm

IMPLEMENTATIONS = ('auto', 'xla', 'cudnn', 'flash')
Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, (B or 1, T, K / 2) float32


def sinusoidal(positions: jax.Array, width: int) -> jax.Array:
    """The position code of Vaswani et al. (2017), section 3.5: positions (B, T) -> (B, T, D) float32.

    Channel 2i holds sin(position / 10000^(2i / D)), channel 2i + 1 the cosine. `width` D must be even.
    """
    frequencies = 10000.0 ** (-np.arange(0, width, 2) / width)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)  # (B, T, D/2)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, width)  # (B, T, D)


def rotation(positions: jax.Array, size: int, theta: float = 10000.0, scaling: tuple[float, ...] | None = None) -> Rotation:
    """The rotary angles (Su et al., 2021) of positions (B, T) for heads of `size` K: cosines and sines (B, T, K/2) float32.

    Args:
      positions: place of each token in its document.
      size: K, even.
      theta: base of the frequencies theta^(-2i / K).
      scaling: (factor, low, high, original length) of Llama 3.1: wavelengths above original / low are stretched by `factor`,
        those below original / high are kept, and those between are blended. None: no scaling.
    """
    frequencies = theta ** (-np.arange(0, size, 2) / size)
    if scaling is not None:
        factor, low, high, original = scaling
        blend = np.clip((original * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
        frequencies = blend * frequencies + (1 - blend) * frequencies / factor
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)  # (B, T, K/2)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Turns the pairs (i, i + K/2) of x (B, T, H, K) by the angles, in float32 or wider: Hugging Face's half-split form."""
    cosine, sine = (part[:, :, None] for part in by)  # (B, T, 1, K/2)
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool = False,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    slots: jax.Array | None = None,
    implementation: str = 'auto',
) -> jax.Array:
    """softmax(query key^T / sqrt(K)) value over the visible keys, the softmax in float32; (B, T, H, K).

    Args:
      query: (B, T, H, K).
      key: (B, S, G, K).
      value: (B, S, G, K).
      causal: query t sees keys 0..t only.
      query_segments: (B, T) int32, with `key_segments` (B, S): a query sees the keys of its own segment.
      key_segments: see `query_segments`.
      slots: (B, T) int32, for keys that are a cache: query t sees keys 0..slots[t] only. Always 'xla'.
      implementation: see `choose`.

    Raises:
      UsageError: the implementation that was asked for is impossible here.
    """
    if slots is not None:
        visible = jnp.arange(key.shape[1]) <= slots[:, None, :, None]  # (B, 1, T, S)
        return jax.nn.dot_product_attention(query, key, value, mask=visible, implementation='xla')
    chosen: Any = choose(implementation, query, key, masked=query_segments is not None)
    if chosen == 'flash':
        return flash.splash(query, key, value, causal, query_segments, key_segments)
    mask = None
    if query_segments is not None and key_segments is not None:
        mask = query_segments[:, None, :, None] == key_segments[:, None, None, :]  # (B, 1, T, S)
    if chosen == 'cpu':
        return lowering.attention(query, key, value, _and_causal(mask, query, key) if causal else mask)
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation=chosen)


def _and_causal(mask: jax.Array | None, query: jax.Array, key: jax.Array) -> jax.Array:
    earlier = jnp.tril(jnp.ones((1, 1, query.shape[1], key.shape[1]), bool))  # (1, 1, T, S)
    return earlier if mask is None else mask & earlier


def choose(implementation: str, query: jax.Array, key: jax.Array, masked: bool) -> str:
    """The implementation to use: 'xla', 'cpu', 'cudnn' or 'flash'; decided while tracing, from the platform and the shapes.

    'auto' takes cuDNN's flash attention on a GPU and splash attention on a TPU where they are possible; else 'cpu', which is
    `lowering.attention`, on a CPU, and 'xla' elsewhere.

    Raises:
      UsageError: there is no such implementation, or it is impossible here.
    """
    obstacles = {'cudnn': flash.obstacle_to_cudnn(query, key, masked), 'flash': flash.obstacle_to_splash(query, key)}
    if implementation == 'auto':
        return next((name for name, obstacle in obstacles.items() if obstacle is None), 'cpu' if lowering.on_cpu() else 'xla')
    check_choice('attention', implementation, IMPLEMENTATIONS)
    if obstacles.get(implementation) is not None:
        raise UsageError(f'attention={implementation!r} {obstacles[implementation]}', "use attention='auto' or 'xla'")
    return implementation


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention, to itself or to a memory.

    Attributes:
      width: D.
      heads: H.
      kv_heads: G, a divisor of H.
      head_size: K.
      bias: whether the four projections have biases.
      qk_norm: RMS normalisation of queries and keys over K, before the rotation (Henry et al., 2020).
      norm_eps: its epsilon.
      init_std: standard deviation of the fresh query, key and value projections.
      out_std: likewise of the output projection.
      implementation: see `choose`.
    """

    width: int
    heads: int
    kv_heads: int
    head_size: int
    bias: bool = True
    qk_norm: bool = False
    norm_eps: float = 1e-6
    init_std: float = 0.02
    out_std: float = 0.02
    implementation: str = 'auto'

    def setup(self):
        """Projections `query` (D, H, K), `key` and `value` (D, G, K) and `out` (H, K, D)."""
        init, init_out = nn.initializers.normal(self.init_std), nn.initializers.normal(self.out_std)
        query_shape, key_shape = (self.heads, self.head_size), (self.kv_heads, self.head_size)
        dense = functools.partial(nn.DenseGeneral, use_bias=self.bias, dot_general=lowering.product)
        self.query = dense(query_shape, kernel_init=init)
        self.key = dense(key_shape, kernel_init=init)
        self.value = dense(key_shape, kernel_init=init)
        self.out = dense(self.width, axis=(-2, -1), kernel_init=init_out)
        if self.qk_norm:
            self.query_norm, self.key_norm = make_norm('rms', self.norm_eps), make_norm('rms', self.norm_eps)

    def __call__(
        self,
        x: jax.Array,
        *,
        causal: bool = False,
        segments: jax.Array | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        """Self-attention of x (B, T, D) with segments (B, T); (B, T, D)."""
        key, value = self.project(x, rotation)
        return self.read(x, key, value, causal=causal, query_segments=segments, key_segments=segments, rotation=rotation)

    def project(self, memory: jax.Array, rotation: Rotation | None = None) -> tuple[jax.Array, jax.Array]:
        """The keys and values (B, S, G, K) of a memory (B, S, D)."""
        key, value = self.key(memory), self.value(memory)  # (B, S, G, K) each
        key = self.key_norm(key) if self.qk_norm else key
        return (key if rotation is None else rotate(key, rotation)), value

    def read(self, x: jax.Array, key: jax.Array, value: jax.Array, rotation: Rotation | None = None, **visible) -> jax.Array:
        """What the queries of x (B, T, D) find in keys and values (B, S, G, K); `visible`: see `attend`; (B, T, D)."""
        query = self.query(x)  # (B, T, H, K)
        query = self.query_norm(query) if self.qk_norm else query
        query = query if rotation is None else rotate(query, rotation)
        found = attend(query, key, value, implementation=self.implementation, **visible)  # (B, T, H, K)
        return self.out(found)  # (B, T, D)
