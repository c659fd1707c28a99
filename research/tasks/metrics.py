"""The metrics by name, and those that count or average; areas under curves are in `ranking`.

Shape letters: B batch, K classes or outputs, M bins.

    metrics = make(('accuracy', 'f1'), CLASS_METRICS, num_outputs=10, labels='label')
    states = {name: metric.batch(outputs, batch) for name, metric in metrics.items()}       # in one jitted function
    summarise(metrics, states)              # {'accuracy': 0.9, 'f1_macro': 0.88, 'f1_micro': 0.9, 'f1_per_class': [...]}

Metrics that need the same counts each make them: inside one jitted function the compiler does it once.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import UsageError, nearest
from research.core.terms import weighted
from research.tasks.losses import absolute_error, squared_error, unmasked
from research.tasks.ranking import AveragePrecision, RecallAtPrecision, ROCArea
from research.tasks.states import Additive, Metric, Result, State, as_float64, checked, ratio


@dataclasses.dataclass(frozen=True)
class Accuracy(Additive):
    """The share of examples whose largest logit is the label's; of equal logits the first class wins, as in scikit-learn."""

    labels: str

    def batch(self, outputs: jax.Array, batch: Mapping[str, Any]) -> State:
        """(sum, weight); `outputs` are logits (B, K)."""
        logits, labels, weights = checked(outputs, batch, self.labels)
        return weighted(jnp.argmax(logits, -1) == labels, weights)

    def compute(self, state: State) -> Result:
        """{'accuracy': in [0, 1]}."""
        return {'accuracy': float(ratio(*state, empty=np.nan))}


@dataclasses.dataclass(frozen=True)
class TopK(Additive):
    """The share of examples whose label is among the k largest logits; ties count against the model.

    Raises:
      UsageError: there are at most k classes, so it would always be 1.
    """

    k: int
    num_classes: int
    labels: str

    def __post_init__(self):
        if self.num_classes <= self.k:
            raise UsageError(f"metric 'top{self.k}' is always 1 with {self.num_classes} classes", "use 'accuracy'")

    def batch(self, outputs: jax.Array, batch: Mapping[str, Any]) -> State:
        """(sum, weight); `outputs` are logits (B, K)."""
        logits, labels, weights = checked(outputs, batch, self.labels)
        own = jnp.take_along_axis(logits, labels[:, None], axis=-1)  # (B, 1)
        return weighted(jnp.sum(logits >= own, axis=-1) <= self.k, weights)  # the label itself is one of the k

    def compute(self, state: State) -> Result:
        """{'topK': in [0, 1]}."""
        return {f'top{self.k}': float(ratio(*state, empty=np.nan))}


@dataclasses.dataclass(frozen=True)
class ConfusionMatrix(Additive):
    """How many examples of class i (row) were taken for class j (column), ties going to the first class."""

    num_classes: int
    labels: str

    def batch(self, outputs: jax.Array, batch: Mapping[str, Any]) -> State:
        """The matrix (K, K) of one batch; `outputs` are logits (B, K)."""
        logits, labels, weights = checked(outputs, batch, self.labels)
        empty = jnp.zeros((self.num_classes, self.num_classes), jnp.float32)
        return empty.at[labels, jnp.argmax(logits, -1)].add(weights)

    def compute(self, state: State) -> Result:
        """{'confusion_matrix': nested list}."""
        return {'confusion_matrix': as_float64(state).tolist()}


