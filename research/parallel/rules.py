"""Partition rules: from named-leaf rules to the sharding of every leaf of a state.

    shardings(mesh, [('.*/kernel', (None, 'data')), ('.*', ())], abstract_state)

A spec is a tuple of mesh axis names or None, one for each leading dimension of the leaf; `()` is replicated.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.core import leaves
from research.core.errors import UsageError


def shardings(mesh: Mesh, rules: leaves.Rules, abstract: Any) -> Any:
    """The NamedSharding of each leaf of `abstract` (a tree of shapes).

    Raises:
      UsageError: a leaf without a rule, a rule without a leaf, an axis that the mesh does not have, a spec longer than the
        leaf's rank, or a dimension that its axis does not divide.
    """
    indices = leaves.match([(pattern, i) for i, (pattern, _) in enumerate(rules)], abstract, 'config.parallel.rules')
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, index: _sharding(mesh, rules[index][1], leaf.shape, leaves.name(path)), abstract, indices
    )


def _sharding(mesh: Mesh, spec: tuple, shape: tuple[int, ...], name: str) -> NamedSharding:
    axes = dict(mesh.shape)
    unknown = [axis for axis in spec if axis is not None and axis not in axes]
    if unknown or len(spec) > len(shape):
        raise UsageError(
            f'config.parallel.rules: {spec} does not fit {name} of shape {shape}',
            f'give at most {len(shape)} of None and {", ".join(map(repr, axes))}',
        )
    for axis, size in zip(spec, shape, strict=False):
        if axis is not None and size % axes[axis]:
            raise UsageError(
                f'config.parallel.rules: {axis!r} has {axes[axis]} devices, which do not divide {name} of shape {shape}',
                'partition another dimension, or leave this leaf replicated with ()',
            )
    return NamedSharding(mesh, PartitionSpec(*spec))
