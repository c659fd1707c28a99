"""Bad records: what of the data cannot be read is named, and stops the run or is skipped, up to a stated share.

Shape letters: n records of a source, B indices of one block.

    config.data.on_bad_record = 'stop'      # the default: 'pets/train/dog/7.jpg, record 41: cannot be decoded: ...', code 74
    config.data.on_bad_record = 'skip'      # such a record is a row of zeros with 'bad' True, and the feed gives it mask 0
    config.data.max_bad_share = 0.01        # of 2000 records of a split 20 may be bad; the 21st ends the run

A batch keeps its size and its order, so nothing moves: a step's batch is a function of the step and of the files alone, and a
resumed run sees the same one. Which records were bad is written down (`BadRecords`), so it counts the same too.

Text that is packed or cut into windows is read before there are rows: a bad document gives no tokens there, and no row is
masked for it. A bad record keeps its place in its split, in a data budget and in every count of examples.
"""

import contextlib
import functools
import lzma
import pathlib
import struct
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from research.core import files
from research.core.errors import StorageError, UsageError
from research.core.journal import Journal
from research.data.source import Block, Shapes, Source, shapes_of

BAD = 'bad'  # the key of a batch that tells which rows could not be read
FIX = "restore the file, or config.data.on_bad_record='skip' leaves such records out"
# What readers of files raise on damage. An OSError is their word for it too, then without a number of the system's.
DAMAGE = (
    ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
    lzma.LZMAError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
TOLD = 5  # new bad records that a person hears of; all are written down
READ = 4096  # records that are read at once for their labels
TRIES = 1000  # records that are looked at for the shape of a good one


class BadRecordError(StorageError):
    """A record cannot be read.

    Attributes:
      shard: the file that it is in.
      record: its number in the file, or in the split where the file is one record.
      reason: what is wrong with it.
    """

    def __init__(self, shard: object, record: int, reason: str, fix: str = FIX):
        super().__init__(f'{shard}, record {record}: {reason}', fix)
        self.shard, self.record, self.reason = str(shard), int(record), reason

    def bare(self) -> 'BadRecordError':
        """The same without traceback and cause, which would keep the blocks of their frames in memory."""
        return BadRecordError(self.shard, self.record, self.reason, self.fix)


@contextlib.contextmanager
def reading(file: object, fix: str = 'fetch it again, or restore it') -> Iterator[None]:
    """Around the reading of a file that is of no use in parts.

    Raises:
      UsageError: it is damaged; it is named.
      OSError: the file system does not let it be read: the file may be sound.
    """
    try:
        yield
    except DAMAGE as error:
        raise UsageError(f'{file} is damaged: {reason_of(error)}', fix) from error


def reason_of(error: Exception) -> str:
    """Why a file cannot be read, in one line; raises the error itself where it is of the system and not of the file."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return str(error).partition('\n')[0] or type(error).__name__


class BadRecords:
    """The different bad records that a run has met, kept as JSON lines in `path` (None: in memory alone).

    Args:
      path: read if it is there, so that a resumed run goes on counting; new records are appended.
      share: of the records of a split that may be bad.
      process: each process of a run writes what it has read itself, and begins with what any of them knows.
      say: hears of the first `TOLD` new ones.
    """

    def __init__(
        self,
        path: pathlib.Path | None = None,
        share: float = 0.01,
        process: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ):
        self._say, self._told = say, 0
        self.share = share
        own = path if path is None or not process else path.with_suffix(f'.{process}{path.suffix}')
        self._journal = None if own is None else Journal(own)
        self._found: dict[str, set[tuple[str, int]]] = {}  # by split
        self._lock = threading.Lock()  # the prefetching thread and evaluation read at the same time
        for file in [] if path is None else sorted(path.parent.glob(f'{path.stem}*{path.suffix}')):
            for entry in filter(None, map(files.parse_line, file.read_bytes().splitlines(keepends=True))):
                if {'split', 'shard', 'record'} <= entry.keys():
                    self._found.setdefault(entry['split'], set()).add((entry['shard'], entry['record']))

    @property
    def count(self) -> int:
        """How many different records were bad so far, in all splits."""
        return sum(map(len, self._found.values()))

    def note(self, split: str, error: BadRecordError, total: int) -> None:
        """Counts a bad record of a split of `total` records, once.

        Raises:
          BadRecordError: more than `share` of the split are bad. It is raised for every further one, and after resuming too.
        """
        key = (error.shard, error.record)
        with self._lock:
            found = self._found.setdefault(split, set())
            if key not in found:
                found.add(key)
                self._told += 1
                if self._told <= TOLD:
                    more = '; no more are told of' if self._told == TOLD else ''
                    self._say(f'warning: {error.message}; it is left out{more}')
                if self._journal is not None:
                    entry = {'split': split, 'shard': error.shard, 'record': error.record, 'reason': error.reason}
                    self._journal.append(entry)
            count = len(found)
        if count > self.share * total:
            raise BadRecordError(
                error.shard,
                error.record,
                f'{error.reason}; with it {count} of {total} records of split {split!r} are bad, more than '
                f'config.data.max_bad_share={self.share}',
                'restore the files, or raise config.data.max_bad_share',
            )


class Skipping:
    """A source whose bad records are rows of zeros (empty text), marked in one more array: 'bad' (B,) bool.

    Args:
      source: raises `BadRecordError` where it cannot read a record.
      split: what the split is called.
      records: told of every bad one.
      total: the records of the whole split, of which `source` may be a part; None: those of `source`.
    """

    def __init__(self, source: Source, split: str, records: BadRecords, total: int | None = None):
        self.source, self.split, self.records = source, split, records
        self.total = len(source) if total is None else total
        self.overlapping = getattr(source, 'overlapping', False)  # as `Windows` may be
        self._errors: dict[int, BadRecordError] = {}  # of the records that need not be tried again

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray) -> Block:
        block, bad = self._read(self.source.__getitem__, np.asarray(indices))
        if bad.any() or block is None:
            block = filled(block, bad, spec_of(self.source) if block is None else shapes_of(block))
        if BAD in block:
            raise UsageError(f"the examples have a key {BAD!r}, which on_bad_record='skip' needs", 'give it another name')
        return {**block, BAD: bad}

    def keys(self) -> np.ndarray:
        """The hashes of the records, (n,) uint64."""
        return self.source.keys()

    def labels(self) -> np.ndarray | None:
        """The classes of the records, (n,); -1 where it cannot be read. None without classes."""
        try:
            return self.source.labels()
        except BadRecordError:
            return self._labels

    @functools.cached_property
    def _labels(self) -> np.ndarray:
        """The labels of the records that can be read; by the source's `label_block`, where it has one, without the rest."""
        own = getattr(self.source, 'label_block', None)
        read = (lambda indices: {'label': self.source[indices]['label']}) if own is None else own
        found = np.full(len(self), -1, np.int32)
        for start in range(0, len(self), READ):
            indices = np.arange(start, min(start + READ, len(self)))
            block, bad = self._read(read, indices)
            if block is not None:
                found[indices[~bad]] = block['label']
        return found

    def _read(self, read: Callable[[np.ndarray], Block], indices: np.ndarray) -> tuple[Block | None, np.ndarray]:
        """What `read` gives of the good ones of `indices` (B,) in their order (None: there are none), and which are bad."""
        bad = np.isin(indices, list(self._errors))
        block, errors = salvage(read, indices[~bad])
        self._errors |= errors
        bad |= np.isin(indices, list(errors))
        for index in np.unique(indices[bad]).tolist():
            self.records.note(self.split, self._errors[index], self.total)
        return block, bad


def salvage(read: Callable[[np.ndarray], Block], indices: np.ndarray) -> tuple[Block | None, dict[int, BadRecordError]]:
    """What `read` gives of the good ones of `indices` (B,), in their order (None: there are none), and the errors of others.

    By halves: one bad record among B costs about 3 B reads, and B bad ones 2 B.
    """
    if not len(indices):
        return None, {}
    try:
        return read(indices), {}
    except BadRecordError as error:
        if len(indices) == 1:
            return None, {int(indices[0]): error.bare()}
    half = len(indices) // 2
    (first, errors), (second, more) = salvage(read, indices[:half]), salvage(read, indices[half:])
    blocks = [block for block in (first, second) if block is not None]
    joined = {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]} if blocks else None
    return joined, errors | more


def filled(block: Block | None, bad: np.ndarray, shapes: Shapes) -> Block:
    """`block` with zeros (empty text) put in where `bad` (B,) is True; `block` holds the other rows, None if there are none."""
    result = {}
    for key, (shape, dtype) in shapes.items():
        result[key] = np.full((len(bad), *shape), '' if np.dtype(dtype).kind == 'O' else 0, dtype)  # (B, ...)
        if block is not None:
            result[key][~bad] = block[key]
    return result


def spec_of(source: Source) -> Shapes:
    """The (shape, dtype) of one example by key, from the first record that can be read.

    Raises:
      BadRecordError: none of the first `TRIES` can.
    """
    last: BadRecordError | None = None
    for index in range(min(len(source), TRIES)):
        try:
            return shapes_of(source[np.array([index])])
        except BadRecordError as error:
            last = error
    raise last or ValueError('a source without records has no shapes')