@dataclasses.dataclass(frozen=True)
class ClassScore(ConfusionMatrix):
    """Precision, recall or F1 of each class, their mean (macro) and that of all decisions together (micro, the accuracy).

    All K classes enter the macro mean; a class with nothing to divide by counts as 0 (scikit-learn's `zero_division=0` with
    `labels=range(K)`). Without any example everything is NaN.
    """

    score: str
    DENOMINATORS: ClassVar[dict[str, Callable[[Any, Any], Any]]] = {
        'precision': lambda predicted, actual: predicted,
        'recall': lambda predicted, actual: actual,
        'f1': lambda predicted, actual: (predicted + actual) / 2,  # the harmonic mean of hits/predicted and hits/actual
    }

    def compute(self, state: State) -> Result:
        """{'NAME_macro': x, 'NAME_micro': x, 'NAME_per_class': [K numbers]}."""
        matrix = as_float64(state)  # (K, K)
        hits, predicted, actual = np.diag(matrix), matrix.sum(0), matrix.sum(1)  # (K,)
        micro = ratio(hits.sum(), matrix.sum(), empty=np.nan)
        per_class = ratio(hits, self.DENOMINATORS[self.score](predicted, actual), empty=0.0 if matrix.any() else np.nan)
        return {
            f'{self.score}_macro': float(per_class.mean()),
            f'{self.score}_micro': float(micro),
            f'{self.score}_per_class': per_class.tolist(),
        }


@dataclasses.dataclass(frozen=True)
class CalibrationError(Additive):
    """Expected calibration error: Guo et al. 2017, "On calibration of modern neural networks", equation 3.

    The mean over examples of |accuracy - confidence| of the bin that their confidence, the largest probability, lies in: M = 15
    bins of equal width, ((m - 1) / M, m / M].
    """

    labels: str
    num_bins: int = 15

    def batch(self, outputs: jax.Array, batch: Mapping[str, Any]) -> State:
        """Weight, summed confidence and correct predictions of each bin, (M,) each; `outputs` are logits (B, K)."""
        logits, labels, weights = checked(outputs, batch, self.labels)
        confidence = jax.nn.softmax(logits).max(-1)  # (B,)
        bins = jnp.clip(jnp.ceil(confidence * self.num_bins) - 1, 0, self.num_bins - 1).astype(jnp.int32)
        sums = {'weight': 1.0, 'confidence': confidence, 'correct': jnp.argmax(logits, -1) == labels}
        return {name: jnp.zeros(self.num_bins).at[bins].add(weights * values) for name, values in sums.items()}

    def compute(self, state: State) -> Result:
        """{'calibration_error': in [0, 1]}."""
        state = as_float64(state)
        gaps = np.abs(state['correct'] - state['confidence'])
        return {'calibration_error': float(ratio(gaps.sum(), state['weight'].sum(), empty=np.nan))}


@dataclasses.dataclass(frozen=True)
class MeanError(Additive):
    """The mean of an error over examples and outputs: 'mse', in squared units of the targets, or 'mae', in their units."""

    name: str
    error: Callable[[jax.Array, jax.Array], jax.Array]
    labels: str

    def batch(self, outputs: jax.Array, batch: Mapping[str, Any]) -> State:
        """(sum, weight); `outputs` are (B, K)."""
        errors = self.error(unmasked(outputs, batch['mask']), targets(batch, self.labels))
        return weighted(errors.mean(-1), batch['mask'])

    def compute(self, state: State) -> Result:
        """{name: mean}."""
        return {self.name: float(ratio(*state, empty=np.nan))}


