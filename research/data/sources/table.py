"""Tables: CSV (plain or .gz) and Parquet, numeric columns in, one target out.

Shape letters: n rows, F feature columns.

    age,dose,outcome            table(path='trial.csv', target='outcome').splits['all']
    61,0.5,cured                # 'features' float32 (n, 2), 'label' int32: cured 0, ill 1
    47,1.5,ill
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.core.errors import UsageError, nearest
from research.data.source import ArraySource, DataSet

SPLITS = ('train', 'test', 'validation')
SUFFIXES = ('.csv', '.csv.gz', '.parquet')
MAX_INTEGER_CLASSES = 50  # an integer target with more different values is taken for a quantity


def table(*, path: str, target: str, columns: tuple[str, ...] | None = None, classes: bool | None = None) -> DataSet:
    """Rows of a table: 'features' float32 (n, F), 'label' int32 (n,) for classes or float32 (n,) for regression.

    Args:
      path: one file (split 'all'), or a folder with train.csv and test.csv or validation.csv (.csv.gz and .parquet alike).
      target: the column to predict.
      columns: the feature columns, in this order; None: all others in the first file's order. Booleans count as 0 and 1.
      classes: whether the target is a class. None: yes for text, booleans and integers of at most 50 different values.
        Class i is the i-th of the sorted values of the training table (of the only table).

    Raises:
      UsageError: a file or column is missing, a feature is not a number, values are missing (with their number), a class is
        not in the training table.
    """
    root = pathlib.Path(path).expanduser()
    tables = {split: Table(file) for split, file in _find_files(root).items()}
    first = next(iter(tables.values()))
    if columns is None:
        columns = tuple(name for name in first.names if name != target)
    if not columns or target in columns:
        raise UsageError(
            f'the features are {columns} and the target is {target!r}', 'name at least one feature, not the target'
        )
    targets = {split: t.target(target) for split, t in tables.items()}
    features = {split: t.features(columns) for split, t in tables.items()}
    known = targets[next(iter(targets))]
    if classes is None:
        classes = known.dtype.kind in 'Ub' or (known.dtype.kind in 'iu' and len(np.unique(known)) <= MAX_INTEGER_CLASSES)
    values = np.unique(known) if classes else None
    labels = {split: _label(tables[split], target, found, values) for split, found in targets.items()}
    splits = {
        split: ArraySource({'features': features[split], 'label': labels[split]}, label='label' if classes else None)
        for split in tables
    }
    class_names = None if values is None else tuple(str(value) for value in values)
    return DataSet(root.name.split('.')[0], dict(splits), class_names)


class Table:
    """One file as columns; every complaint names the file."""

    def __init__(self, file: pathlib.Path):
        self.file = file
        self._table = _read(file)
        self.names: list[str] = self._table.column_names
        doubled = sorted({name for name in self.names if self.names.count(name) > 1})
        if doubled or not len(self._table):
            what = f'has the columns {", ".join(doubled)} twice' if doubled else 'has no rows'
            raise UsageError(f'{file} {what}', 'correct the table')

    def features(self, names: Sequence[str]) -> np.ndarray:
        """The columns `names` as float32 (n, F)."""
        columns = [self._column(name) for name in names]
        found = {name: _complaint(column) for name, column in zip(names, columns, strict=True)}
        wrong = [f'column {name!r} {complaint}' for name, complaint in found.items() if complaint]
        if wrong:
            more = f' ... ({len(wrong)} columns in all)' if len(wrong) > 5 else ''
            raise UsageError(
                f'{self.file}: {"; ".join(wrong[:5])}{more}', 'encode or fill them, or choose others with columns=(...)'
            )
        return np.stack([column.cast('float64').to_numpy().astype(np.float32) for column in columns], axis=1)  # (n, F)

    def target(self, name: str) -> np.ndarray:
        """The column `name` as (n,) numbers, booleans or text."""
        column = self._column(name)
        if _is_text(column):
            missing = sum(not value for value in column.to_pylist())
        else:
            missing = _missing(column)
        if missing:
            raise UsageError(
                f'{self.file}: the target {name!r} is missing in {missing} of {len(column)} rows', 'remove these rows'
            )
        if not _is_text(column) and not _is_number(column):
            raise UsageError(f'{self.file}: the target {name!r} is {column.type}', 'use numbers, booleans or text')
        return np.array(column.to_pylist(), np.str_) if _is_text(column) else column.to_numpy()

    def _column(self, name: str) -> Any:
        from pyarrow import types

        if name not in self.names:
            raise UsageError(f'{self.file} has no column {name!r}', nearest(name, self.names))
        column = self._table.column(name)
        if types.is_dictionary(column.type):  # Parquet's categories
            column = column.cast(column.type.value_type)
        return column.cast('float64') if types.is_decimal(column.type) else column


def _find_files(root: pathlib.Path) -> dict[str, pathlib.Path]:
    if root.is_file():
        return {'all': root}
    if not root.is_dir():
        raise UsageError(f'there is no file or folder {root}', 'correct path')
    candidates = {split: [root / f'{split}{suffix}' for suffix in SUFFIXES] for split in SPLITS}
    found = {split: [file for file in files if file.is_file()] for split, files in candidates.items()}
    several = [files for files in found.values() if len(files) > 1]
    if not found['train'] or several:
        what = f'has both {several[0][0].name} and {several[0][1].name}' if several else 'has no train.csv'
        raise UsageError(
            f'{root} {what}', f'it must hold one train, and may hold one test and validation ({", ".join(SUFFIXES)})'
        )
    return {split: files[0] for split, files in found.items() if files}


def _read(file: pathlib.Path) -> Any:
    """The pyarrow table of a file; pyarrow unpacks .gz itself."""
    from pyarrow import csv, parquet

    if not file.name.endswith(SUFFIXES):
        raise UsageError(f'{file} is not a table that can be read', f'known: {", ".join(SUFFIXES)}')
    try:
        return parquet.read_table(file) if file.suffix == '.parquet' else csv.read_csv(file)
    except (ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors and OSErrors
        raise UsageError(f'{file} cannot be read: {error}', 'correct the table') from error


def _is_text(column: Any) -> bool:
    from pyarrow import types

    return types.is_string(column.type) or types.is_large_string(column.type)


def _is_number(column: Any) -> bool:
    from pyarrow import types

    return any(f(column.type) for f in (types.is_integer, types.is_floating, types.is_boolean, types.is_null))


def _missing(column: Any) -> int:
    """How many values are null, NaN or infinite."""
    from pyarrow import types

    finite = len(column)
    if types.is_floating(column.type):
        finite = int(np.isfinite(column.drop_null().to_numpy()).sum()) + column.null_count
    return len(column) - finite + column.null_count


def _complaint(column: Any) -> str | None:
    """Why a column cannot be a feature; None if it can."""
    rows = len(column)
    if _is_text(column):
        return f'holds text in {sum(not _reads_as_number(value) for value in column.to_pylist())} of {rows} rows'
    if not _is_number(column):
        return f'holds {column.type} in {rows} of {rows} rows'
    missing = _missing(column)
    return f'is missing or not finite in {missing} of {rows} rows' if missing else None


def _reads_as_number(text: str | None) -> bool:
    try:
        float(text or '')
    except ValueError:
        return False
    return True


def _label(rows: Table, name: str, found: np.ndarray, values: np.ndarray | None) -> np.ndarray:
    """Int32 numbers of the classes `values`, or float32 quantities if that is None."""
    if values is None:
        if found.dtype.kind == 'U':
            raise UsageError(f'{rows.file}: the target {name!r} is text', 'leave classes unset, or set it to True')
        return found.astype(np.float32)
    if values.dtype.kind == 'U':  # '1' in a column with other text is text; alone it was read as a number
        found = found.astype(np.str_)
    unseen = sorted({str(value) for value in found[~np.isin(found, values)]})
    if unseen:
        known = ', '.join(str(value) for value in values[:12])
        raise UsageError(
            f'{rows.file}: the target {name!r} has values that train has not: {", ".join(unseen[:5])}', f'known: {known}'
        )
    return np.searchsorted(values, found).astype(np.int32)
