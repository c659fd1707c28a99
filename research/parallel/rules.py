"""Partition rules: from named-leaf rules to the sharding of every leaf of a state.

    shardings(mesh, [('.*/kernel', (None, 'data')), ('.*', ())], abstract_state)

A spec is a tuple of mesh axis names or None, one for each leading dimension of the leaf; `()` is replicated.

Where the config gives no rules and the mesh has an axis 'model', the model's own rules hold: the constant `PARTITION_RULES` in
the module of its class. With ('.*up/kernel', (None, 'model')) and four devices along 'model', a kernel (64, 256) lies as
(64, 64) on each, and so do its moments in the optimiser. Last, `spread` (config.parallel.fsdp) cuts what is large along 'data'.
"""

import math
import sys
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.core import leaves
from research.core.errors import UsageError
from research.parallel.mesh import DATA_AXIS, MODEL_AXIS, data_size

# Smaller leaves are not worth the exchange that gathers them again before they are used.
SPREAD_MINIMUM = 2**14  # elements


def partition(mesh: Mesh, rules: leaves.Rules | None, module: Any, abstract: Any, fsdp: bool = False) -> Any:
    """The NamedSharding of each leaf of an abstract state, by the config's `rules` or else the rules of `module`'s class.

    Raises:
      UsageError: see `shardings` and `own_shardings`.
    """
    if rules is None and mesh.shape[MODEL_AXIS] > 1:
        layout = own_shardings(mesh, own_rules(module), abstract)
    else:
        layout = shardings(mesh, (('.*', ()),) if rules is None else rules, abstract)
    return spread(mesh, layout, abstract, SPREAD_MINIMUM) if fsdp else layout


def shardings(mesh: Mesh, rules: leaves.Rules, abstract: Any) -> Any:
    """The NamedSharding of each leaf of `abstract` (a tree of shapes) by a config's rules.

    Raises:
      UsageError: a leaf without a rule, a rule without a leaf, an axis that the mesh does not have, a spec longer than the
        leaf's rank, or a dimension that its axis does not divide.
    """
    indices = leaves.match([(pattern, i) for i, (pattern, _) in enumerate(rules)], abstract, 'config.parallel.rules')
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, index: _sharding(mesh, rules[index][1], leaf.shape, leaves.name(path)), abstract, indices
    )


def own_rules(module: Any) -> leaves.Rules:
    """The `PARTITION_RULES` of the module in which the class of `module`, or its nearest base class with rules, is defined.

    Raises:
      UsageError: there are none.
    """
    for cls in type(module).__mro__:
        rules = getattr(sys.modules.get(cls.__module__), 'PARTITION_RULES', None)
        if rules is not None:
            return rules
    raise UsageError(
        f'config.parallel.model_axis needs partition rules, and model {type(module).__name__} has none',
        'set config.parallel.rules, or define PARTITION_RULES beside the model',
    )


def own_shardings(mesh: Mesh, rules: leaves.Rules, abstract: Any) -> Any:
    """As `shardings`, for a model's own rules, which must serve every size of it and every optimiser.

    So a rule may decide nothing, a dimension that its axis does not divide stays whole, and a leaf that is shorter than the
    spec of its name (the row and column means that Adafactor keeps of a kernel) is replicated.

    Raises:
      UsageError: in the end nothing is partitioned.
    """
    indices = leaves.match([(pattern, i) for i, (pattern, _) in enumerate(rules)], abstract, 'PARTITION_RULES', True)
    specs = jax.tree.map(lambda leaf, index: _fitting(mesh, rules[index][1], leaf.shape), abstract, indices)
    found = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    if all(sharding.is_fully_replicated for sharding in jax.tree.leaves(found)):
        raise UsageError(
            f"config.parallel.model_axis={mesh.shape[MODEL_AXIS]}: the model's own rules partition nothing of this size",
            'choose widths, heads or a vocabulary that it divides, or model_axis=1',
        )
    return found


def spread(mesh: Mesh, layout: Any, abstract: Any, minimum: int) -> Any:
    """`layout` with every large leaf cut along 'data' too, at the longest dimension that is whole and divisible.

    This is ZeRO stage 3 (Rajbhandari et al. 2020, section 5.3), left to XLA: it gathers each parameter where it is used. The
    leading axis of layers that a scan stacks stays whole, since every device runs every layer. Leaves of fewer than `minimum`
    elements stay as they are, and so do those that are cut along 'data' already.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, where, leaf: _spread(mesh, where, leaf.shape, leaves.name(path), minimum), layout, abstract
    )


def _spread(mesh: Mesh, where: NamedSharding, shape: tuple[int, ...], name: str, minimum: int) -> NamedSharding:
    spec = [*where.spec, *[None] * (len(shape) - len(where.spec))]
    first = int(leaves.is_stacked(name))
    free = [i for i in range(first, len(shape)) if spec[i] is None and shape[i] % data_size(mesh) == 0]
    if not free or DATA_AXIS in spec or math.prod(shape) < minimum:
        return where
    spec[max(free, key=lambda i: shape[i])] = DATA_AXIS
    return NamedSharding(mesh, PartitionSpec(*spec))


def _fitting(mesh: Mesh, spec: tuple, shape: tuple[int, ...]) -> PartitionSpec:
    """`spec` where it fits a leaf of `shape`."""
    if len(spec) > len(shape):
        return PartitionSpec()
    pairs = zip(spec, shape, strict=False)
    return PartitionSpec(*(axis if axis is not None and size % mesh.shape[axis] == 0 else None for axis, size in pairs))


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
