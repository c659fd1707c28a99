"""Partial loading: weights by leaf name into a model that is not quite the one they come from, with a strict report.

Shape letters: P positions, D model, L layers.

    loaded, report = load_into(variables, weights, (('head/.*', False), ('.*', True)))

Every leaf whose first rule says True must be there with its shape; every weight that no leaf takes must be under a rule that
says False. What is missing, unexpected or mis-shaped is listed, all of it: nothing is left out, cast in shape or made up. Two
differences are known and bridged, and reported:

* Layers by name (`layers_0`, `layers_1`, ...) and layers stacked by nn.scan (`layers`, leading axis L) hold the same numbers.
* A table of learned positions (P, D) may have another length. Of text it is cut, or continued with copies of itself, which
  keeps the first P rows (Beltagy et al. 2020, "Longformer", section 5); of images, where a `patch` kernel lies beside it, it
  is resized as a square grid. A table of 4 rows a b c d becomes a b for 2 and a b c d a b for 6 positions.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from research.core import leaves
from research.core.errors import UsageError
from research.core.leaves import Rules
from research.models.vit import resize_positions
from research.train.adapters import factor_names

LAYER = re.compile(r'(.*/|)layers_(\d+)/(.*)')
STACK = re.compile(r'(.*/|)layers/(.*)')
POSITIONS = re.compile(r'(.*/|)(?:target_)?position/embedding')
EVERYTHING: Rules = (('.*', True),)
Weights = dict[str, Any]  # arrays by leaf name; leaves of collections other than 'params' as 'batch_stats/...'


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of each leaf and each weight, as lines of text by kind."""

    loaded: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()

    def text(self) -> str:
        """Everything, one line each."""
        kinds = ((name.replace('_', ' '), lines) for name, lines in vars(self).items())
        return ''.join(f'{kind:10}  {line}\n' for kind, lines in kinds for line in lines)

    def summary(self) -> str:
        """'34 leaves loaded, 1 of them resized, 2 fresh'."""
        resized = f', {len(self.resized)} of them resized' if self.resized else ''
        return f'{len(self.loaded)} leaves loaded{resized}, {len(self.fresh)} fresh'

    def check(self, what: str, fix: str, more: str = '') -> None:
        """Refuses weights that do not fit; `what` begins the message, `more` ends it.

        Raises:
          UsageError: a leaf is missing or mis-shaped, or a weight is unexpected.
        """
        kinds = {'missing': self.missing, 'unexpected': self.unexpected, 'mis-shaped': self.misshaped}
        found = [f'{len(lines)} {kind} ({_listed(lines)})' for kind, lines in kinds.items() if lines]
        if found:
            raise UsageError(f'{what} does not fit this model: {"; ".join(found)}{more}', fix)


def load_into(target: Any, weights: Mapping[str, Any], rules: Rules, resize: bool = True) -> tuple[Any, Report]:
    """`target` (any tree of arrays or shapes) with the leaves that `rules` want from `weights`, and what was done.

    Leaves come back as numpy arrays in the target's dtype; where the report tells of a problem, those leaves are the target's.

    Args:
      target: what is filled; flat dicts by name are trees too.
      weights: arrays by leaf name.
      rules: named-leaf rules over the names of both: True loads, False leaves the target's leaf as it is.
      resize: whether tables of positions are resized.

    Raises:
      UsageError: rules that do not fit the names, or a value that is not True or False.
    """
    for pattern, value in rules:
        if not isinstance(value, bool):
            raise UsageError(f'config.init_rules: {pattern!r} has {value!r}', 'give True (load) or False (fresh)')
    flat = leaves.flat(target)
    given = relaid(weights, flat)
    wanted = leaves.match(rules, dict.fromkeys([*flat, *given], 0), 'config.init_rules')
    taken, resized, misshaped = {}, [], []
    for name in (name for name in flat if wanted[name] and name in given):
        array, shape = given[name], tuple(flat[name].shape)
        fitted = fit_positions(name, array, shape, flat) if resize else None
        if tuple(array.shape) == shape:
            taken[name] = np.asarray(array, flat[name].dtype)
        elif fitted is not None:
            taken[name] = fitted.astype(flat[name].dtype)
            resized.append(f'{name} {tuple(array.shape)} -> {shape}')
        else:
            misshaped.append(f'{name} {tuple(array.shape)} for {shape}')
    report = Report(
        loaded=tuple(taken),
        resized=tuple(resized),
        fresh=tuple(name for name in flat if not wanted[name]),
        left_out=tuple(name for name in given if not wanted[name]),
        missing=tuple(name for name in flat if wanted[name] and name not in given),
        unexpected=tuple(name for name in given if wanted[name] and name not in flat),
        misshaped=tuple(misshaped),
    )
    return jax.tree.unflatten(jax.tree.structure(target), [taken.get(name, leaf) for name, leaf in flat.items()]), report


