"""Recurrent layers: LSTM and GRU in both directions, with variational dropout and zoneout.

Shape letters: B batch, T time, D inputs, G gates of a cell (LSTM 4, GRU 3), H width of one direction, W = H or 2 H outputs.

The inputs' share in all gates is one matrix product before the scan over time; only the recurrent product is inside it. With
one unit whose gates (input, forget, cell, output) are (0, 1, 0.5, 0) before activation and whose memory is 2, an LSTM's new
memory is sigmoid(1) * 2 + sigmoid(0) * tanh(0.5) = 1.693, and its hidden state sigmoid(0) * tanh(1.693) = 0.467.

Gates stand in PyTorch's order: LSTM input, forget, cell, output; GRU reset, update, new. The LSTM has no peepholes, and its
forget bias begins at 1 (Jozefowicz et al. 2015, section 5). The GRU is PyTorch's and cuDNN's: the reset gate multiplies the
recurrent product, r * (h W + b), where Cho et al. 2014 multiply h before it. Recurrent kernels begin orthogonal, gate by gate.

`segments` (B, T) int32 number the documents of a row from 1; 0 is padding. At a padded step the state stays as it is, so the
reverse direction begins at a sequence's true end; where another document begins, the state is set to zero.

Dropout is variational (Gal and Ghahramani 2016, section 4: a mask is drawn once per sequence and is the same at every step) or
plain (a new mask at every step). One mask serves all gates, the paper's tied variant.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

State = tuple[jax.Array, ...]  # hidden (B, H), and of an LSTM memory (B, H)


class Cell(NamedTuple):
    """A kind of recurrence: its step, how many gates it has, and how many arrays its state."""

    step: Callable[..., State]
    gates: int
    states: int


def lstm(state: State, projected: jax.Array, recurrent: jax.Array, bias: jax.Array | None) -> State:
    """The next state of an LSTM from the shares of inputs and hidden state in its gates, (B, 4, H) each."""
    hidden, memory = state
    gates = (projected + recurrent).astype(memory.dtype)
    write, keep, new, read = (gates[:, i] for i in range(4))  # (B, H) each
    memory = nn.sigmoid(keep) * memory + nn.sigmoid(write) * jnp.tanh(new)
    return (nn.sigmoid(read) * jnp.tanh(memory)).astype(hidden.dtype), memory


def gru(state: State, projected: jax.Array, recurrent: jax.Array, bias: jax.Array | None) -> State:
    """The next state of a GRU from the shares in its gates, (B, 3, H) each, and the recurrent bias (H,) of the new state."""
    (hidden,) = state
    assert bias is not None
    gates = nn.sigmoid(projected[:, :2] + recurrent[:, :2])
    reset, update = gates[:, 0], gates[:, 1]  # (B, H) each
    new = jnp.tanh(projected[:, 2] + reset * (recurrent[:, 2] + bias))
    return ((1 - update) * new + update * hidden,)


CELLS = {'lstm': Cell(lstm, gates=4, states=2), 'gru': Cell(gru, gates=3, states=1)}


def zero_state(cell: str, batch: int, width: int, dtype: Any) -> State:
    """The state before the first step, (B, H) each; an LSTM's memory is at least float32, since it sums over many steps."""
    memory = jnp.zeros((batch, width), jnp.promote_types(dtype, jnp.float32))
    return (jnp.zeros((batch, width), dtype), memory)[: CELLS[cell].states]


def dropout(x: jax.Array, rate: float, key: jax.Array, variational: bool) -> jax.Array:
    """Dropout of x (B, T, D) at `rate`, with one mask for all steps (`variational`) or one for each."""
    return x * draw_mask(key, rate, (x.shape[0], 1 if variational else x.shape[1], x.shape[2]), x.dtype)


def draw_mask(key: jax.Array, rate: float, shape: Sequence[int], dtype: Any) -> jax.Array:
    """An array of `shape` that is 0 with probability `rate`, else 1 / (1 - rate)."""
    return jax.random.bernoulli(key, 1 - rate, shape).astype(dtype) / (1 - rate)


