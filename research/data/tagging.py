"""The transform from tagged words to rows of tagged tokens.

Shape letters: n sentences, B rows of a block, T length, W words of the longest sentence.

    config.data.source = 'conll(path="conll2003")'
    config.data.tokenizer = 'wordpiece'
    config.data.transforms = ['tag_rows(length=128)']

`Peter plays` with the tags 2 0 becomes, where the word pieces are peter, play and ##s, between cls and sep:

    'tokens'   cls peter play ##s sep pad        'tag'  -1 2 0 -1 -1 -1        'segment'  1 1 1 1 1 0
"""

from collections.abc import Callable

import numpy as np

from research.core.errors import UsageError, nearest
from research.data.bad_records import BAD
from research.data.mixture import map_source
from research.data.source import Block, DataSet, Source, Tokenizer
from research.data.token_table import TokenTable, padding, tokenizer_of

READ = 1024  # sentences that are read and tokenised at once


def tag_rows(*, length: int = 128, words: str = 'words', tags: str = 'tags', cut: bool = False) -> Callable[[DataSet], DataSet]:
    """Each sentence as one row: 'tokens', 'segment' and 'tag' (length,); other keys stay.

    Every word but the first is tokenised with a space before it, as in running text. Its tag stands at its first token; all
    other tokens, the special ones and padding have -1. A word that the tokenizer makes nothing of becomes its unknown token.

    Args:
      length: T; with `cls` before and `sep` behind the sentence where the tokenizer has them.
      words: the key of the text, words with one space between them; it is replaced.
      tags: the key of the tags (W,) int, -1 behind the last word; it is replaced.
      cut: whether a longer sentence is cut. The words that are cut off are not counted by any metric.

    Raises:
      UsageError: (when applied) no tokenizer, no such keys, a sentence that is too long, a word without a token.
    """

    def transform(dataset: DataSet) -> DataSet:
        tokenizer = tokenizer_of(dataset, 'tag_rows')
        return dataset.map(lambda source: map_source(lambda part: TagRows(part, tokenizer, length, words, tags, cut), source))

    return transform


class TagRows:
    """The sentences of `source` as rows of tokens and tags; see `tag_rows`."""

    def __init__(self, source: Source, tokenizer: Tokenizer, length: int, words: str, tags: str, cut: bool):
        self.source, self.length, self._replaced = source, length, (words, tags)
        self._before, self._after = ([] if t is None else [t] for t in (tokenizer.cls, tokenizer.sep))
        self._tokens, self._tags = tokenise_words(source, tokenizer, words, tags)
        self._fill = padding(tokenizer)
        room, longest = length - len(self._before + self._after), int(self._tokens.lengths.max())
        too_long = int((self._tokens.lengths > room).sum())
        if room < 1 or (too_long and not cut):
            raise UsageError(
                f'{too_long} of {len(source)} sentences are longer than length={length}',
                f'set length={longest + length - room}, or cut=True to lose their ends',
            )
        self._lengths = np.minimum(self._tokens.lengths, room)  # (n,)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray) -> Block:
        block = {key: column for key, column in self.source[indices].items() if key not in self._replaced}
        starts, lengths, start = self._tokens.offsets[indices], self._lengths[indices], len(self._before)
        shape = (len(lengths), self.length)
        tokens, tags = np.full(shape, self._fill, np.int32), np.full(shape, -1, np.int32)  # (B, T)
        tokens[:, :start] = self._before
        tokens[:, start:], _ = self._tokens.rows(starts, lengths, self.length - start, self._fill)
        tags[:, start:], _ = self._tags.rows(starts, lengths, self.length - start, -1)
        sizes = lengths + len(self._before + self._after)  # (B,)
        if self._after:
            tokens[np.arange(len(sizes)), sizes - 1] = self._after[0]
        return block | {'tokens': tokens, 'tag': tags, 'segment': (np.arange(self.length) < sizes[:, None]).astype(np.int32)}

    def keys(self) -> np.ndarray:
        """The keys of the sentences, (n,) uint64."""
        return self.source.keys()

    def labels(self) -> None:
        """A sentence has no class."""
        return


def tokenise_words(source: Source, tokenizer: Tokenizer, words: str, tags: str) -> tuple[TokenTable, TokenTable]:
    """The tokens of all sentences and, place by place, their tags: -1 for a token that is not the first of its word.

    A bad record has no words.
    """
    tokens, placed, lengths = [], [], [np.zeros(1, np.int64)]
    for start in range(0, len(source), READ):
        block = source[np.arange(start, min(start + READ, len(source)))]
        for key in (words, tags):
            if key not in block:
                raise UsageError(f'the examples have no {key!r}', nearest(key, block))
        is_bad = block.get(BAD, np.zeros(len(block[words]), bool))  # (B,)
        sentences = [[] if lost else text.split(' ') for text, lost in zip(block[words], is_bad, strict=True)]
        known = (block[tags] >= 0) & ~is_bad[:, None]  # (B, W)
        for sentence, count in zip(sentences, known.sum(1), strict=True):
            if len(sentence) != count:
                raise UsageError(f'{" ".join(sentence)!r} has {len(sentence)} words and {count} tags', 'correct the data')
        pieces = encode_words(tokenizer, sentences)
        borders = np.cumsum([0, *map(len, pieces)])  # of the words
        tokens += pieces
        placed.append(np.full(borders[-1], -1, np.int32))
        placed[-1][borders[:-1]] = block[tags][known]  # row by row, as the words
        lengths.append(np.diff(borders[np.cumsum(known.sum(1))], prepend=0))
    offsets = np.cumsum(np.concatenate(lengths))
    none = np.zeros(0, np.int32)
    return TokenTable(np.concatenate([none, *tokens]), offsets, ''), TokenTable(np.concatenate([none, *placed]), offsets, '')


def encode_words(tokenizer: Tokenizer, sentences: list[list[str]]) -> list[np.ndarray]:
    """The tokens of each word of all sentences, at least one for each word."""
    spaced = [f' {word}' if place else word for sentence in sentences for place, word in enumerate(sentence)]
    pieces = tokenizer.encode(spaced)
    for place, ids in enumerate(pieces):
        if not len(ids):
            if tokenizer.unknown is None:
                raise UsageError(f'the tokenizer makes nothing of the word {spaced[place]!r}', 'take one with an unknown token')
            pieces[place] = np.array([tokenizer.unknown], np.int32)
    return pieces
