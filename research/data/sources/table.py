"""Tables: CSV (plain or .gz) and Parquet, columns in, one target out.

Shape letters: n rows, F columns of numbers.

    age,dose,outcome            table(path='trial.csv', target='outcome').splits['all']
    61,0.5,cured                # 'features' float32 (n, 2), 'label' int32: cured 0, ill 1
    47,1.5,ill

    age,ward,outcome            table(path='ward.csv', target='outcome', typed=True).splits['all']
    61,east,cured               # 'numeric' float32 (n, 1): 61, nan; 'ward' str: 'east', ''; 'label'
    ,,ill
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from research.core.errors import UsageError, nearest
from research.data.bad_records import reading, reason_of
from research.data.source import ArraySource, DataSet

SPLITS = ('train', 'test', 'validation')
SUFFIXES = ('.csv', '.csv.gz', '.parquet')
MAX_INTEGER_CLASSES = 50  # an integer target with more different values is taken for a quantity
RESERVED = ('numeric', 'category', 'label', 'mask', 'id', 'epoch')  # keys of a batch that no column of text may have


def table(
    *,
    path: str,
    target: str,
    columns: tuple[str, ...] | None = None,
    classes: bool | None = None,
    typed: bool = False,
    categories: tuple[str, ...] = (),
) -> DataSet:
    """Rows of a table: 'features' float32 (n, F), 'label' int32 (n,) for classes or float32 (n,) for regression.

    With `typed`, columns may be text and values may be missing. Instead of 'features' there are 'numeric' float32 (n, F), NaN
    where a value is missing, and each column of text under its own name, '' where it is missing. The transforms `standardise`,
    `quantile_normalise` and `encode_categories` of config.data.transforms make of them what a model reads.

    Args:
      path: one file (split 'all'), or a folder with train.csv and test.csv or validation.csv (.csv.gz and .parquet alike).
      target: the column to predict.
      columns: the feature columns, in this order; None: all others in the first file's order. Booleans count as 0 and 1.
      classes: whether the target is a class. None: yes for text, booleans and integers of at most 50 different values.
        Class i is the i-th of the sorted values of the training table (of the only table).
      typed: keep numbers and text apart, as the training table (the only table) has them, and let values be missing.
      categories: with `typed`, columns that are read as text though they look like numbers, such as postal codes.

    Raises:
      UsageError: a file or column is missing, a feature is not a number or (unless `typed`) a value is missing, with their
        number, a class is not in the training table.
    """
    root = pathlib.Path(path).expanduser()
    files = _find_files(root)
    tables = {split: Table(file) for split, file in files.items()}
    first = next(iter(tables.values()))
    if columns is None:
        columns = tuple(name for name in first.names if name != target)
    if not columns or target in columns:
        raise UsageError(
            f'the features are {columns} and the target is {target!r}', 'name at least one feature, not the target'
        )
    labels, class_names = _labels(tables, target, classes)
    if typed:
        texts = _check_texts(first.texts(columns, categories))
        features = {split: Table(file, texts).typed(columns, texts) for split, file in files.items()}
    elif categories:
        raise UsageError(f'categories={categories} of a table that is not typed', 'set config.data.source.typed=True')
    else:
        features = {split: {'features': t.features(columns)} for split, t in tables.items()}
    label = None if class_names is None else 'label'
    splits = {split: ArraySource({**features[split], 'label': labels[split]}, label) for split in tables}
    return DataSet(root.name.split('.')[0], dict(splits), class_names)


class Table:
    """One file as columns, those called `as_text` as text; every complaint names the file."""

    def __init__(self, file: pathlib.Path, as_text: Sequence[str] = ()):
        self.file, self._as_text = file, as_text
        self._table = _read(file, as_text)
        with reading(file):
            self.names: list[str] = self._table.column_names
            self._table.validate(full=True)  # of Parquet: text that is none, offsets that lead nowhere
        doubled = sorted({name for name in self.names if self.names.count(name) > 1})
        if doubled or not len(self._table):
            what = f'has the columns {", ".join(doubled)} twice' if doubled else 'has no rows'
            raise UsageError(f'{file} {what}', 'correct the table')

    def features(self, names: Sequence[str]) -> np.ndarray:
        """The columns `names` as float32 (n, F); none of their values is missing."""
        return self._numbers(names, _complaint, 'encode or fill them, or choose others with columns=(...)')

    def typed(self, names: Sequence[str], texts: Sequence[str]) -> dict[str, np.ndarray]:
        """'numeric' float32 (n, F), NaN where missing, of those columns that are no `texts`; and these by name as str."""
        numbers = [name for name in names if name not in texts]
        read = {name: [value or '' for value in self._column(name).to_pylist()] for name in names if name in texts}
        numeric = self._numbers(numbers, _complaint_if_typed, 'correct them, or choose others with columns=(...)')
        return {'numeric': numeric, **{name: np.array(column, object) for name, column in read.items()}}

    def texts(self, names: Sequence[str], also: Sequence[str]) -> list[str]:
        """Which of the columns `names` are text, and `also`.

        Raises:
          UsageError: one of `also` is not in `names`.
        """
        for name in also:
            if name not in names:
                raise UsageError(f'categories={also}, but {name!r} is no feature', nearest(name, names))
        return [name for name in names if name in also or _is_text(self._column(name))]

    def _numbers(self, names: Sequence[str], complaint_of: Callable[[Any], str | None], fix: str) -> np.ndarray:
        columns = [self._column(name) for name in names]
        found = {name: complaint_of(column) for name, column in zip(names, columns, strict=True)}
        wrong = [f'column {name!r} {complaint}' for name, complaint in found.items() if complaint]
        if wrong:
            more = f' ... ({len(wrong)} columns in all)' if len(wrong) > 5 else ''
            raise UsageError(f'{self.file}: {"; ".join(wrong[:5])}{more}', fix)
        read = [column.cast('float64', safe=False).to_numpy().astype(np.float32) for column in columns]
        return np.stack(read, axis=1) if read else np.zeros((len(self._table), 0), np.float32)  # (n, F)

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
        if name in self._as_text:
            return column.cast('string')
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


def _labels(tables: dict[str, Table], name: str, classes: bool | None) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    """The targets of each table, (n,) int32 classes or float32 quantities, and the names of the classes; None: quantities."""
    targets = {split: rows.target(name) for split, rows in tables.items()}
    known = next(iter(targets.values()))
    if classes is None:
        classes = known.dtype.kind in 'Ub' or (known.dtype.kind in 'iu' and len(np.unique(known)) <= MAX_INTEGER_CLASSES)
    values = np.unique(known) if classes else None
    labels = {split: _label(tables[split], name, found, values) for split, found in targets.items()}
    return labels, None if values is None else tuple(str(value) for value in values)


def _check_texts(texts: list[str]) -> list[str]:
    """Raises a UsageError if a column of text is called like another key of a batch."""
    clash = sorted(set(texts) & set(RESERVED))
    if clash:
        raise UsageError(f'a column of text is called {clash[0]!r}, which names something else in a batch', 'rename it')
    return texts


def _read(file: pathlib.Path, as_text: Sequence[str]) -> Any:
    """The pyarrow table of a file; pyarrow unpacks .gz itself. A CSV's columns `as_text` keep their characters: '007'."""
    from pyarrow import csv, parquet

    if not file.name.endswith(SUFFIXES):
        raise UsageError(f'{file} is not a table that can be read', f'known: {", ".join(SUFFIXES)}')
    try:
        options = csv.ConvertOptions(column_types=dict.fromkeys(as_text, 'string'))
        return parquet.read_table(file) if file.suffix == '.parquet' else csv.read_csv(file, convert_options=options)
    except (ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors and OSErrors
        raise UsageError(f'{file} cannot be read: {reason_of(error)}', 'correct the table') from error


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


def _complaint_if_typed(column: Any) -> str | None:
    """Why a column cannot be a typed table's numbers; None if it can."""
    if _is_text(column) or not _is_number(column):
        return _complaint(column)
    infinite = int(np.sum(np.abs(column.cast('float64', safe=False).to_numpy()) > np.finfo(np.float32).max))
    return f'is infinite, or too large for float32, in {infinite} of {len(column)} rows' if infinite else None


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
