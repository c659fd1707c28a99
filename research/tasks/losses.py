"""Losses of single examples; a task weighs and sums them into terms.

Shape letters: B batch, K classes or outputs.

With logits (0, 0, 0) for three classes, cross-entropy is log 3 = 1.0986 for any label, and the focal loss with gamma 2 is
(1 - 1/3)^2 * 1.0986 = 0.4883.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def unmasked(values: Any, mask: Any) -> jax.Array:
    """`values` (B, ...) with zeros in the rows where `mask` (B,) is zero.

    Padding may hold anything, NaN too. It must go before a formula is applied: a NaN that is only multiplied by zero, or
    chosen away afterwards, still poisons the gradient.
    """
    values = jnp.asarray(values)
    keep = jnp.asarray(mask) > 0
    return jnp.where(keep.reshape(keep.shape + (1,) * (values.ndim - 1)), values, jnp.zeros((), values.dtype))


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0, focal_gamma: float = 0.0) -> jax.Array:
    """Cross-entropy or focal loss in nats, (B,) float32: sum_k q_k (1 - p_k)^gamma (-log p_k).

    p is the softmax of the logits; q puts 1 - s on the label and spreads s evenly over all K classes, the label's among them
    (label smoothing: Szegedy et al. 2016, "Rethinking the Inception architecture", section 7). With s = 0 this is the focal
    loss of Lin et al. 2017, "Focal loss for dense object detection", equation 4; with gamma = 0, cross-entropy.

    Args:
      logits: (B, K) float.
      labels: (B,) int. A label outside [0, K) gives NaN, as loss and as gradient: nothing can be raised inside jit.
      label_smoothing: s, in [0, 1).
      focal_gamma: gamma >= 0; the larger, the less the well-classified examples count.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    values = -log_p  # (B, K)
    if focal_gamma:
        # The floor keeps the slope of (1 - p)^gamma finite at p = 1 for gamma < 1; in float32, 1 - p is never between 0 and it.
        values *= jnp.maximum(-jnp.expm1(log_p), jnp.finfo(jnp.float32).tiny) ** focal_gamma
    num_classes = logits.shape[-1]
    at_label = jnp.take_along_axis(values, jnp.clip(labels, 0, num_classes - 1)[:, None], axis=-1)[:, 0]  # (B,)
    smoothed = at_label if not label_smoothing else (1 - label_smoothing) * at_label + label_smoothing * values.mean(-1)
    return smoothed * jnp.where(in_range(labels, num_classes), 1.0, jnp.nan)


def in_range(labels: jax.Array, num_classes: int) -> jax.Array:
    """Whether each label is a class, bool of the same shape."""
    return (labels >= 0) & (labels < num_classes)


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """(output - target)^2, without a factor of one half."""
    return jnp.square(outputs - targets)


def absolute_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """|output - target|."""
    return jnp.abs(outputs - targets)


def huber(outputs: jax.Array, targets: jax.Array, delta: float = 1.0) -> jax.Array:
    """e^2 / 2 for an error |e| <= delta, else delta (|e| - delta / 2): Huber 1964, "Robust estimation of a location ..."."""
    return optax.losses.huber_loss(outputs, targets, delta=delta)


REGRESSION_LOSSES: dict[str, Callable[..., jax.Array]] = {'mse': squared_error, 'mae': absolute_error, 'huber': huber}
