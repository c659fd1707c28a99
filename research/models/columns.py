"""The columns of a table as vectors: numbers that may be missing, and categories.

Shape letters: B batch, F columns of numbers, G columns of categories, E width of an embedding.

    x = (2.0, nan)       NumericTokens(E) gives w_1 * 2.0 + b_1 for the first column and m_2 for the second, each (E,)
    filled(x)            2.0, 0.0, 0.0, 1.0: a missing number is 0 and has its indicator set

A category is a code: 0 for a missing or unknown value, which has an embedding of its own in every column, and 1, 2, ... for
those of the training split (`encode_categories`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.core.errors import UsageError


def check_columns(inputs: jax.Array, categories: jax.Array | None, cardinalities: tuple[int, ...]) -> None:
    """Raises a UsageError unless `inputs` are columns (B, F) and `categories` (B, G) those that `cardinalities` describe."""
    if inputs.ndim != 2:
        raise UsageError(f'a model of columns reads numbers (B, F), not {inputs.shape}', "set config.task.inputs='numeric'")
    found = 0 if categories is None else categories.shape[-1]
    if found != len(cardinalities):
        raise UsageError(
            f'the batch has {found} columns of categories, and the data set describes {len(cardinalities)}',
            'add encode_categories to config.data.transforms, or set DataSet.cardinalities of your own source',
        )


def filled(x: jax.Array) -> jax.Array:
    """(B, F) with NaN -> (B, 2 F): the numbers with 0 where they are missing, then 1 where they are missing and else 0."""
    missing = jnp.isnan(x)
    return jnp.concatenate([jnp.where(missing, 0, x), missing.astype(x.dtype)], axis=1)  # (B, 2F)


class NumericTokens(nn.Module):
    """A vector for each column of numbers: x * weight + bias, or `missing` where x is NaN; (B, F) -> (B, F, E).

    Gorishniy et al. 2021, section 3.3; the vector of a missing value is ours.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.width)
        weight, bias, missing = (self.param(name, spread(self.width), shape) for name in ('weight', 'bias', 'missing'))
        known = ~jnp.isnan(x)[..., None]  # (B, F, 1)
        numbers = jnp.where(known, x[..., None], 0).astype(weight.dtype)  # (B, F, 1); a NaN here would poison the gradient
        return jnp.where(known, numbers * weight + bias, missing)  # (B, F, E)


class CategoryTokens(nn.Module):
    """A vector for each column of codes, from one table of all columns' values plus a bias of the column; (B, G) -> (B, G, E).

    A code beyond its column's cardinality reads another column's row, or NaN behind the last.
    """

    cardinalities: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, codes: jax.Array) -> jax.Array:
        table = self.param('embedding', spread(self.width), (sum(self.cardinalities), self.width))
        bias = self.param('bias', spread(self.width), (len(self.cardinalities), self.width))
        offsets = np.cumsum((0, *self.cardinalities[:-1]))  # (G,)
        return jnp.take(table, codes + offsets, axis=0, mode='fill') + bias  # (B, G, E)


def spread(width: int) -> Any:
    """The paper's initialiser: uniform in +-1 / sqrt(width)."""
    bound = width**-0.5

    def initialise(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialise
