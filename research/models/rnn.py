"""Recurrent networks: stacks of LSTM or GRU layers over vectors, rows of images or tokens.

Shape letters: B batch, T time, D inputs, V vocabulary, H width of one direction, W = H or 2 H, K outputs.

    RNN(10)                                                 on 8x8x1 digits as 8 steps of 8      71,434 parameters
    RNN(256, cell='gru', pooling='none', vocabulary_size=256, embedding=64)   on text            123,648 parameters

An LSTM layer has 4 H (D + H + 1) parameters, a GRU layer 3 H (D + H + 1) + H: with D = 8 and H = 128, 4 * 128 * 137 = 70,144.

As a language model (`pooling='none'`, one direction) it has `features` and `head`, and for generation `init_cache` and
`decode`. The layers, their conventions and what dropout masks are shared are told in `recurrent`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core.errors import UsageError, nearest
from research.models import layers
from research.models.recurrent import CELLS, RecurrentStack, zero_state

POOLINGS = ('last', 'mean', 'none')

# Units over the 'model' axis; the recurrent product then gathers the hidden state at every step.
PARTITION_RULES = (
    (r'.*embed/embedding', ('model', None)),
    (r'.*/input/kernel', (None, None, 'model')),
    (r'.*/input/bias', (None, 'model')),
    (r'.*/recurrent_kernel', (None, None, 'model')),
    (r'.*/recurrent_bias', ('model',)),
    (r'.*head/kernel', (None, 'model')),
    (r'.*head/bias', ('model',)),
    ('.*', ()),
)


class RNN(nn.Module):
    """Recurrent layers, pooling over time, and a linear head.

    Attributes:
      num_outputs: K, size of the head; 0: no head, the outputs are the features.
      cell: 'lstm' or 'gru'.
      hidden: H of each layer.
      bidirectional: every layer runs in both directions; a language model must not.
      input_dropout: rate of dropout on the inputs (or embeddings).
      recurrent_dropout: rate of dropout on the hidden states, from one step to the next.
      output_dropout: rate of dropout on the outputs of every layer, which are the inputs of the next.
      variational: one mask per sequence (Gal and Ghahramani 2016); False: a new mask at every step.
      zoneout: probability that a unit of the hidden state keeps its old value at a step (Krueger et al. 2017).
      zoneout_memory: the same for the memory of an LSTM.
      vocabulary_size: V, of token inputs; 0 for data without a tokenizer.
      embedding: width of the embedding of tokens; None: that of the first layer.
      pooling: 'last' takes each direction's state at its end, 'mean' the mean over time, 'none' every step.
    """

    num_outputs: int
    cell: str = 'lstm'
    hidden: tuple[int, ...] = (128,)
    bidirectional: bool = False
    input_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    output_dropout: float = 0.0
    variational: bool = True
    zoneout: float = 0.0
    zoneout_memory: float = 0.0
    vocabulary_size: int = 0
    embedding: int | None = None
    pooling: str = 'last'

    @property
    def is_causal(self) -> bool:
        """Whether an output depends on nothing behind its own step."""
        return not self.bidirectional

    def setup(self):
        self._check()
        if self.vocabulary_size:
            self.embed = nn.Embed(self.vocabulary_size, self.embedding or self.hidden[0])
        self.stack = RecurrentStack(
            cell=self.cell,
            hidden=self.hidden,
            bidirectional=self.bidirectional,
            input_dropout=self.input_dropout,
            recurrent_dropout=self.recurrent_dropout,
            output_dropout=self.output_dropout,
            variational=self.variational,
            zoneout=self.zoneout,
            zoneout_memory=self.zoneout_memory,
        )

    def __call__(
        self,
        inputs: jax.Array,
        train: bool = False,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Maps inputs to outputs (B, K), or (B, T, K) without pooling; see `features`."""
        return self.head(self.features(inputs, train, segments=segments, positions=positions))

    def features(
        self,
        inputs: jax.Array,
        train: bool = False,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """The pooled outputs of the layers, (B, W), or (B, T, W) without pooling.

        Args:
          inputs: vectors (B, T, D); images (B, T, width, channels), read row by row; or tokens (B, T) int32.
          train: whether to drop out.
          segments: (B, T) int32, 0 for padding, else the number of the document in its row; None: all one document.
          positions: not needed, a recurrence knows the order.
        """
        outputs, _ = self.stack(self._vectors(inputs), train, segments)
        if self.pooling == 'none':
            return outputs
        if self.pooling == 'mean':
            return layers.masked_mean(outputs, segments)
        width = self.hidden[-1]
        return jnp.concatenate([outputs[:, -1, :width], outputs[:, 0, width:]], axis=-1)  # (B, W): both directions at their end

    @nn.compact
    def head(self, features: jax.Array) -> jax.Array:
        """Maps features (..., W) to outputs (..., K)."""
        return nn.Dense(self.num_outputs, name='head')(features) if self.num_outputs else features

    @nn.nowrap
    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> list[dict[str, Any]]:
        """The state before the first token of `batch` sequences; of any `length`, since a state does not grow."""
        return [{'forward': zero_state(self.cell, batch, width, dtype)} for width in self.hidden]

    def decode(self, tokens: jax.Array, cache: Any, *, lengths: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """Logits (B, n, K) after each of the next `tokens` (B, n), and the cache behind them.

        Args:
          tokens: the tokens that follow those the cache has seen.
          cache: from `init_cache` or from the call before.
          lengths: (B,) int32, how many of the n tokens belong to each sequence (prompts padded on the right); None: all.

        Raises:
          UsageError: the network reads both directions, or pools over time.
        """
        if self.bidirectional or self.pooling != 'none':
            raise UsageError(
                f'model.bidirectional={self.bidirectional} and model.pooling={self.pooling!r} cannot write one token at a time',
                "train it with model.bidirectional=False and model.pooling='none'",
            )
        segments = None if lengths is None else (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)  # (B, n)
        outputs, cache = self.stack(self._vectors(tokens), False, segments, cache)
        return self.head(outputs), cache

    @nn.nowrap
    def _vectors(self, inputs: jax.Array) -> jax.Array:
        """The inputs as vectors (B, T, D)."""
        if inputs.ndim == 2 and self.vocabulary_size and jnp.issubdtype(inputs.dtype, jnp.integer):
            return self.embed(inputs)  # (B, T, D)
        if inputs.ndim == 4:
            return inputs.reshape(*inputs.shape[:2], -1)  # (B, T, D)
        if inputs.ndim != 3:
            raise UsageError(
                f"model 'rnn' reads vectors (B, T, D), images (B, H, W, C) or tokens (B, T), not {inputs.dtype} {inputs.shape}",
                "set config.data.tokenizer for text, or use model='mlp' for tables",
            )
        return inputs

    @nn.nowrap
    def _check(self) -> None:
        """Refuses fields out of range."""
        for field, known in (('cell', CELLS), ('pooling', POOLINGS)):
            if getattr(self, field) not in known:
                raise UsageError(f'model.{field} is {getattr(self, field)!r}', nearest(getattr(self, field), known))
        for field in ('input_dropout', 'recurrent_dropout', 'output_dropout', 'zoneout', 'zoneout_memory'):
            if not 0 <= getattr(self, field) < 1:
                raise UsageError(f'model.{field} is {getattr(self, field)}, outside [0, 1)', f'try model.{field}=0.2')
        if not self.hidden or min(self.hidden) < 1:
            raise UsageError(f'model.hidden is {self.hidden}', 'give the width of each layer, e.g. model.hidden=(128,)')
