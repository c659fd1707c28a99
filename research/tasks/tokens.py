"""What tasks over tokens share: a loss by true tokens, scored whole or in chunks, and its metrics.

Shape letters: B batch, T places that are predicted, D features, V vocabulary.

    task.predict(variables, batch)            # {'nats', 'correct', 'weight', 'target'}: (B, T) each, never logits (B, T, V)

Two rows with 3 and 1 true tokens that cost 6 and 4 nats have a loss of 10 / 4 = 2.5 (not (2 + 4) / 2 = 3) and a perplexity of
e^2.5 = 12.2. Where the four tokens stand for 12 bytes that is 10 / log 2 / 12 = 1.202 bits per byte.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import UsageError
from research.core.terms import Terms, weighted
from research.data.source import DataSpec, Tokenizer
from research.tasks.base import Batch, Keys, ModuleTask, Variables, check_keys
from research.tasks.chunked import Scores, in_chunks, score
from research.tasks.metrics import make
from research.tasks.states import Additive, Metric, Result, State, as_float64, ratio


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenTask(ModuleTask):
    """A task that predicts tokens of the tokenizer; subclasses give `arguments` and `targets`.

    A place's weight in every term is 1 if its target counts, and 0 if it is padding or its row is masked.

    Attributes:
      chunk: how many places of each row have logits at one time; the model then needs `features` and `head`. 0: all.
      label_smoothing: share of the target spread evenly over the vocabulary, in [0, 1); in the loss, not in the metrics.
      z_loss: factor of log(Z)^2 in the loss, >= 0, see `chunked.score`.
      metrics: names of metrics: 'perplexity', 'bits_per_byte', 'accuracy'.

    Raises:
      UsageError: the data have no tokenizer or not these keys, or a value is out of range.
    """

    chunk: int = 0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    metrics: tuple[str, ...] | dict[str, Metric] = ('perplexity', 'accuracy')

    def __post_init__(self):
        _ = self.tokenizer  # raises without one
        check_keys(self.data, self.keys)
        check_rows(self.data, self.keys)
        if self.chunk < 0:
            raise UsageError(f'chunk is {self.chunk}, below 0', 'try chunk=128, or 0 for all logits at once')
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f'label_smoothing is {self.label_smoothing}, outside [0, 1)', 'try label_smoothing=0.1')
        if not 0 <= self.z_loss < float('inf'):
            raise UsageError(f'z_loss is {self.z_loss}, outside [0, inf)', 'try z_loss=1e-4, or 0 for none')
        object.__setattr__(self, 'metrics', make(self.metrics, self.metric_table(), self.num_outputs, self.inputs))

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the batch that hold rows of tokens and cannot be missing."""
        return (self.inputs,)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data."""
        return tokenizer_of(self.data, type(self).__name__.lower())

    @property
    def num_outputs(self) -> int:
        """One logit for each token of the vocabulary."""
        return self.tokenizer.vocabulary_size

    def metric_table(self) -> dict[str, Callable[[int, str], Metric]]:
        """What `metrics` can name, as in `metrics.CLASS_METRICS`."""
        return {
            'perplexity': lambda v, inputs: Perplexity(),
            'bits_per_byte': lambda v, inputs: BitsPerByte(np.asarray(self.tokenizer.byte_lengths)),
            'accuracy': lambda v, inputs: TokenAccuracy(),
        }

    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The tokens to predict (B, T) int and the weight of each, (B, T) float32."""
        raise NotImplementedError

    def scores(self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool) -> tuple[Scores, dict[str, Any]]:
        """'nats', 'loss', 'correct', 'weight' and 'target', (B, T) each, and the new model state."""
        targets, weights = self.targets(batch)
        outputs, state = self.apply(variables, batch, rngs, train, 'features' if self.chunk else None)
        if not self.chunk:
            self.check_logits(outputs)
        # As in `losses.unmasked`: what does not count must go before the formula, or its NaN would poison the gradient.
        outputs = jnp.where(weights[..., None] > 0, outputs, 0.0)  # (B, T, V or D)
        targets = jnp.where(weights > 0, targets, 0)
        cost = functools.partial(score, label_smoothing=self.label_smoothing, z_loss=self.z_loss)
        if self.chunk:
            found = in_chunks(lambda x, y: cost(self.head(variables, x), y), self.chunk, outputs, targets)
        else:
            found = cost(outputs, targets)
        return {**found, 'weight': weights, 'target': targets}, state

    def apply(
        self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool, method: str | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As `ModuleTask.apply`; a method that the module does not have is refused."""
        if method is not None and not hasattr(self.module, method):
            what = f'task.chunk={self.chunk}' if self.chunk else f'task {type(self).__name__.lower()}'
            raise UsageError(
                f'{what} needs a model with features() and head(), and {type(self.module).__name__} has none',
                'take one that has them, such as decoder or encoder' + (', or set task.chunk=0' if self.chunk else ''),
            )
        return super().apply(variables, batch, rngs, train, method)

    def head(self, variables: Variables, features: jax.Array) -> jax.Array:
        """Logits (..., V) of features (..., D), both float32."""
        # The parameters are cast here, inside a chunk, so that the gradients of the chunks are added up in float32.
        logits: Any = self.module.apply(self.ready_variables(variables), features.astype(self.dtype), method='head')
        self.check_logits(logits)
        return logits.astype(jnp.float32)

    def check_logits(self, logits: jax.Array) -> None:
        """Raises a UsageError unless `logits` are (B, T, V)."""
        if logits.ndim != 3 or logits.shape[-1] != self.num_outputs:
            raise UsageError(
                f'the model gives outputs of shape {logits.shape}, not (batch, length, {self.num_outputs})',
                "take a model with one output for each token, e.g. decoder, or pooling='none'",
            )

    def loss(self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool) -> tuple[Terms, dict[str, Any]]:
        """'loss' and 'accuracy' of one batch, weighed by its true tokens, and the new model state."""
        found, state = self.scores(variables, batch, rngs, train)
        return {
            'loss': weighted(found['loss'], found['weight']),
            'accuracy': weighted(found['correct'], found['weight']),
        }, state

    def predict(self, variables: Variables, batch: Batch) -> Scores:
        """'nats', 'correct', 'weight' and 'target', (B, T) each: what the metrics read; never the logits."""
        found, _ = self.scores(variables, batch, None, train=False)
        return {name: found[name] for name in ('nats', 'correct', 'weight', 'target')}


@dataclasses.dataclass(frozen=True)
class Perplexity(Additive):
    """exp(nats / tokens) over all tokens that count; infinite where that is beyond floating point."""

    def batch(self, outputs: Any, batch: Batch) -> State:
        """(nats, tokens)."""
        return weighted(outputs['nats'], outputs['weight'])

    def compute(self, state: State) -> Result:
        """{'perplexity': at least 1}."""
        with np.errstate(over='ignore'):
            return {'perplexity': float(np.exp(ratio(*state, empty=np.nan)))}


@dataclasses.dataclass(frozen=True, eq=False)
class BitsPerByte(Additive):
    """nats / log 2 / bytes: comparable between tokenizers. Special tokens cost nats, and stand for no bytes.

    Attributes:
      byte_lengths: (V,) int, the bytes that each token stands for.
    """

    byte_lengths: np.ndarray

    def batch(self, outputs: Any, batch: Batch) -> State:
        """(nats, bytes)."""
        lengths = jnp.asarray(self.byte_lengths, jnp.float32)[outputs['target']]  # (B, T)
        return weighted(outputs['nats'], outputs['weight'])[0], jnp.sum(lengths * outputs['weight'])

    def compute(self, state: State) -> Result:
        """{'bits_per_byte': at least 0}."""
        return {'bits_per_byte': float(ratio(*state, empty=np.nan) / np.log(2))}


@dataclasses.dataclass(frozen=True)
class TokenAccuracy(Additive):
    """The share of tokens that have the largest logit."""

    def batch(self, outputs: Any, batch: Batch) -> State:
        """(correct tokens, tokens)."""
        return weighted(outputs['correct'], outputs['weight'])

    def compute(self, state: State) -> Result:
        """{'accuracy': in [0, 1]}."""
        return {'accuracy': float(ratio(*as_float64(state), empty=np.nan))}


def tokenizer_of(data: DataSpec, task: str) -> Tokenizer:
    """The tokenizer of the data.

    Raises:
      UsageError: there is none.
    """
    if data.tokenizer is None:
        raise UsageError(f'task {task} needs a tokenizer, and this data set has none', "set config.data.tokenizer, e.g. 'byte'")
    return data.tokenizer


def check_rows(data: DataSpec, keys: tuple[str, ...]) -> None:
    """Raises a UsageError unless each of `keys` holds rows of integers."""
    for key in keys:
        shape, dtype = data.examples[key]
        if len(shape) != 1 or np.dtype(dtype).kind not in 'ui':
            raise UsageError(
                f'{key!r} of one example is {np.dtype(dtype)} of shape {tuple(shape)}, not a row of tokens',
                "add a transform to config.data.transforms, e.g. 'windows(length=256)' or 'pad(length=128)'",
            )


def true_places(segments: jax.Array | None, mask: jax.Array, like: jax.Array) -> jax.Array:
    """The weight of each place of rows `like` (B, T): its row's `mask` (B,) where it is no padding; (B, T) float32."""
    weights = jnp.broadcast_to(jnp.asarray(mask, jnp.float32)[:, None], like.shape)  # (B, T)
    return weights if segments is None else weights * (segments > 0)
