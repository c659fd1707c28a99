"""The layers that every Transformer is made of: feed-forward, block, and a stack of blocks.

Shape letters: B batch, T length, M memory length, S cache length, D model, H heads, G key and value heads, K head size,
F hidden, L depth.

    options = LayerOptions(width=64, heads=4, causal=True)
    Stack(options, depth=2)  on (2, 10, 64)  ->  (2, 10, 64)      blocks of 12 D^2 = 49,152 weights each

Leaves are `layers_0/attention/query/kernel` (D, H, K) and so on, then `final_norm/scale` (pre-norm only). With `scan` the L
blocks are compiled once, and their leaves are one, `layers/attention/query/kernel` (L, D, H, K).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core.errors import UsageError
from research.models import layers, lowering
from research.models.attention import IMPLEMENTATIONS, Attention, Rotation, rotation

GATED = {'swiglu': 'silu', 'geglu': 'gelu', 'reglu': 'relu'}  # Shazeer, 2020
Cache = dict[str, jax.Array]
State = tuple[jax.Array, Cache | None]


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """What one block is made of.

    Attributes:
      width: D.
      heads: H.
      kv_heads: G, a divisor of H; None: H.
      head_size: K; None: D / H.
      hidden: F; None: 4 D.
      activation: one of `layers.ACTIVATIONS`, or 'swiglu', 'geglu' or 'reglu', which have a gate.
      norm: 'layer' or 'rms'.
      norm_eps: its epsilon.
      norm_position: 'pre' (Xiong et al., 2020) or 'post' (Vaswani et al., 2017).
      causal: whether a token sees only itself and those before it.
      cross: whether the block also attends to a memory.
      rotary: whether queries and keys are rotated by their positions.
      rotary_theta: base of the rotary frequencies.
      rotary_scaling: see `attention.rotation`.
      bias: whether projections and layer normalisations have biases.
      qk_norm: see `Attention`.
      dropout: rate after attention, cross-attention and feed-forward; not on attention weights, which flash kernels never hold.
      init_std: standard deviation of fresh kernels.
      attention: see `attention.choose`.

    Raises:
      UsageError: values that do not fit.
    """

    width: int
    heads: int
    kv_heads: int | None = None
    head_size: int | None = None
    hidden: int | None = None
    activation: str = 'gelu'
    norm: str = 'layer'
    norm_eps: float = 1e-6
    norm_position: str = 'pre'
    causal: bool = False
    cross: bool = False
    rotary: bool = False
    rotary_theta: float = 10000.0
    rotary_scaling: tuple[float, ...] | None = None
    bias: bool = True
    qk_norm: bool = False
    dropout: float = 0.0
    init_std: float = 0.02
    attention: str = 'auto'

    def __post_init__(self):
        if self.head_size is None and self.width % self.heads:
            raise UsageError(f'width={self.width} is not a multiple of heads={self.heads}', 'change one, or give head_size')
        if self.heads % self.num_kv_heads:
            raise UsageError(f'kv_heads={self.kv_heads} does not divide heads={self.heads}', 'give a divisor of heads')
        if self.rotary and self.size % 2:
            raise UsageError(f'rotary positions turn pairs, and the head size is {self.size}', 'give an even head_size')
        if self.rotary_scaling is not None and len(self.rotary_scaling) != 4:
            fix = 'give (factor, low, high, original length)'
            raise UsageError(f'rotary_scaling={self.rotary_scaling} has not four numbers', fix)
        layers.check_choice('activation', self.activation, (*layers.ACTIVATIONS, *GATED))
        layers.check_choice('norm', self.norm, ('layer', 'rms'))
        layers.check_choice('norm_position', self.norm_position, ('pre', 'post'))
        layers.check_choice('attention', self.attention, IMPLEMENTATIONS)

    @property
    def num_kv_heads(self) -> int:
        """G."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def size(self) -> int:
        """K."""
        return self.width // self.heads if self.head_size is None else self.head_size

    def make_norm(self) -> nn.Module:
        """One normalisation layer."""
        return layers.make_norm(self.norm, self.norm_eps, bias=self.bias)

    def make_attention(self, out_std: float) -> Attention:
        """One attention layer."""
        sizes = (self.width, self.heads, self.num_kv_heads, self.size)
        return Attention(*sizes, self.bias, self.qk_norm, self.norm_eps, self.init_std, out_std, self.attention)

    def rotation(self, positions: jax.Array) -> Rotation | None:
        """The rotary angles of positions (B, T); None if positions are not rotary."""
        return rotation(positions, self.size, self.rotary_theta, self.rotary_scaling) if self.rotary else None