class Recurrence(nn.Module):
    """One direction of one layer.

    Attributes:
      cell: 'lstm' or 'gru'.
      width: H.
      reverse: from the last step to the first.
      recurrent_dropout: rate of dropout on the hidden state where it enters the recurrent product.
      variational: one mask per sequence, not one per step.
      zoneout: probability that a unit of each part of the state (hidden, memory) keeps its old value at a step (Krueger et al.
        2017, equations 4 and 5); in evaluation the state is the expectation of that.
    """

    cell: str
    width: int
    reverse: bool = False
    recurrent_dropout: float = 0.0
    variational: bool = True
    zoneout: tuple[float, float] = (0.0, 0.0)

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, segments: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        """Hidden states (B, T, H) and the last state, for x (B, T, D); begins at `state`, without one at zeros."""
        batch, time, _ = x.shape
        gates = CELLS[self.cell].gates
        bias_init = _forget_one if self.cell == 'lstm' else nn.initializers.zeros
        projected = nn.DenseGeneral((gates, self.width), bias_init=bias_init, name='input')(x)  # (B, T, G, H)
        kernel = self.param('recurrent_kernel', _orthogonal, (self.width, gates, self.width))
        bias = self.param('recurrent_bias', nn.initializers.zeros, (self.width,)) if self.cell == 'gru' else None
        mask = self._draw_recurrent_mask(batch, time, projected.dtype) if train and self.recurrent_dropout else None
        changing = {
            'projected': projected,
            'segment': None if segments is None else segments.astype(jnp.int32),
            'mask': None if self.variational else mask,
            'zones': self._draw_zones((batch, time, self.width)) if train and any(self.zoneout) else None,
        }
        step = functools.partial(self._step, kernel, bias, mask if self.variational else None)
        first = zero_state(self.cell, batch, self.width, projected.dtype) if state is None else state
        start = (first, jnp.zeros(batch, jnp.int32))
        (last, _), hidden = jax.lax.scan(step, start, jax.tree.map(_swap, changing), reverse=self.reverse)
        return _swap(hidden), last  # (B, T, H)

    @nn.nowrap
    def _step(
        self, kernel: jax.Array, bias: jax.Array | None, mask: jax.Array | None, carry: Any, now: dict[str, Any]
    ) -> tuple[Any, jax.Array]:
        """One step of the scan: carries (state, document number (B,)); `now` is what belongs to this step alone."""
        state, document = carry
        before, segment = state, now['segment']
        if segment is not None:
            before = _choose((segment != document) & (document > 0), jax.tree.map(jnp.zeros_like, state), state)
        mask = mask if now['mask'] is None else now['mask']
        hidden = before[0] if mask is None else before[0] * mask
        recurrent = jnp.einsum('bh,hgk->bgk', hidden, kernel)  # (B, G, H)
        after = CELLS[self.cell].step(before, now['projected'], recurrent, bias)
        shares = self.zoneout if now['zones'] is None else now['zones']
        after = tuple(_zone_out(*parts) for parts in zip(before, after, shares, strict=False))  # a GRU has no memory
        if segment is not None:
            after, document = _choose(segment > 0, (after, segment), (state, document))
        return (after, document), after[0]

    @nn.nowrap
    def _draw_recurrent_mask(self, batch: int, time: int, dtype: Any) -> jax.Array:
        """(B, H), or (B, T, H) for plain dropout."""
        shape = (batch, self.width) if self.variational else (batch, time, self.width)
        return draw_mask(self.make_rng('dropout'), self.recurrent_dropout, shape, dtype)

    @nn.nowrap
    def _draw_zones(self, shape: tuple[int, int, int]) -> tuple[jax.Array, ...]:
        """Where each part of the state keeps its old value, (B, T, H) bool each."""
        rates = self.zoneout[: CELLS[self.cell].states]
        return tuple(jax.random.bernoulli(self.make_rng('dropout'), rate, shape) for rate in rates)


