"""Packing: whole documents side by side in rows, with segments so that none sees another.

Shape letters: n documents, P pieces, R rows, B rows of a block, W = length + 1 width of a row.

    config.data.transforms = ['pack(length=256)']     # 'tokens', 'segment', 'position', each (257,) int32

A document is `bos`, its tokens, `eos`. 'segment' numbers the documents of a row 1, 2, ... (0: padding), 'position' counts from
0 in each. With length 7 the documents of 3, 6 and 4 tokens lie in rows of 8 as

    tokens    a a a a a a . .    b b b b c c c .        the longest first: 6 leaves room for none, 4 + 3 share a row
    segment   1 1 1 1 1 1 0 0    1 1 1 1 2 2 2 0
    position  0 1 2 3 4 5 0 0    0 1 2 3 0 1 2 0

A document longer than a row is cut into pieces that overlap by one token, so each of its tokens but the first is predicted
once; every piece is a segment of its own and its positions begin at 0 (a learned table of positions need not be longer than a
row). Pieces go where they fit best, the longest first (best-fit decreasing: Ding et al., "Fewer truncations improve language
modeling", 2024, section 3): an index from rows to pieces is made once, a row is a function of its number, and so resuming is
exact.
"""

import logging

import numpy as np

from research.core.errors import UsageError
from research.data import token_table
from research.data.mixture import map_source
from research.data.sequences import Transform
from research.data.source import Block, DataSet, Source
from research.data.token_table import TokenTable, tokenise, tokenizer_of

log = logging.getLogger(__name__)


def pack(*, length: int = 256, text: str = 'text') -> Transform:
    """Documents packed into rows of `length` + 1 tokens: 'tokens', 'segment', 'position'.

    Args:
      length: T, the tokens that a model sees.
      text: the key of the text.

    Raises:
      UsageError: (when applied) no tokenizer, no such text, or no document of at least two tokens.
    """

    def transform(dataset: DataSet) -> DataSet:
        tokenizer = tokenizer_of(dataset, 'pack')
        before, after = token_table.beginning(tokenizer), token_table.ending(tokenizer)
        fill = token_table.padding(tokenizer)

        def packed(source: Source) -> Source:
            return Packed(tokenise(source, text, tokenizer, before, after), length, fill)

        return dataset.map(lambda source: map_source(packed, source))

    return transform


class Packed:
    """Rows of a table's documents.

    Attributes:
      efficiency: the share of the rows' places that hold tokens.
    """

    def __init__(self, table: TokenTable, length: int, fill: int):
        if length < 1:
            raise UsageError(f'pack(length={length}) has no room for a target', 'choose length >= 1')
        self.table, self.width, self._fill = table, length + 1, fill
        starts, sizes = cut(table.offsets[:-1], table.lengths, length)
        if not len(sizes):
            raise UsageError('no document of a split has two tokens', 'give longer documents')
        rows = best_fit(sizes, self.width)
        order = np.argsort(rows, kind='stable')
        self._starts, self._sizes = starts[order], sizes[order]  # (P,) by row
        self._first = np.cumsum([0, *np.bincount(rows)])  # (R + 1,): row r holds the pieces first[r] ... first[r + 1] - 1
        self.efficiency = float(sizes.sum() / (len(self) * self.width))
        log.info(
            'packed %d documents into %d rows of %d: %.1f %% full',
            len(table.lengths),
            len(self),
            self.width,
            100 * self.efficiency,
        )

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, indices: np.ndarray) -> Block:
        counts = self._first[np.asarray(indices) + 1] - self._first[indices]  # (B,) pieces of each row
        pieces = ranges(self._first[indices], counts)
        sizes = self._sizes[pieces]
        ends = np.cumsum(sizes)
        row = np.repeat(np.arange(len(counts)), counts)
        first_of_row = np.cumsum(counts) - counts
        begins = ends - sizes - (ends - sizes)[first_of_row][row]  # of each piece in its row
        places = ranges(row * self.width + begins, sizes)
        shape = (len(counts), self.width)  # (B, W)
        block = {key: np.zeros(shape, np.int32) for key in ('tokens', 'segment', 'position')} | {
            'tokens': np.full(shape, self._fill, np.int32)
        }
        block['tokens'].reshape(-1)[places] = self.table.tokens[ranges(self._starts[pieces], sizes)]
        block['segment'].reshape(-1)[places] = np.repeat(1 + np.arange(len(row)) - first_of_row[row], sizes)
        block['position'].reshape(-1)[places] = ranges(np.zeros_like(sizes), sizes)
        return block

    def keys(self) -> np.ndarray:
        """A hash of each row, (R,) uint64."""
        return token_table.row_keys(self.table.address, len(self))

    def labels(self) -> None:
        """Rows of several documents have no class."""
        return


def cut(offsets: np.ndarray, lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, sizes), each (P,): documents as pieces of at most length + 1 tokens that overlap by one.

    Documents of fewer than two tokens have no target and are left out.
    """
    kept = lengths >= 2
    offsets, lengths = offsets[kept], lengths[kept]
    counts = np.maximum(1, -(-(lengths - 1) // length))
    shifts = ranges(np.zeros_like(counts), counts) * length
    return np.repeat(offsets, counts) + shifts, np.minimum(length + 1, np.repeat(lengths, counts) - shifts)


def best_fit(sizes: np.ndarray, width: int) -> np.ndarray:
    """The row of each piece, (P,) int64: the longest first, each into the row that it fills best, else into a new one."""
    rows = np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind='stable')
    whole = int((sizes == width).sum())
    rows[order[:whole]] = np.arange(whole)
    open_rows: list[list[int]] = [[] for _ in range(width + 1)]  # by the room that is left
    rooms, count = 0, whole  # bit r of `rooms`: some open row has room r
    for piece, size in zip(order[whole:].tolist(), sizes[order[whole:]].tolist(), strict=True):
        fitting = rooms >> size << size
        if fitting:
            room = (fitting & -fitting).bit_length() - 1  # the smallest
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            row, room, count = count, width, count + 1
        rows[piece] = row
        open_rows[room - size].append(row)
        rooms |= 1 << (room - size)
    return rows


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers starts[i], starts[i] + 1, ... counts[i] of them, for all i in a row, (sum of counts,) int64."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)
