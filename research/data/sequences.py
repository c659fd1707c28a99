"""Transforms from text to rows of token ids: windows over a stream, padded rows, and pairs of padded rows.

Shape letters: n rows, B rows of a block, T length, S source length.

    config.data.tokenizer = 'byte'
    config.data.transforms = ['windows(length=256)']          # 'tokens' (257,): the model sees 256 and predicts 256
    config.data.transforms = ['pad(length=128)']              # 'tokens' (128,), 'segment' (128,) in {0, 1}, beside 'label'
    config.data.transforms = ['pairs(source_length=64, target_length=64)']

Every transform takes a data set and gives one whose examples are rows; a row is a function of its index, read in blocks. The
documents 'ab' and 'cde' under 'byte' (a = 97, eos = 258) are the stream 97 98 258 99 100 101 258; windows(length=3) has the
rows 97 98 258 99 and 99 100 101 258: the last token of a row is the first of the next, so every token but the first is
predicted once. `pack` (packing.py) keeps documents apart instead.
"""

from collections.abc import Callable

import numpy as np

from research.core.errors import UsageError
from research.data import token_table
from research.data.mixture import map_source
from research.data.source import Block, DataSet, Source, Tokenizer
from research.data.token_table import tokenise, tokenizer_of

Transform = Callable[[DataSet], DataSet]


def windows(*, length: int = 256, stride: int | None = None, text: str = 'text') -> Transform:
    """All documents of a split as one stream, `eos` behind each, cut into rows 'tokens' (length + 1,).

    Args:
      length: T, the tokens that a model sees.
      stride: from the beginning of one row to that of the next; None: `length`, every target once. The last row is moved back
        so that it ends with the stream: at most length - 1 targets are in two rows, none is lost.
      text: the key of the text.

    Raises:
      UsageError: (when applied) no tokenizer, no such text, or fewer tokens than one row.
    """

    def transform(dataset: DataSet) -> DataSet:
        tokenizer = tokenizer_of(dataset, 'windows')

        def window(source: Source) -> Source:
            table = tokenise(source, text, tokenizer, after=token_table.ending(tokenizer))
            return Windows(table.tokens, length, stride or length, table.address)

        return dataset.map(lambda source: map_source(window, source))

    return transform


def pad(*, length: int = 128, text: str = 'text', special: bool = True) -> Transform:
    """Each text as one row: 'tokens' (length,) and 'segment' (length,), 1 for tokens and 0 behind them; other keys stay.

    Args:
      length: T; longer texts are cut.
      text: the key of the text, which is replaced.
      special: put `cls` before and `sep` behind the text where the tokenizer has them (and leave room for them).

    Raises:
      UsageError: (when applied) no tokenizer or no such text.
    """

    def transform(dataset: DataSet) -> DataSet:
        tokenizer = tokenizer_of(dataset, 'pad')
        return dataset.map(lambda source: map_source(lambda part: Padded(part, tokenizer, length, text, special), source))

    return transform


def pairs(*, source_length: int = 64, target_length: int = 64, source: str = 'source', target: str = 'target') -> Transform:
    """Two texts as rows for an encoder and a decoder; other keys stay.

    'source' (S,) and 'source_segment': the tokens and `eos`. 'target' (T + 1,) and 'target_segment': `bos`, the tokens, `eos`,
    so that a decoder sees T of them and predicts T. A text that is cut has no `eos`: it does not end there.

    Args:
      source_length: S.
      target_length: T.
      source: the key of the text that is read.
      target: the key of the text that is written.

    Raises:
      UsageError: (when applied) no tokenizer, one without any token to begin a text with, or no such text.
    """

    def transform(dataset: DataSet) -> DataSet:
        tokenizer = tokenizer_of(dataset, 'pairs')
        if not token_table.beginning(tokenizer):
            raise UsageError("transform 'pairs' needs a token to begin with", 'choose a tokenizer with bos or cls')
        lengths = {source: source_length, target: target_length}
        return dataset.map(lambda data: map_source(lambda part: Pairs(part, tokenizer, lengths), data))

    return transform


