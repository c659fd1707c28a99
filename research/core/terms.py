"""Terms: every loss and metric is a pair (sum, weight), never a mean; the mean is taken once, at the end.

So gradient accumulation, padding, device count and host count cannot change a result: two microbatches with 3 and 1 valid
examples and mean losses 0.2 and 1.0 give (0.6 + 1.0) / (3 + 1) = 0.4, not (0.2 + 1.0) / 2 = 0.6.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Terms = dict[str, tuple[jax.Array, jax.Array]]


@jax.tree_util.register_pytree_node_class
class Packed(Mapping[str, tuple[Any, Any]]):
    """Terms in one array (n, 2) of n names: a step hands out, and a log step fetches, one array in place of 2 n scalars."""

    def __init__(self, names: tuple[str, ...], array: Any):
        self.names, self.array = names, array

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        if name not in self.names:
            raise KeyError(name)
        total, weight = self.array[self.names.index(name)]
        return total, weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def tree_flatten(self) -> tuple[tuple[Any], tuple[str, ...]]:
        """For jax: the array, and the names."""
        return (self.array,), self.names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], arrays: tuple[Any]) -> 'Packed':
        """For jax: the terms again."""
        return cls(names, *arrays)


def pack(terms: Terms) -> Packed:
    """Terms, of scalars all, in one array of float32."""
    pairs = [jnp.stack([jnp.asarray(x, jnp.float32) for x in term]) for term in terms.values()]
    return Packed(tuple(terms), jnp.stack(pairs))  # (n, 2)


def fetched(packs: Sequence[Packed]) -> np.ndarray:
    """The numbers of k >= 1 packed terms of the same n names, (k, n, 2) float64, when all are done.

    Raises:
      ValueError: their names differ.
    """
    if any(terms.names != packs[0].names for terms in packs):
        raise ValueError(f'terms differ from step to step: {sorted({terms.names for terms in packs})}')
    arrays = [terms.array for terms in packs]
    jax.block_until_ready(arrays[-1])  # first: who reads one after the other is woken for each
    if all(device.platform == 'cpu' for device in arrays[0].devices()):
        return np.stack([np.asarray(array) for array in arrays]).astype(np.float64)  # in place: a tenth of the time
    return np.stack(jax.device_get(arrays)).astype(np.float64)


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
