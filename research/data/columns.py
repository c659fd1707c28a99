"""Transforms of a table's columns, learnt from the training split alone: numbers to one scale, text to codes.

Shape letters: n rows of the training split, B rows of a block, F columns of numbers, G columns of categories, Q quantiles.

    age  ward         after standardise and encode_categories, with the first two rows as training split:
    40   east         'numeric' -1.0, 'category' 1
    60   west                    1.0             2          mean 50, standard deviation 10; east 1, west 2
         north                   nan             0          a missing number stays NaN; a missing or new category is 0

A transform maps one data set to another. It changes what is read, not which rows there are: every row keeps the hash of its
raw values, so the splits stay as they are.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from research.core.errors import UsageError, nearest
from research.data.bad_records import BAD
from research.data.mixture import map_source
from research.data.source import Block, DataSet, Source

Transform = Callable[[DataSet], DataSet]
BLOCK = 65536  # rows that are read at once


class Mapped:
    """The rows of `source`, each block of them changed by `function`."""

    def __init__(self, source: Source, function: Callable[[Block], Block]):
        self.source, self.function = source, function

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray) -> Block:
        return self.function(self.source[indices])

    def keys(self) -> np.ndarray:
        """The hashes of the raw rows, (n,) uint64."""
        return self.source.keys()

    def labels(self) -> np.ndarray | None:
        """The classes of the rows, (n,)."""
        return self.source.labels()


def standardise(*, key: str = 'numeric') -> Transform:
    """(x - mean) / standard deviation of each column of `key` (n, F), float32; a constant column becomes 0. NaN stays NaN.

    Mean and standard deviation (of the population) are those of the training rows in which the column is not missing.
    """

    def transform(data: DataSet) -> DataSet:
        known = _numbers(data.splits['train'], key)  # (n, F)
        mean, deviation = np.nanmean(known, 0), np.nanstd(known, 0)  # (F,)
        scale = np.where(deviation > 0, deviation, 1.0)
        return _map_numbers(data, key, lambda x: (x - mean) / scale)

    return transform


def quantile_normalise(*, key: str = 'numeric', quantiles: int = 1000) -> Transform:
    """Maps each column of `key` (n, F) monotonically so that its training rows are standard normal, float32. NaN stays NaN.

    By way of the empirical distribution at `quantiles` Q levels, linear between them; values beyond the training rows' range
    become about -5.2 and 5.2 (scikit-learn's `QuantileTransformer`). It bears outliers and skew; Gorishniy et al. 2021 (arXiv:
    2106.11959), section 4.2, do the same.
    """
    if quantiles < 2:
        raise UsageError(f'quantile_normalise.quantiles is {quantiles}, but must be at least 2', 'leave it at 1000')

    def transform(data: DataSet) -> DataSet:
        from sklearn.preprocessing import QuantileTransformer  # takes a second to import

        known = _numbers(data.splits['train'], key)  # (n, F)
        levels = min(quantiles, len(known))
        fitted = QuantileTransformer(n_quantiles=levels, output_distribution='normal', subsample=len(known))
        fitted.fit(known)
        return _map_numbers(data, key, lambda x: np.asarray(fitted.transform(x)))

    return transform


def encode_categories(*, columns: tuple[str, ...] | None = None, min_count: int = 1) -> Transform:
    """Replaces columns of text by 'category' (n, G) int32 codes, 1, 2, ... in the order of the sorted training values.

    0 stands for a missing value (''), one that the training split has not, and one that it has less than `min_count` times.
    With min_count=1 a model sees 0 in training only where values are missing: raise it where new values are to be expected, so
    that it learns what to make of them.

    Args:
      columns: the columns, in this order; None: all that are text.
      min_count: rows of the training split that a value needs for a code of its own.

    Raises:
      UsageError: there is no such column.
    """

    def transform(data: DataSet) -> DataSet:
        chosen = _text_columns(data.splits['train'], columns)
        values = {name: _values(data.splits['train'], name, min_count) for name in chosen}

        def encode(block: Block) -> Block:
            codes = np.stack([_codes(block[name], known) for name, known in values.items()], axis=1)  # (B, G)
            return {**{name: column for name, column in block.items() if name not in values}, 'category': codes}

        cardinalities = tuple(len(known) + 1 for known in values.values())
        mapped = data.map(lambda source: map_source(lambda part: Mapped(part, encode), source))
        return dataclasses.replace(mapped, cardinalities=cardinalities)

    return transform


def _column(source: Source, key: str) -> np.ndarray:
    """The column or columns `key` of all rows of a source that can be read, (n, ...)."""
    starts = range(0, len(source), BLOCK)
    blocks = [source[np.arange(start, min(start + BLOCK, len(source)))] for start in starts]
    return np.concatenate([block[key][~block[BAD]] if BAD in block else block[key] for block in blocks])


def _numbers(source: Source, key: str) -> np.ndarray:
    """The columns `key` of the training rows as float64 (n, F), NaN where missing; none of them is missing everywhere."""
    first = source[np.array([0])]
    numbers = [name for name, column in first.items() if column.ndim == 2 and column.size and column.dtype.kind in 'fiu']
    if key not in numbers:
        raise UsageError(f'the examples have no columns of numbers under {key!r}', nearest(key, numbers))
    known = _column(source, key).astype(np.float64)  # (n, F)
    empty = np.flatnonzero(np.isnan(known).all(0))
    if len(empty):
        raise UsageError(
            f'column {empty[0]} of {key!r} is missing in all {len(known)} training rows',
            'leave it out, or train on more rows',
        )
    return known


def _map_numbers(data: DataSet, key: str, function: Callable[[np.ndarray], np.ndarray]) -> DataSet:
    """The data set with `function` applied to `key` (B, F) in float64; the result is float32."""

    def apply(block: Block) -> Block:
        return {**block, key: function(block[key].astype(np.float64)).astype(np.float32)}

    return data.map(lambda source: map_source(lambda part: Mapped(part, apply), source))


def _text_columns(source: Source, names: Sequence[str] | None) -> list[str]:
    """The columns of text called `names`; all of them for None."""
    first = source[np.array([0])]
    texts = [name for name, column in first.items() if column.dtype == object]
    for name in texts if names is None else names:
        if name not in texts:
            raise UsageError(f'encode_categories: there is no column of text {name!r}', nearest(name, texts))
    chosen = list(texts if names is None else names)
    if 'category' in first or not chosen:
        without = 'columns=() names no column' if names is not None else 'the examples have no columns of text'
        what = 'the columns are encoded already' if 'category' in first else without
        raise UsageError(f'encode_categories: {what}', 'leave it out, or name all columns in one encode_categories')
    return chosen


def _values(source: Source, name: str, min_count: int) -> np.ndarray:
    """The sorted values of a column of text that occur at least `min_count` times and are not missing."""
    values, counts = np.unique(_column(source, name).astype(np.str_), return_counts=True)
    return values[(counts >= min_count) & (values != '')]


def _codes(column: np.ndarray, values: np.ndarray) -> np.ndarray:
    """1 + the place of each entry of a column (B,) in the sorted `values`, 0 for one that is not there; int32."""
    if not len(values):
        return np.zeros(len(column), np.int32)
    texts = column.astype(np.str_)
    places = np.minimum(np.searchsorted(values, texts), len(values) - 1)
    return np.where(values[places] == texts, places + 1, 0).astype(np.int32)
