"""Train, validation and test splits, and nested subsets of the training split: both by a stable hash of each example.

An example's place depends on its own bytes alone: adding data never moves an example from one split to another, and equal
examples fall into the same split, so an exact duplicate cannot leak.

A data budget takes the first k examples of one fixed order, so '5%' is inside '10%'. The order goes round the classes in
proportion to their size: the example of rank r among the c of its class has the position (r + 1/2) / c.
"""

import numpy as np

from research.core.durations import Duration
from research.core.errors import UsageError
from research.data.plan import mix
from research.data.source import DataSet, Source, select

SALT = {'split': 0x5BD1E995, 'budget': 0x9E3779B97F4A7C15}


def split(data: DataSet, validation: float, test: float) -> dict[str, Source]:
    """The splits 'train', 'validation' and 'test' of a data set: its own where it has them, else held out by hash.

    Args:
      data: a data set with splits 'train' (and 'test', 'validation'), or one split 'all'.
      validation: share of the training split held out for validation if the data set has none; 0: no such split.
      test: the same for the test split.

    Raises:
      UsageError: there is nothing to train on, or the examples that a hash would split overlap (windows of a stream).
    """
    own = dict(data.splits)
    train = own.pop('all' if 'all' in own else 'train', None)
    if train is None:
        raise UsageError(f'data set {data.name!r} has no training split, only {sorted(own)}', "it needs 'train' or 'all'")
    shares = {name: share for name, share in (('test', test), ('validation', validation)) if share and name not in own}
    if shares and getattr(train, 'overlapping', False):
        wanted, none = ' and '.join(shares), ' and '.join(f'config.data.{name}=0.0' for name in shares)
        raise UsageError(
            f'data set {data.name!r} has overlapping windows: split by hash, {wanted} would share tokens with train',
            f'set stride=length, give files of their own for {wanted}, or set {none}',
        )
    places = uniform(train.keys(), SALT['split'])
    start, chosen = 0.0, np.zeros(len(train), bool)
    for name, share in shares.items():
        inside = (places >= start) & (places < start + share)
        own[name], chosen, start = select(train, np.flatnonzero(inside)), chosen | inside, start + share
    own['train'] = select(train, np.flatnonzero(~chosen)) if shares else train
    empty = sorted(name for name, source in own.items() if len(source) == 0)
    if empty:
        raise UsageError(f'data set {data.name!r}: the split {empty[0]!r} is empty', 'give more data or a larger share')
    return own


def uniform(keys: np.ndarray, salt: int) -> np.ndarray:
    """A number in [0, 1) for each key (n,) uint64, independent for different salts."""
    return (mix(keys.astype(np.uint64) ^ mix(np.array([salt], np.uint64))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def subset(source: Source, budget: Duration | None, seed: int) -> Source:
    """The examples of `source` that a data budget buys; all of them without one.

    Raises:
      UsageError: the budget is larger than the source.
    """
    return source if budget is None else select(source, budget_indices(source, budget, seed))


def budget_indices(source: Source, budget: Duration, seed: int) -> np.ndarray:
    """The indices (m,), rising, of the examples that a data budget buys.

    Raises:
      UsageError: the budget is larger than the source.
    """
    count = max(1, round(len(source) * budget.amount / 100)) if budget.unit == '%' else int(budget.amount)
    if count > len(source):
        raise UsageError(
            f"config.data.budget='{budget}' is more than the {len(source)} training examples", 'lower it, or leave it out'
        )
    return np.sort(budget_order(source, seed)[:count])


def budget_order(source: Source, seed: int) -> np.ndarray:
    """The order (n,) in which a growing budget takes examples: random by hash, in proportion to the classes."""
    places = uniform(source.keys(), SALT['budget'] + seed)
    labels = source.labels()
    labels = np.zeros(len(source), np.int64) if labels is None or labels.dtype.kind == 'f' else labels
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    by_class = np.lexsort((places, classes))
    rank = np.empty(len(source), np.int64)
    rank[by_class] = np.arange(len(source)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.lexsort((places, (rank + 0.5) / sizes[classes]))