class Windows:
    """Rows of `length` + 1 tokens of a flat array (N,), one every `stride` tokens.

    Raises:
      UsageError: fewer tokens than one row has, or a stride that leaves tokens out.
    """

    def __init__(self, tokens: np.ndarray, length: int, stride: int, address: str):
        if length < 1 or not 1 <= stride <= length:
            raise UsageError(
                f'windows(length={length}, stride={stride}) would leave tokens out', 'choose 1 <= stride <= length'
            )
        if len(tokens) < length + 1:
            raise UsageError(f'a split has {len(tokens)} tokens, fewer than a window of {length} + 1', 'lower length')
        self.tokens, self.length, self.stride, self.address = tokens, length, stride, address
        self.overlapping = stride < length  # rows share targets, so that no hash may split them
        self._last = len(tokens) - length - 1  # where the last row begins

    def __len__(self) -> int:
        return 1 + -(-self._last // self.stride)

    def __getitem__(self, indices: np.ndarray) -> Block:
        starts = np.minimum(np.asarray(indices) * self.stride, self._last)
        return {'tokens': self.tokens[starts[:, None] + np.arange(self.length + 1)].astype(np.int32)}  # (B, T + 1)

    def keys(self) -> np.ndarray:
        """A hash of each row's place in the stream, (n,) uint64."""
        return token_table.row_keys(self.address, len(self))

    def labels(self) -> None:
        """Rows of a stream have no class."""
        return


class Padded:
    """The examples of `source` with one text as a padded row."""

    def __init__(self, source: Source, tokenizer: Tokenizer, length: int, text: str, special: bool):
        self.source, self.length, self._text = source, length, text
        before = [tokenizer.cls] if special and tokenizer.cls is not None else []
        self._after = [tokenizer.sep] if special and tokenizer.sep is not None else []
        if length <= len(before) + len(self._after):
            raise UsageError(f'pad(length={length}) has no room for text between the special tokens', 'raise length')
        self._table = tokenise(source, text, tokenizer, before=before)
        self._fill = token_table.padding(tokenizer)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray) -> Block:
        block = {key: column for key, column in self.source[indices].items() if key != self._text}
        lengths = np.minimum(self._table.lengths[indices], self.length - len(self._after))
        tokens, real = self._table.rows(self._table.offsets[indices], lengths, self.length, self._fill)  # (B, T)
        if self._after:
            rows = np.arange(len(tokens))
            tokens[rows, lengths], real[rows, lengths] = self._after[0], True
        return block | {'tokens': tokens, 'segment': real.astype(np.int32)}

    def keys(self) -> np.ndarray:
        """The keys of the examples, (n,) uint64."""
        return self.source.keys()

    def labels(self) -> np.ndarray | None:
        """The classes of the examples, (n,)."""
        return self.source.labels()


class Pairs:
    """The examples of `data` with two texts as padded rows; `lengths`: S and T by the keys of the two texts."""

    def __init__(self, data: Source, tokenizer: Tokenizer, lengths: dict[str, int]):
        self.data, self._texts = data, list(lengths)
        (source, self.source_length), (target, self.target_length) = lengths.items()
        start, end = token_table.beginning(tokenizer), token_table.ending(tokenizer)
        self._source = tokenise(data, source, tokenizer, after=end)
        self._target = tokenise(data, target, tokenizer, before=start, after=end)
        self._fill = token_table.padding(tokenizer)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, indices: np.ndarray) -> Block:
        block = {key: column for key, column in self.data[indices].items() if key not in self._texts}
        for key, table, width in (
            ('source', self._source, self.source_length),
            ('target', self._target, self.target_length + 1),
        ):
            tokens, real = table.rows(table.offsets[indices], table.lengths[indices], width, self._fill)
            block |= {key: tokens, f'{key}_segment': real.astype(np.int32)}
        return block

    def keys(self) -> np.ndarray:
        """The keys of the examples, (n,) uint64."""
        return self.data.keys()

    def labels(self) -> np.ndarray | None:
        """The classes of the examples, (n,)."""
        return self.data.labels()