@dataclasses.dataclass(frozen=True)
class Determination:
    """R^2, the coefficient of determination: 1 - residual / total sum of squares, averaged evenly over outputs.

    The total is merged from counts, means and squared deviations (Chan, Golub and LeVeque 1979, "Updating formulae and a
    pairwise algorithm for computing sample variances"), each batch measuring from an origin of its own, so that a large offset
    of the targets does not cancel. A constant target gives 1 if it is met exactly and else 0, as scikit-learn; fewer than two
    examples give NaN.
    """

    labels: str

    def batch(self, outputs: jax.Array, batch: Mapping[str, Any]) -> State:
        """The weight, and by output, (K,): origin, mean from it, squared deviations, squared residuals."""
        mask = jnp.asarray(batch['mask'], jnp.float32)
        values, weights = targets(batch, self.labels), mask[:, None]  # (B, K), (B, 1)
        origin = values[jnp.argmax(mask > 0)]  # (K,): of the first example that counts
        shifted = jnp.where(weights > 0, values - origin, 0.0)
        mean = jnp.sum(weights * shifted, 0) / jnp.maximum(jnp.sum(mask), jnp.finfo(jnp.float32).tiny)  # (K,)
        return {
            'weight': jnp.sum(mask),
            'origin': origin,
            'mean': mean,
            'deviation': jnp.sum(weights * jnp.square(shifted - mean), 0),
            'residual': jnp.sum(weights * jnp.square(unmasked(outputs, mask) - values), 0),
        }

    def merge(self, a: State, b: State) -> State:
        """Chan's update in float64; the merged origin is zero."""
        a, b = as_float64(a), as_float64(b)
        weight, share = a['weight'] + b['weight'], ratio(b['weight'], a['weight'] + b['weight'], empty=0.0)
        step = b['origin'] + b['mean'] - a['origin'] - a['mean']
        return {
            'weight': weight,
            'origin': np.zeros_like(step),
            'mean': a['origin'] + a['mean'] + step * share,
            'deviation': a['deviation'] + b['deviation'] + step**2 * a['weight'] * share,
            'residual': a['residual'] + b['residual'],
        }

    def compute(self, state: State) -> Result:
        """{'r2': at most 1}."""
        state = as_float64(state)
        if_constant = np.where(state['residual'] > 0, 0.0, 1 + state['residual'])  # 1 + 0, or NaN
        share = ratio(state['residual'], state['deviation'], empty=0.0)
        per_output = np.where(state['deviation'] == 0, if_constant, 1 - share)
        return {'r2': float(per_output.mean()) if state['weight'] >= 2 else float('nan')}


def targets(batch: Mapping[str, Any], labels: str) -> jax.Array:
    """The targets (B,) or (B, K), of any numeric type, as (B, K) float32, zero in masked rows."""
    values = unmasked(batch[labels], batch['mask']).astype(jnp.float32)
    return values[:, None] if values.ndim == 1 else values  # (B, K)


Factory = Callable[[int, str], Metric]  # (number of classes or outputs, key of the labels)

CLASS_METRICS: dict[str, Factory] = {
    'accuracy': lambda k, labels: Accuracy(labels),
    'top2': functools.partial(TopK, 2),
    'top3': functools.partial(TopK, 3),
    'top5': functools.partial(TopK, 5),
    'precision': lambda k, labels: ClassScore(k, labels, 'precision'),
    'recall': lambda k, labels: ClassScore(k, labels, 'recall'),
    'f1': lambda k, labels: ClassScore(k, labels, 'f1'),
    'confusion_matrix': ConfusionMatrix,
    'auroc': ROCArea,
    'average_precision': AveragePrecision,
    'recall_at_precision_90': lambda k, labels: RecallAtPrecision(k, labels, 90),
    'recall_at_precision_95': lambda k, labels: RecallAtPrecision(k, labels, 95),
    'recall_at_precision_99': lambda k, labels: RecallAtPrecision(k, labels, 99),
    'calibration_error': lambda k, labels: CalibrationError(labels),
}
VALUE_METRICS: dict[str, Factory] = {
    'mse': lambda k, labels: MeanError('mse', squared_error, labels),
    'mae': lambda k, labels: MeanError('mae', absolute_error, labels),
    'r2': lambda k, labels: Determination(labels),
}
METRICS = CLASS_METRICS | VALUE_METRICS


def make(
    chosen: Sequence[str] | Mapping[str, Metric], table: Mapping[str, Factory], num_outputs: int, labels: str
) -> dict[str, Metric]:
    """The `chosen` metrics by name, made from a table; a dict of metrics is taken as it is.

    Raises:
      UsageError: a name is not in the table.
    """
    if isinstance(chosen, Mapping):
        return dict(chosen)
    for name in chosen:
        if name not in table:
            what = 'is not for this task' if name in METRICS else 'does not exist'
            raise UsageError(f'metric {name!r} {what}', nearest(name, table))
    return {name: table[name](num_outputs, labels) for name in chosen}


def summarise(metrics: Mapping[str, Metric], states: Mapping[str, State]) -> Result:
    """The results of all metrics in one flat dict, from the states under the same names."""
    return {key: value for name, metric in metrics.items() for key, value in metric.compute(states[name]).items()}
