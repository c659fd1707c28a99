"""Regression: one or more real numbers for each example, by squared, absolute or Huber loss.

Shape letters: B batch, K outputs.

    task = Regress(model=MLP, data=spec, dtype=jnp.float32, loss_function='huber', huber_delta=2.0)

Outputs (1.0, 5.0) for targets (0.0, 2.0) have the mse (1 + 9) / 2 = 5 and the mae (1 + 3) / 2 = 2.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from research.core.errors import UsageError, nearest
from research.core.terms import Terms, weighted
from research.tasks.base import Batch, Supervised, check_keys
from research.tasks.losses import REGRESSION_LOSSES, unmasked
from research.tasks.metrics import VALUE_METRICS, make, targets
from research.tasks.states import Metric


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Regress(Supervised):
    """Predicts numbers, (B, K). The loss of an example is the mean over its outputs.

    Targets are (B,) or (B, K), floats or integers: class labels too, to regress on the class number.

    Attributes:
      inputs: the key of the batch that the model reads.
      labels: the key of the batch that holds the targets.
      loss_function: 'mse' (squared error), 'mae' (absolute error) or 'huber'.
      huber_delta: the error beyond which the Huber loss grows linearly, > 0, in units of the targets.
      metrics: names of metrics, see `metrics.VALUE_METRICS`.

    Raises:
      UsageError: the data do not have these keys or shapes, or a value is out of range.
    """

    inputs: str = 'features'
    labels: str = 'label'
    loss_function: str = 'mse'
    huber_delta: float = 1.0
    metrics: tuple[str, ...] | dict[str, Metric] = ('mse', 'mae', 'r2')

    def __post_init__(self):
        check_keys(self.data, (self.inputs, self.labels))
        shape, _ = self.data.examples[self.labels]
        if len(shape) > 1 or 0 in shape:
            raise UsageError(f'{self.labels!r} of one example has shape {shape}', 'task regress takes a number or a vector')
        if any(not _is_number(name) for name in self.data.class_names or ()):
            named = ', '.join((self.data.class_names or ())[:3])
            raise UsageError(f'{self.labels!r} holds classes ({named}), not numbers', 'use task=classify')
        if self.loss_function not in REGRESSION_LOSSES:
            raise UsageError(
                f'loss_function {self.loss_function!r} does not exist', nearest(self.loss_function, REGRESSION_LOSSES)
            )
        if not 0 < self.huber_delta < float('inf'):
            raise UsageError(f'huber_delta is {self.huber_delta}, outside (0, inf)', 'try huber_delta=1.0')
        object.__setattr__(self, 'metrics', make(self.metrics, VALUE_METRICS, self.num_outputs, self.labels))

    @property
    def num_outputs(self) -> int:
        """One output for each number of a target."""
        shape, _ = self.data.examples[self.labels]
        return shape[0] if shape else 1

    def terms(self, outputs: jax.Array, batch: Batch) -> Terms:
        """'loss' of predictions (B, K)."""
        error = REGRESSION_LOSSES[self.loss_function]
        if self.loss_function == 'huber':
            error = functools.partial(error, delta=self.huber_delta)
        mask = batch['mask']
        outputs = unmasked(outputs, mask)
        errors = jnp.mean(error(outputs, targets(batch, self.labels)), axis=-1)  # (B,)
        if 'mix_label' in batch:  # mixup, cutmix: the loss against both targets, as in classification
            share, others = unmasked(batch['mix_weight'], mask), jnp.mean(error(outputs, targets(batch, 'mix_label')), axis=-1)
            errors = share * errors + (1 - share) * others
        return {'loss': weighted(errors, mask)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