class Context(NamedTuple):
    """What all blocks are given beside their input; every entry may be None."""

    segments: jax.Array | None = None  # (B, T)
    rotation: Rotation | None = None
    memory: jax.Array | None = None  # (B, M, D)
    memory_segments: jax.Array | None = None  # (B, M)
    slots: jax.Array | None = None  # (B, T): where the new tokens go in the cache


class FeedForward(nn.Module):
    """(B, T, D) -> (B, T, D): `down(act(up(x)))`, or `down(act(gate(x)) * up(x))` with a gate."""

    options: LayerOptions
    out_std: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = self.options
        hidden = 4 * options.width if options.hidden is None else options.hidden
        init = nn.initializers.normal(options.init_std)
        dense = functools.partial(nn.Dense, use_bias=options.bias, kernel_init=init, dot_general=lowering.product)
        act = layers.activation(GATED.get(options.activation, options.activation))
        y = dense(hidden, name='up')(x)  # (B, T, F)
        y = act(dense(hidden, name='gate')(x)) * y if options.activation in GATED else act(y)
        return dense(options.width, name='down', kernel_init=nn.initializers.normal(self.out_std))(y)  # (B, T, D)


class Block(nn.Module):
    """Self-attention, cross-attention if asked for, and feed-forward, each with a norm and a residual connection."""

    options: LayerOptions
    out_std: float

    def setup(self):
        """The layers in the order of their use."""
        options = self.options
        self.attention_norm, self.attention = options.make_norm(), options.make_attention(self.out_std)
        if options.cross:
            self.cross_norm, self.cross_attention = options.make_norm(), options.make_attention(self.out_std)
        self.feed_forward_norm, self.feed_forward = options.make_norm(), FeedForward(options, self.out_std)
        self.drop = nn.Dropout(options.dropout)

    def __call__(self, state: State, layer: int | jax.Array, context: Context, train: bool) -> tuple[State, None]:
        """x (B, T, D) and the cache of all layers, both as they are after this one, number `layer`."""
        x, cache = state
        y, cache = self._attend(self._before(x, self.attention_norm), cache, layer, context)
        x = self._after(x, y, self.attention_norm, train)
        if self.options.cross:
            y = self._attend_memory(self._before(x, self.cross_norm), cache, layer, context)
            x = self._after(x, y, self.cross_norm, train)
        y = self.feed_forward(self._before(x, self.feed_forward_norm))
        return (self._after(x, y, self.feed_forward_norm, train), cache), None

    def remember(self, memory: jax.Array, layer: int | jax.Array, context: Context, train: bool) -> tuple[jax.Array, Cache]:
        """The memory (B, M, D) as it is, and its keys and values for this layer, (B, M, G, K)."""
        key, value = self.cross_attention.project(memory)
        return memory, {'memory_key': key, 'memory_value': value}

    def _before(self, x: jax.Array, norm: nn.Module) -> jax.Array:
        return norm(x) if self.options.norm_position == 'pre' else x

    def _after(self, x: jax.Array, y: jax.Array, norm: nn.Module, train: bool) -> jax.Array:
        x = lowering.materialised(x + self.drop(y, deterministic=not train))
        return norm(x) if self.options.norm_position == 'post' else x

    def _attend(self, x: jax.Array, cache: Cache | None, layer: int | jax.Array, context: Context) -> State:
        """Self-attention; with a cache, to all that it holds once x (B, T, D) is in it at `context.slots`."""
        if cache is None:
            return self.attention(x, causal=self.options.causal, segments=context.segments, rotation=context.rotation), None
        rows = jnp.arange(x.shape[0])[:, None]  # (B, 1)
        cache = dict(cache)
        for name, new in zip(('key', 'value'), self.attention.project(x, context.rotation), strict=True):
            # In place where the caller gives the buffer away; beyond the cache's end there is nothing to write to.
            cache[name] = cache[name].at[layer, rows, context.slots].set(new.astype(cache[name].dtype), mode='drop')
        key, value = (cache[name][layer].astype(x.dtype) for name in ('key', 'value'))  # (B, S, G, K)
        return self.attention.read(x, key, value, context.rotation, slots=context.slots), cache

    def _attend_memory(self, x: jax.Array, cache: Cache | None, layer: int | jax.Array, context: Context) -> jax.Array:
        """Cross-attention to the memory, or to what the cache holds of it."""
        if cache is None:
            assert context.memory is not None
            key, value = self.cross_attention.project(context.memory)
        else:
            key, value = (cache[name][layer].astype(x.dtype) for name in ('memory_key', 'memory_value'))
        segments = context.segments
        if context.memory_segments is None or segments is None:
            segments = None if context.memory_segments is None else jnp.ones(x.shape[:2], jnp.int32)
        return self.cross_attention.read(x, key, value, query_segments=segments, key_segments=context.memory_segments)


