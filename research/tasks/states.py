"""Metrics as mergeable states: what a metric is, and the arithmetic that all of them share.

Shape letters: B batch, K classes or outputs.

On the device a batch becomes a small state of sums; on the host states are merged in float64 and turned into numbers at the
end, so batch size, padding and devices cannot change a result. 7 of 10 right and 1 of 2 right give (7 + 1) / (10 + 2):

    state = metric.merge(metric.batch(outputs_1, batch_1), metric.batch(outputs_2, batch_2))
    metric.compute(state)                                                           # {'accuracy': 0.6667}

No metric hides a failure: NaN outputs or labels that are no class make it NaN. So does the absence of any example.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from research.tasks.losses import in_range, unmasked

State = Any  # a pytree of arrays
Result = dict[str, float | list]


class Metric(Protocol):
    """One evaluation metric, possibly with several results."""

    def batch(self, outputs: Any, batch: Mapping[str, Any]) -> State:
        """The state of one batch with what the task predicts, float32 (B, K) say; can be jitted. Masked rows do not count."""
        ...

    def merge(self, a: State, b: State) -> State:
        """The state of two disjoint sets of examples together; on the host, in float64."""
        ...

    def compute(self, state: State) -> Result:
        """The results by name: numbers, or lists with one number per class."""
        ...


class Additive:
    """A metric whose states are merged by adding them."""

    def merge(self, a: State, b: State) -> State:
        """Leaf by leaf a + b, float64."""
        return jax.tree.map(lambda x, y: np.asarray(x, np.float64) + np.asarray(y, np.float64), a, b)


def checked(outputs: jax.Array, batch: Mapping[str, Any], labels: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits (B, K), labels (B,) and weights (B,) float32 that are safe to count with.

    The weight is the mask; NaN, with label and logits 0, where the label is no class or a logit is NaN.
    """
    mask = jnp.asarray(batch['mask'], jnp.float32)
    logits, classes = unmasked(outputs, mask), unmasked(batch[labels], mask)
    sound = in_range(classes, logits.shape[-1]) & ~jnp.isnan(logits).any(-1)
    return jnp.where(sound[:, None], logits, 0.0), jnp.where(sound, classes, 0), jnp.where(sound, mask, jnp.nan)


def ratio(numerator: Any, denominator: Any, empty: float) -> np.ndarray:
    """numerator / denominator elementwise in float64; `empty` where the denominator is zero. NaN stays NaN."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(denominator.shape, empty), where=denominator != 0)


def as_float64(state: State) -> State:
    """A state from the device or the host with its arrays as float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), state)
