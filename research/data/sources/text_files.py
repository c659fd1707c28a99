"""Text files: a folder of .txt or .jsonl files (or .gz of either), one example a document or a line.

    text_files(path='notes').splits['all'][np.array([0])]               # {'text': array(['Dear ...'], dtype=object)}
    text_files(path='corpus', pattern='*.jsonl.gz', field='body')       # the value of "body" of each line's JSON object
    text_files(path='books', split='line')                              # every line that is not blank is an example

Files called train.txt, test.txt and validation.txt (or val.txt; any of the endings) are splits; otherwise all files make one
split 'all'. Everything is held in memory: for more text than that, write token files and use `tokens_memmap`.
"""

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator

import numpy as np

from research.core.errors import UsageError, nearest
from research.data.source import ArraySource, DataSet

SPLITS = {'train': 'train', 'test': 'test', 'validation': 'validation', 'val': 'validation'}  # file name: split
UNITS = ('document', 'line')


def text_files(*, path: str, pattern: str = '**/*.txt', split: str = 'document', field: str = 'text') -> DataSet:
    """Documents or lines of text files in UTF-8: 'text' object (str). Blank ones are left out.

    Args:
      path: one file, or a folder.
      pattern: which files of the folder, '**' for all folders below; in the order of their names.
      split: an example is a whole file ('document'; of .jsonl each line is a document) or a 'line'.
      field: the key of the text in .jsonl.

    Raises:
      UsageError: no such file or folder, nothing matches, a file is not UTF-8 or not JSON, or a line lacks the field.
    """
    if split not in UNITS:
        raise UsageError(f'text_files(split={split!r}) is unknown', f'choose one of {", ".join(UNITS)}')
    root = pathlib.Path(path).expanduser()
    paths = sorted(p for p in root.glob(pattern) if p.is_file()) if root.is_dir() else [root]
    if not root.exists() or not paths:
        what = f'{root} holds no file {pattern!r}' if root.exists() else f'there is no file or folder {root}'
        raise UsageError(what, "give path a file or folder, and pattern such as '**/*.jsonl.gz'")
    stems = [p.name.split('.')[0] for p in paths]
    own = len(paths) > 1 and all(stem in SPLITS for stem in stems)
    texts: dict[str, list[str]] = {}
    for file, stem in zip(paths, stems, strict=True):
        texts.setdefault(SPLITS[stem] if own else 'all', []).extend(_documents(file, split, field))
    empty = [name for name, found in texts.items() if not found]
    if empty:
        raise UsageError(f'the files of split {empty[0]!r} in {root} hold no text', 'give files that do')
    return DataSet(root.resolve().name, {name: ArraySource({'text': as_column(found)}) for name, found in texts.items()})


def as_column(texts: list[str]) -> np.ndarray:
    """Texts as a column of a source, (n,) object."""
    column = np.empty(len(texts), object)
    column[:] = texts
    return column


def _documents(file: pathlib.Path, unit: str, field: str) -> Iterator[str]:
    """The documents or lines of one file that are not blank."""
    try:
        with gzip.open(file, 'rt', encoding='utf-8') if file.suffix == '.gz' else open(file, encoding='utf-8') as opened:
            if '.jsonl' in file.suffixes:
                documents = [_field(file, number, line, field) for number, line in enumerate(opened, 1) if line.strip()]
            else:
                documents = [opened.read()]
    except UnicodeDecodeError as error:
        raise UsageError(f'{file} is not UTF-8: {error.reason} at byte {error.start}', 'convert it') from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f'{file} cannot be unpacked: {error}', 'pack it again') from error
    parts = documents if unit == 'document' else [line for document in documents for line in document.splitlines()]
    return (part for part in parts if part.strip())


def _field(file: pathlib.Path, number: int, line: str, field: str) -> str:
    """The text in one line of a .jsonl file."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f'{file}:{number} is not JSON: {error.msg}', 'correct that line') from error
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        keys = sorted(key for key, value in record.items() if isinstance(value, str)) if isinstance(record, dict) else []
        raise UsageError(f'{file}:{number} has no text {field!r}', nearest(field, keys))
    return record[field]
