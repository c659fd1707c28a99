"""Terms: every loss and metric is a pair (sum, weight), never a mean; the mean is taken once, at the end.

So gradient accumulation, padding, device count and host count cannot change a result: two microbatches with 3 and 1 valid
examples and mean losses 0.2 and 1.0 give (0.6 + 1.0) / (3 + 1) = 0.4, not (0.2 + 1.0) / 2 = 0.6.
"""

import jax
import jax.numpy as jnp

Terms = dict[str, tuple[jax.Array, jax.Array]]


def weighted(values: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The term of per-example `values` (B, ...) under `weights` of the same shape: scalars (sum, weight) in float32.

    A value whose weight is zero is not looked at, so that NaN in a padded row cannot reach the sum.
    """
    weights = weights.astype(jnp.float32)
    values = jnp.where(weights > 0, values.astype(jnp.float32), 0.0)
    return jnp.sum(values * weights), jnp.sum(weights)


def add(a: Terms, b: Terms) -> Terms:
    """The terms of two disjoint sets of examples together."""
    return jax.tree.map(jnp.add, a, b)


def mean(term: tuple[jax.Array, jax.Array]) -> jax.Array:
    """sum / weight; NaN where nothing was weighed, never a made-up zero."""
    total, weight = term
    return total / weight