def relaid(weights: Mapping[str, Any], names: Mapping[str, Any]) -> Weights:
    """`weights` with their layers by name or stacked, whichever `names` has under the same path.

    Layers that are not 0, 1, ... without a gap, or differ in shape, cannot be stacked and keep their names, to be reported.
    """
    stacks = {match[1] for name in names if (match := STACK.fullmatch(name))}
    singles = {match[1] for name in names if (match := LAYER.fullmatch(name))}
    result: Weights = {}
    rows: dict[str, dict[int, Any]] = {}
    for name, array in weights.items():
        single, stack = LAYER.fullmatch(name), STACK.fullmatch(name)
        if single and single[1] in stacks:
            rows.setdefault(f'{single[1]}layers/{single[3]}', {})[int(single[2])] = array
        elif stack and stack[1] in singles:
            result |= {f'{stack[1]}layers_{i}/{stack[2]}': row for i, row in enumerate(array)}
        else:
            result[name] = array
    for name, layers in rows.items():
        whole = sorted(layers) == list(range(len(layers))) and len({array.shape for array in layers.values()}) == 1
        apart = {name.replace('layers/', f'layers_{i}/', 1): array for i, array in layers.items()}
        result |= {name: np.stack([layers[i] for i in sorted(layers)])} if whole else apart
    return result


def fit_positions(name: str, table: Any, shape: tuple[int, ...], names: Mapping[str, Any]) -> np.ndarray | None:
    """A table of positions (P, D) with another number of rows, `shape` (P', D); None where that is not what differs."""
    match = POSITIONS.fullmatch(name)
    if match is None or len(shape) != 2 or table.ndim != 2 or table.shape[1] != shape[1] or table.shape[0] == shape[0]:
        return None
    if f'{match[1]}patch/kernel' not in names:
        return np.resize(np.asarray(table), shape)  # repeats the rows in order, or cuts them
    tokens = int(f'{match[1]}class_token' in names)
    old, new = (math.isqrt(rows - tokens) for rows in (table.shape[0], shape[0]))
    if (old * old, new * new) != (table.shape[0] - tokens, shape[0] - tokens):
        return None  # not square: nobody knows the grid
    return np.asarray(resize_positions(table, (old, old), (new, new)))


def named(variables: Mapping[str, Any]) -> Weights:
    """The leaves of a model by name, as weights name them: wherever an adapter keeps them, and without its factors.

    Leaves of 'params' and 'base' go by their own name, those of other collections by 'collection/name'. A teacher is no part.
    """
    base = leaves.flat(variables.get('base', {}))
    factors = {factor for name in base for factor in factor_names(name)}
    own = {name: leaf for name, leaf in leaves.flat(variables['params']).items() if name not in factors}
    others = {k: tree for k, tree in variables.items() if k not in ('params', 'base', 'teacher')}
    return {**base, **own, **leaves.flat(others)}


def renewed(variables: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """`variables` with the leaves that `named` gave replaced by `weights`."""

    def tree_of(collection: str, tree: Any) -> Any:
        prefix = '' if collection in ('params', 'base') else f'{collection}/'
        return leaves.nested({name: weights.get(prefix + name, leaf) for name, leaf in leaves.flat(tree).items()})

    return {name: tree if name == 'teacher' else tree_of(name, tree) for name, tree in variables.items()}


def _listed(lines: tuple[str, ...], limit: int = 4) -> str:
    return ', '.join(lines[:limit]) + (', ...' if len(lines) > limit else '')