def empty_cache(options: LayerOptions, depth: int, batch: int, length: int, dtype: Any) -> Cache:
    """The cache of a stack that has read nothing: 'key' and 'value' (L, B, S, G, K)."""
    shape = (depth, batch, length, options.num_kv_heads, options.size)
    return {'key': jnp.zeros(shape, dtype), 'value': jnp.zeros(shape, dtype)}


class Stack(nn.Module):
    """L blocks, and a last norm if they are pre-norm.

    Attributes:
      options: what a block is.
      depth: L.
      scan: compile one block and loop over it: compilation time does not grow with L.
      remat: what the backward pass computes again: 'none', 'full' (all of a block) or 'dots' (all but products with weights).
        Of a program for a CPU that saves memory with `scan` alone: elsewhere XLA's CPU compiler computes it again at once.
    """

    options: LayerOptions
    depth: int
    scan: bool = False
    remat: str = 'none'

    def setup(self):
        """The output projections of pre-norm blocks start smaller by sqrt(2 L) (Radford et al., 2019, section 2.3)."""
        layers.check_choice('remat', self.remat, ('none', 'full', 'dots'))
        pre = self.options.norm_position == 'pre'
        out_std = self.options.init_std / ((2 * self.depth) ** 0.5 if pre else 1)
        block = Block if self.remat == 'none' else self._rematerialised()
        if self.scan:
            in_axes: Any = (0, nn.broadcast, nn.broadcast)  # layer, context, train
            self.layers: Any = nn.scan(
                block,
                variable_axes={'params': 0},
                split_rngs={'params': True, 'dropout': True},
                in_axes=in_axes,
                length=self.depth,
                methods=['__call__', 'remember'],
            )(self.options, out_std)
        else:
            self.layers = [block(self.options, out_std) for _ in range(self.depth)]
        if pre:
            self.final_norm = self.options.make_norm()

    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        memory: jax.Array | None = None,
        memory_segments: jax.Array | None = None,
    ) -> jax.Array:
        """Maps x (B, T, D) to (B, T, D).

        Args:
          x: embedded tokens, patches or frames.
          train: whether dropout is active.
          segments: (B, T) int32, 0 for padding; None: all of a row is one segment.
          positions: (B, T) int32 for rotary positions; None: 0..T-1.
          memory: (B, M, D), what cross-attention reads.
          memory_segments: (B, M) int32, 0 for padding.
        """
        positions = jnp.arange(x.shape[1])[None] if positions is None else positions
        context = Context(segments, self.options.rotation(positions), memory, memory_segments)
        (x, _), _ = self._run('__call__', (x, None), context, train)
        return self._finish(x)

    def decode(
        self, x: jax.Array, cache: Cache, slots: jax.Array, memory_segments: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Maps new tokens x (B, n, D) at `slots` (B, n) of the cache, and extends the cache, of leaves (L, B, S, G, K)."""
        context = Context(None, self.options.rotation(slots), None, memory_segments, slots)
        (x, cache), _ = self._run('__call__', (x, cache), context, False)
        return self._finish(x), cache

    def remember(self, memory: jax.Array, cache: Cache) -> Cache:
        """The cache with 'memory_key' and 'memory_value' (L, B, M, G, K) of the memory (B, M, D)."""
        return cache | self._run('remember', memory, Context(), False)[1]

    def _run(self, method: str, state: Any, context: Context, train: bool) -> tuple[Any, Any]:
        """The state after `method` of all blocks in turn, and what they gave beside it, stacked."""
        if self.scan:
            return getattr(self.layers, method)(state, jnp.arange(self.depth), context, train)
        given = []
        for layer, block in enumerate(self.layers):
            state, more = getattr(block, method)(state, layer, context, train)
            given.append(more)
        return state, jax.tree.map(lambda *x: jnp.stack(x), *given)

    def _finish(self, x: jax.Array) -> jax.Array:
        return self.final_norm(x) if self.options.norm_position == 'pre' else x

    @nn.nowrap
    def _rematerialised(self) -> Any:
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == 'dots' else None
        return nn.remat(Block, static_argnums=(4,), prevent_cse=not self.scan, policy=policy)
