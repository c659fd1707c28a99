"""Classification: one of K classes for each example, by cross-entropy or focal loss, optionally weighted by class.

Shape letters: B batch, K classes.

    task = Classify(model=CNN, data=spec, dtype=jnp.bfloat16, class_weights='balanced', metrics=('accuracy', 'f1'))

With 30 training examples of class 0 and 10 of class 1, 'balanced' weights are 40 / (2 * 30) = 0.667 and 40 / (2 * 10) = 2.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import UsageError
from research.core.terms import Terms, weighted
from research.tasks.base import Batch, Keys, Supervised, Variables, check_keys
from research.tasks.losses import cross_entropy, unmasked
from research.tasks.metrics import CLASS_METRICS, make
from research.tasks.states import Metric


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Classify(Supervised):
    """Predicts the class of each example; outputs are logits (B, K). See `cross_entropy` for the loss of one example.

    The weight of an example in the term 'loss' is its mask times the weight of its class, so the mean divides by the sum of
    the weights, as PyTorch's `CrossEntropyLoss`. (Under label smoothing the whole loss of an example carries its label's
    weight; PyTorch weighs the smoothed part by each class.) Evaluation has the same loss. 'accuracy' is never class-weighted.

    A batch that holds 'mix_label' (B,) int and 'mix_weight' (B,) in [0, 1] (mixup, cutmix) has w * loss(label) +
    (1 - w) * loss(mix_label), and likewise for weights and accuracy.

    Attributes:
      inputs: the key of the batch that the model reads.
      labels: the key of the batch that holds the classes, (B,) int in [0, K); any other gives a NaN loss.
      label_smoothing: share of the target spread evenly over all classes, in [0, 1).
      focal_gamma: exponent of the focal loss, >= 0; 0 is cross-entropy, 2 the paper's choice.
      class_weights: one weight per class, 'balanced' for n / (K * count of the class), or None for 1 each.
      metrics: names of metrics, see `metrics.CLASS_METRICS`.
      test_time_flip: evaluation averages the logits of an image (H, W, C) and of its mirror image, for twice the time.

    Raises:
      UsageError: the data have no classes or not these keys, or a value is out of range.
    """

    inputs: str = 'image'
    labels: str = 'label'
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    class_weights: tuple[float, ...] | str | None = None
    metrics: tuple[str, ...] | dict[str, Metric] = ('accuracy',)
    test_time_flip: bool = False

    def __post_init__(self):
        if not self.data.class_names:
            raise UsageError('task classify needs classes, and this data set has none', "use task.name='regress'")
        check_keys(self.data, (self.inputs, self.labels))
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f'label_smoothing is {self.label_smoothing}, outside [0, 1)', 'try label_smoothing=0.1')
        if not 0 <= self.focal_gamma < float('inf'):
            raise UsageError(
                f'focal_gamma is {self.focal_gamma}, outside [0, inf)', 'try focal_gamma=2.0, or 0 for cross-entropy'
            )
        if self.test_time_flip and len(shape := self.data.examples[self.inputs][0]) != 3:
            raise UsageError(f'test_time_flip mirrors images, not inputs of shape {shape}', 'set task.test_time_flip=false')
        _ = self.weight_of_class  # raises on weights that do not fit
        object.__setattr__(self, 'metrics', make(self.metrics, CLASS_METRICS, self.num_outputs, self.labels))

    @property
    def num_outputs(self) -> int:
        """One logit for each class."""
        return len(self.data.class_names or ())

    @functools.cached_property
    def weight_of_class(self) -> np.ndarray:
        """The weight of each class, (K,) float32."""
        if self.class_weights is None:
            return np.ones(self.num_outputs, np.float32)
        if self.class_weights == 'balanced':
            return balanced(self.data.class_counts, self.num_outputs)
        return given(self.class_weights, self.num_outputs)

    def apply(
        self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool, method: str | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """As `Supervised.apply`; in evaluation with `test_time_flip`, the mean of the outputs of two views."""
        outputs, state = super().apply(variables, batch, rngs, train, method)
        if self.test_time_flip and not train and method is None:
            mirrored = {**batch, self.inputs: jnp.flip(batch[self.inputs], -2)}  # along W
            outputs = (outputs + super().apply(variables, mirrored, rngs, train)[0]) / 2
        return outputs, state

    def terms(self, outputs: jax.Array, batch: Batch) -> Terms:
        """'loss' and 'accuracy' of logits (B, K)."""
        mask = batch['mask']
        logits = unmasked(outputs, mask)
        loss, weight, correct = self._against(unmasked(batch[self.labels], mask), logits)
        if 'mix_label' in batch:
            share = unmasked(batch['mix_weight'], mask)
            others = self._against(unmasked(batch['mix_label'], mask), logits)
            loss, weight, correct = (
                share * one + (1 - share) * other for one, other in zip((loss, weight, correct), others, strict=True)
            )
        return {'loss': (weighted(loss, mask)[0], weighted(weight, mask)[0]), 'accuracy': weighted(correct, mask)}

    def _against(self, labels: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """By example, (B,): the weighted loss, its weight, and whether the largest logit is the label's."""
        weight = jnp.asarray(self.weight_of_class)[labels]
        loss = cross_entropy(logits, labels, self.label_smoothing, self.focal_gamma)
        return weight * loss, weight, (jnp.argmax(logits, -1) == labels).astype(jnp.float32)


def balanced(counts: tuple[int, ...] | None, num_classes: int) -> np.ndarray:
    """n / (K * counts) for `counts` (K,) of n examples in all, as scikit-learn's `compute_class_weight`; float32.

    Raises:
      UsageError: there are no counts, or a class has no examples.
    """
    if counts is None or len(counts) != num_classes or 0 in counts:
        raise UsageError(
            f"class_weights='balanced' needs training examples of all {num_classes} classes, the counts are {counts}",
            f'give {num_classes} weights as numbers, or more training data',
        )
    return (sum(counts) / (num_classes * np.asarray(counts, np.float64))).astype(np.float32)


def given(weights: tuple[float, ...] | str, num_classes: int) -> np.ndarray:
    """`weights` (K,) as float32.

    Raises:
      UsageError: they are not K finite numbers >= 0, not all zero.
    """
    if isinstance(weights, str):
        raise UsageError(f'class_weights is {weights!r}', f"give 'balanced', None or {num_classes} numbers")
    if len(weights) != num_classes:
        raise UsageError(f'class_weights has {len(weights)} values for {num_classes} classes', 'give one for each class')
    values = np.asarray(weights, np.float32)
    if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        raise UsageError(f'class_weights is {weights}', 'give finite numbers >= 0, not all of them 0')
    return values
