"""Sentences with a tag for each word, one word a line: CoNLL-2003 and its kin, and Universal Dependencies' .conllu.

    EU      NNP  B-NP  B-ORG            conll(path='train.txt').splits['all']
    rejects VBZ  B-VP  O                # 'words' 'EU rejects', 'tags' int32 (0, 2, ...) -1 behind the last word
                                        # class_names ('B-ORG', 'B-PER', 'O')
    Peter   NNP  B-NP  B-PER

Shape letters: n sentences, W words of the longest.
"""

import pathlib
import re
from collections.abc import Iterator

import numpy as np

from research.core.errors import UsageError
from research.data.source import ArraySource, DataSet, key_of

SPLITS = {  # word in a file's name: split
    'train': 'train',
    **dict.fromkeys(('dev', 'valid', 'validation', 'testa'), 'validation'),
    **dict.fromkeys(('test', 'testb'), 'test'),
}
Sentence = list[tuple[str, str]]


def conll(*, path: str, column: int | None = None, word_column: int | None = None) -> DataSet:
    """Sentences of words and tags: 'words' (n,) text, words with a space between them, and 'tags' (n, W) int32, -1 behind.

    Sentences are separated by empty lines. Lines that begin with -DOCSTART- are left out; so are, in files called .conllu,
    comments, ranges (`1-2`) and empty nodes (`1.1`). A space inside a word becomes U+00A0. Equal sentences have one key.

    Args:
      path: one file (split 'all'), or a folder with one file for each split, known by train, dev, valid, validation, testa,
        test or testb in its name (eng.testa, en_ewt-ud-train.conllu).
      column: where the tag is, from 0, or from the end if negative; None: the last, in .conllu the fourth (universal tag).
      word_column: likewise the word; None: the first, in .conllu the second.

    Raises:
      UsageError: a file is missing or is not UTF-8, a line has not these columns, or two files are of one split.
    """
    root = pathlib.Path(path).expanduser()
    found = {split: list(_sentences(file, column, word_column)) for split, file in _find_files(root).items()}
    empty = [split for split, sentences in found.items() if not sentences]
    if empty:
        raise UsageError(f'{root} holds no sentences for split {empty[0]!r}', 'correct path')
    class_names = tuple(sorted({tag for sentences in found.values() for sentence in sentences for _, tag in sentence}))
    return DataSet(root.stem, {split: Sentences(sentences, class_names) for split, sentences in found.items()}, class_names)


class Sentences(ArraySource):
    """Sentences in memory: 'words' and 'tags'. A sentence's key is that of its words, however long the others are."""

    def __init__(self, sentences: list[Sentence], class_names: tuple[str, ...]):
        number = {name: index for index, name in enumerate(class_names)}
        tags = np.full((len(sentences), max(len(sentence) for sentence in sentences)), -1, np.int32)  # (n, W)
        words = np.empty(len(sentences), object)
        for row, sentence in enumerate(sentences):
            words[row] = ' '.join(word for word, _ in sentence)
            tags[row, : len(sentence)] = [number[tag] for _, tag in sentence]
        super().__init__({'words': words, 'tags': tags})

    def keys(self) -> np.ndarray:
        """The hash of the words of each sentence, (n,) uint64."""
        return np.array([key_of(words) for words in self.arrays['words']], np.uint64)


def _find_files(root: pathlib.Path) -> dict[str, pathlib.Path]:
    if root.is_file():
        return {'all': root}
    if not root.is_dir():
        raise UsageError(f'there is no file or folder {root}', 'correct path')
    found: dict[str, pathlib.Path] = {}
    for file in sorted(p for p in root.iterdir() if p.is_file() and not p.name.startswith('.')):
        for split in {SPLITS[word] for word in re.split('[^a-z]+', file.name.lower()) if word in SPLITS}:
            if split in found:
                raise UsageError(f'{root} has both {found[split].name} and {file.name} for split {split!r}', 'remove one')
            found[split] = file
    if 'train' not in found:
        raise UsageError(f'{root} has no file with train in its name', 'give a file, or name the files train, dev and test')
    return found


def _sentences(file: pathlib.Path, column: int | None, word_column: int | None) -> Iterator[Sentence]:
    """The sentences of a file, none of them empty."""
    is_universal = file.suffix == '.conllu'
    columns = (
        (1 if is_universal else 0) if word_column is None else word_column,
        (3 if is_universal else -1) if column is None else column,
    )
    sentence: Sentence = []
    for number, line in enumerate([*_lines(file), ''], start=1):
        fields = line.split('\t') if is_universal else line.split()
        if not line.strip():
            if sentence:
                yield sentence
            sentence = []
        elif not (is_universal and not fields[0].isdigit()) and fields[0] != '-DOCSTART-':
            sentence.append(_word_and_tag(fields, columns, f'{file}:{number}'))


def _lines(file: pathlib.Path) -> list[str]:
    try:
        return file.read_text(encoding='utf-8').split('\n')
    except UnicodeDecodeError as error:
        raise UsageError(f'{file} is not UTF-8: {error}', 'convert it, e.g. with iconv') from error


def _word_and_tag(fields: list[str], columns: tuple[int, int], where: str) -> tuple[str, str]:
    reach = max(c + 1 if c >= 0 else -c for c in columns)
    if len(fields) < max(reach, 2):
        raise UsageError(
            f'{where} has {len(fields)} columns; the word is in column {columns[0]} and the tag in column {columns[1]}',
            'correct the line, or set word_column and column',
        )
    word, tag = (fields[c].strip() for c in columns)
    return word.replace(' ', '\u00a0'), tag
