"""Tagging: a class for each token, such as its part of speech or its place in a named entity.

Shape letters: B batch, T length, K classes (tags).

    task = Tag(model=Encoder, data=spec, dtype=jnp.float32, metrics=('accuracy', 'span_f1'))
    batch: 'tokens' and 'segment' (B, T), 'tag' (B, T) int32, -1 where a token has none

A word of several pieces has its tag at the first, and -1 at the others (Devlin et al. 2019, section 5.3): of `play ##ing now`
with the tags 3 -1 5 two tokens count.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.core.errors import UsageError
from research.core.terms import Terms, weighted
from research.tasks.base import Batch, Keys, ModuleTask, Variables, check_keys
from research.tasks.losses import cross_entropy, unmasked
from research.tasks.metrics import CLASS_METRICS, make
from research.tasks.spans import SpanF1, read_scheme
from research.tasks.states import Metric, Result, State
from research.tasks.tokens import check_rows


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tag(ModuleTask):
    """Predicts the tag of each labelled token; outputs are logits (B, T, K).

    Attributes:
      inputs: the key of the batch that the model reads.
      labels: the key of the batch that holds the tags, (B, T) int: in [0, K), or negative where a token has none.
      label_smoothing: share of the target spread evenly over all tags, in [0, 1).
      metrics: names of metrics: 'span_f1' (see `spans.SpanF1`), or of `metrics.CLASS_METRICS`, over labelled tokens.

    Raises:
      UsageError: the data have no classes or not these keys, or a value is out of range.
    """

    inputs: str = 'tokens'
    labels: str = 'tag'
    label_smoothing: float = 0.0
    metrics: tuple[str, ...] | dict[str, Metric] = ('accuracy',)

    def __post_init__(self):
        if not self.data.class_names:
            raise UsageError('task tag needs classes, and this data set has none', 'take a source with tags, e.g. conll')
        check_keys(self.data, (self.inputs, self.labels))
        check_rows(self.data, (self.labels,))
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f'label_smoothing is {self.label_smoothing}, outside [0, 1)', 'try label_smoothing=0.1')
        object.__setattr__(self, 'metrics', make(self.metrics, self.metric_table(), self.num_outputs, self.labels))

    @property
    def num_outputs(self) -> int:
        """One logit for each tag."""
        return len(self.data.class_names or ())

    def metric_table(self) -> dict[str, Callable[[int, str], Metric]]:
        """What `metrics` can name."""
        per_token = {name: functools.partial(make_per_token, factory) for name, factory in CLASS_METRICS.items()}
        return {**per_token, 'span_f1': lambda k, labels: SpanF1(read_scheme(self.data.class_names or ()), labels)}

    def loss(self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool) -> tuple[Terms, dict[str, Any]]:
        """'loss' and 'accuracy' over labelled tokens, and the new model state."""
        outputs, state = self.logits(variables, batch, rngs, train)
        logits, found = flat(outputs, batch, self.labels)
        labels, mask = found[self.labels], found['mask']
        loss = cross_entropy(logits, labels, self.label_smoothing)
        return {'loss': weighted(loss, mask), 'accuracy': weighted(jnp.argmax(logits, -1) == labels, mask)}, state

    def predict(self, variables: Variables, batch: Batch) -> jax.Array:
        """Logits (B, T, K) float32 as in evaluation."""
        return self.logits(variables, batch, None, train=False)[0]

    def logits(self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool) -> tuple[jax.Array, dict[str, Any]]:
        """Float32 logits (B, T, K) and the new model state."""
        outputs, state = self.apply(variables, batch, rngs, train)
        if outputs.shape != (*batch[self.labels].shape, self.num_outputs):
            raise UsageError(
                f'the model gives outputs of shape {outputs.shape}, not (batch, length, {self.num_outputs})',
                "take a model with one output for each token, e.g. encoder(pooling='none')",
            )
        return outputs, state


@dataclasses.dataclass(frozen=True, eq=False)
class PerToken:
    """A metric of examples, applied to each labelled token."""

    metric: Metric
    labels: str

    def batch(self, outputs: jax.Array, batch: Batch) -> State:
        """The state of the metric for logits (B, T, K)."""
        return self.metric.batch(*flat(outputs, batch, self.labels))

    def merge(self, a: State, b: State) -> State:
        """As the metric."""
        return self.metric.merge(a, b)

    def compute(self, state: State) -> Result:
        """As the metric."""
        return self.metric.compute(state)


def make_per_token(factory: Callable[[int, str], Metric], num_classes: int, labels: str) -> PerToken:
    """The metric of `factory` over tokens."""
    return PerToken(factory(num_classes, labels), labels)


def flat(outputs: jax.Array, batch: Batch, labels: str) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits (B, T, K) as (B*T, K), and a batch of B*T tokens with their labels; masked are those without."""
    tags = jnp.asarray(batch[labels])
    mask = (jnp.asarray(batch['mask'], jnp.float32)[:, None] * (tags >= 0)).reshape(-1)  # (B*T,)
    logits = unmasked(outputs.reshape(-1, outputs.shape[-1]), mask)  # (B*T, K)
    return logits, {labels: unmasked(tags.reshape(-1), mask), 'mask': mask}