class RecurrentStack(nn.Module):
    """Layers of recurrences, each reading the outputs of the one before.

    Attributes:
      cell: 'lstm' or 'gru'.
      hidden: H of each layer.
      bidirectional: every layer runs in both directions and concatenates (forward, backward).
      input_dropout: rate of dropout on the inputs of the first layer.
      recurrent_dropout: rate of dropout on the hidden states of every layer.
      output_dropout: rate of dropout on the outputs of every layer.
      variational: dropout masks are drawn once per sequence, not once per step.
      zoneout: rate of zoneout of the hidden states.
      zoneout_memory: rate of zoneout of the memories of an LSTM.
    """

    cell: str
    hidden: tuple[int, ...]
    bidirectional: bool = False
    input_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    output_dropout: float = 0.0
    variational: bool = True
    zoneout: float = 0.0
    zoneout_memory: float = 0.0

    def setup(self):
        self.layers = [self._layer(width) for width in self.hidden]

    @nn.nowrap
    def _layer(self, width: int) -> dict[str, Recurrence]:
        """The directions of one layer by name."""
        directions = ('forward', 'backward') if self.bidirectional else ('forward',)
        return {
            name: Recurrence(
                cell=self.cell,
                width=width,
                reverse=name == 'backward',
                recurrent_dropout=self.recurrent_dropout,
                variational=self.variational,
                zoneout=(self.zoneout, self.zoneout_memory),
            )
            for name in directions
        }

    def __call__(
        self, x: jax.Array, train: bool, segments: jax.Array | None = None, states: Any = None
    ) -> tuple[jax.Array, list[dict[str, State]]]:
        """Outputs (B, T, W) and each layer's last states by direction, for x (B, T, D).

        At padded steps the outputs are those of the step before (in the reverse direction, of the step after).
        """
        x = self._drop(x, self.input_dropout, train)
        last = []
        for index, layer in enumerate(self.layers):
            first = {} if states is None else states[index]
            found = {name: run(x, train, segments, first.get(name)) for name, run in layer.items()}
            x = jnp.concatenate([hidden for hidden, _ in found.values()], axis=-1)  # (B, T, W)
            x = self._drop(x, self.output_dropout, train)
            last.append({name: state for name, (_, state) in found.items()})
        return x, last

    @nn.nowrap
    def _drop(self, x: jax.Array, rate: float, train: bool) -> jax.Array:
        return dropout(x, rate, self.make_rng('dropout'), self.variational) if train and rate else x


def _swap(x: jax.Array) -> jax.Array:
    """Exchanges the axes of batch and time."""
    return jnp.swapaxes(x, 0, 1)


def _choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    """Row by row, `yes` where `condition` (B,) holds and else `no`: trees of arrays (B, ...)."""
    return jax.tree.map(lambda y, n: jnp.where(condition.reshape(-1, *[1] * (y.ndim - 1)), y, n), yes, no)


def _zone_out(before: jax.Array, after: jax.Array, share: jax.Array | float) -> jax.Array:
    """`share` of the old value: drawn 0 or 1 by unit in training, the rate itself in evaluation."""
    if isinstance(share, float):
        return share * before + (1 - share) * after if share else after
    return jnp.where(share, before, after)


def _forget_one(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Biases of the gates: 1 for the forget gate, 0 for the others. Flax asks for them flat, (4 H,)."""
    return jnp.zeros(shape, dtype).reshape(4, -1).at[1].set(1).reshape(shape)


def _orthogonal(key: jax.Array, shape: tuple[int, int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Kernels (H, G, H), orthogonal for each gate."""
    make = nn.initializers.orthogonal()
    return jnp.stack([make(k, (shape[0], shape[2]), dtype) for k in jax.random.split(key, shape[1])], axis=1)  # (H, G, H)
