"""Documents as one flat array of token ids with their borders: what windows, packed and padded rows are read from.

Shape letters: n documents, N tokens of all of them, B rows of a block, W width of a row.

    table = tokenise(source, 'text', tokenizer, after=[tokenizer.eos])
    table.tokens                                    # (N,) uint16 (uint32 for more than 65,536 ids)
    table.offsets                                   # (n + 1,): document i is tokens[offsets[i]:offsets[i + 1]]
    table.rows(table.offsets[[5, 2]], table.lengths[[5, 2]], width=8, fill=0)       # ids (2, 8) int32 and where they are real

Up to 16 MB the array is in memory. A larger one is written to the private cache folder, block by block, and mapped; it is
found again there by a digest of the texts and the fingerprint of the tokenizer, so the same run starts without tokenising.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from research.core import files
from research.core.errors import UsageError, nearest
from research.data.bad_records import BAD
from research.data.download import temporary_neighbour
from research.data.plan import mix
from research.data.source import DataSet, Source, Tokenizer

READ = 1024  # documents that are read and tokenised at once
MEMORY_LIMIT = 16 * 2**20  # bytes; what takes longer to make than to find again


@dataclasses.dataclass(frozen=True, eq=False)
class TokenTable:
    """Token ids of n documents, one after the other.

    Attributes:
      tokens: (N,) uint16 or uint32, in memory or mapped from a file.
      offsets: (n + 1,) int64, where each document begins, and N.
      address: a digest of what the tokens were made from.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    address: str

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (n,) int64."""
        return np.diff(self.offsets)

    def rows(self, starts: np.ndarray, lengths: np.ndarray, width: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
        """The `lengths` (B,) tokens from `starts` (B,) on, cut or filled to `width`: ids (B, W) int32, real (B, W) bool."""
        places = np.arange(width)
        real = places < lengths[:, None]  # (B, W)
        found = self.tokens[np.where(real, starts[:, None] + places, 0)]  # (B, W)
        return np.where(real, found, fill).astype(np.int32), real


def tokenise(
    source: Source, key: str, tokenizer: Tokenizer, before: Sequence[int] = (), after: Sequence[int] = ()
) -> TokenTable:
    """The tokens of all texts under `key` of a source, each text between the ids `before` and `after`; none of a bad record.

    Raises:
      UsageError: the examples hold no text under that key; a large array has no private folder to lie in.
    """
    bad = []
    contents = files.digest(_all_texts(source, key, bad))  # keys may hash another column
    address = files.digest([contents, tokenizer.fingerprint, repr((list(before), list(after))), *map(str, bad)])
    dtype = np.dtype(np.uint16 if tokenizer.vocabulary_size <= 2**16 else np.uint32)
    first, last = np.array(before, dtype), np.array(after, dtype)
    path = files.cache_folder('tokens') / address
    if (kept := _kept(path, dtype, address)) is not None:
        return kept
    lengths, held, size = [], [], 0
    with temporary_neighbour(path) as temporary, contextlib.ExitStack() as stack:
        file: BinaryIO | None = None
        for texts, is_bad in texts_of(source, key):
            encoded = [np.concatenate([first, ids.astype(dtype), last]) for ids in tokenizer.encode(texts)]
            encoded = [ids[:0] if lost else ids for ids, lost in zip(encoded, is_bad, strict=True)]
            lengths += [len(ids) for ids in encoded]
            held += encoded
            size += sum(ids.nbytes for ids in encoded)
            if size > MEMORY_LIMIT:
                file = file or stack.enter_context(_open_private(temporary))
                file.writelines(np.ascontiguousarray(ids).data for ids in held)
                held = []
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        if file is None:
            return TokenTable(np.concatenate([np.zeros(0, dtype), *held]), offsets, address)
        file.close()
        os.replace(temporary, path)
    with temporary_neighbour(_offsets_file(path)) as temporary:
        temporary.write_bytes(offsets.tobytes())
        os.replace(temporary, _offsets_file(path))
    return _mapped(path, dtype, address)


def texts_of(source: Source, key: str) -> Iterator[tuple[list[str], list[bool]]]:
    """The texts under `key` in blocks, and which of them belong to bad records (and are empty).

    Raises:
      UsageError: there is no such key, or it holds no text.
    """
    for start in range(0, len(source), READ):
        block = source[np.arange(start, min(start + READ, len(source)))]
        texts = sorted(name for name, column in block.items() if column.dtype == object)
        if key not in texts:
            raise UsageError(f'the examples have no text {key!r}', nearest(key, texts))
        yield block[key].tolist(), block[BAD].tolist() if BAD in block else [False] * len(block[key])


def _all_texts(source: Source, key: str, bad: list[int]) -> Iterator[str]:
    """The texts one by one; `bad` is given the places of the bad records."""
    count = 0
    for texts, is_bad in texts_of(source, key):
        bad += [count + place for place, lost in enumerate(is_bad) if lost]
        count += len(texts)
        yield from texts


def tokenizer_of(dataset: DataSet, transform: str) -> Tokenizer:
    """The data set's tokenizer.

    Raises:
      UsageError: it has none.
    """
    if dataset.tokenizer is None:
        raise UsageError(f'transform {transform!r} needs a tokenizer', "set config.data.tokenizer, e.g. 'byte' or 'bpe'")
    return dataset.tokenizer


def ending(tokenizer: Tokenizer) -> list[int]:
    """The token that ends a text: `eos`, else `sep`, else none."""
    return [token for token in (tokenizer.eos, tokenizer.sep) if token is not None][:1]


def beginning(tokenizer: Tokenizer) -> list[int]:
    """The token that begins a text: `bos`, else `cls`, else none."""
    return [token for token in (tokenizer.bos, tokenizer.cls) if token is not None][:1]


def padding(tokenizer: Tokenizer) -> int:
    """The id that fills a row: `pad`, else 0 (a filled place has segment 0, so no model sees what it holds)."""
    return 0 if tokenizer.pad is None else tokenizer.pad


def row_keys(address: str, count: int) -> np.ndarray:
    """A hash of each of `count` rows that are made from the tokens at `address`, (count,) uint64."""
    with np.errstate(over='ignore'):
        return mix(np.arange(count, dtype=np.uint64) + np.uint64(int(address[:16], 16)))


def _offsets_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f'{path.name}.offsets')  # written last: where it is, the tokens are complete


def _kept(path: pathlib.Path, dtype: np.dtype, address: str) -> TokenTable | None:
    """The tokens of an earlier run; None if there are none, or if they are damaged."""
    if not _offsets_file(path).is_file():
        return None
    try:
        table = _mapped(path, dtype, address)
    except (OSError, ValueError):
        return None
    return table if len(table.offsets) and table.offsets[-1] == len(table.tokens) else None


def _mapped(path: pathlib.Path, dtype: np.dtype, address: str) -> TokenTable:
    return TokenTable(np.memmap(path, dtype, 'r'), np.fromfile(_offsets_file(path), np.int64), address)


def _open_private(path: pathlib.Path) -> BinaryIO:
    """A file to write to, in a folder that only this user can write."""
    problem = files.problem_of_folder(path.parent)
    if problem is not None:
        raise UsageError(f'the tokens need a file: {problem}', 'or set FULCRUM_CACHE to a folder of your own')
    return open(path, 'wb')
