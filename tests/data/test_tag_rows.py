"""From tagged words to rows of tagged tokens, and a run on them from file to metrics."""

import json

import numpy as np
import pytest

from research.core import schema
from research.core.errors import UsageError
from research.data.source import ArraySource, DataSet
from research.data.tagging import tag_rows
from research.data.tokenizers import Bytes
from research.train.loop import train


class Syllables:
    """Two letters a piece; white space is dropped, as WordPiece drops it, and so is the word 'void'."""

    vocabulary_size = 100
    pad, bos, eos, unknown, mask, cls, sep = 0, None, None, 1, None, 2, 3
    fingerprint = 'syllables'
    byte_lengths = np.zeros(100, np.int32)

    def __init__(self):
        self.pieces = []

    def encode(self, texts):
        return [np.int32([self.number(piece) for piece in self.split(text)]) for text in texts]

    def split(self, text):
        text = text.strip()
        return [] if text == 'void' else [text[i : i + 2] for i in range(0, len(text), 2)]

    def number(self, piece):
        if piece not in self.pieces:
            self.pieces.append(piece)
        return 4 + self.pieces.index(piece)


def sentences(tokenizer=None, **extra):
    words = np.array(['Peter plays', 'so do I'], object)
    tags = np.int32([[2, 0, -1], [0, 0, 1]])
    splits = {'train': ArraySource({'words': words, 'tags': tags, **extra})}
    return DataSet('toy', splits, ('O', 'B-I', 'B-PER'), tokenizer or Syllables())


def test_a_words_tag_stands_at_its_first_piece():
    data = tag_rows(length=8)(sentences(weight=np.float32([1, 2])))
    block = data.splits['train'][np.array([1, 0])]
    assert sorted(block) == ['segment', 'tag', 'tokens', 'weight']
    assert {block[key].dtype for key in ('segment', 'tag', 'tokens')} == {np.dtype(np.int32)}
    names = ['pad', 'unknown', 'cls', 'sep', *data.tokenizer.pieces]
    shown = [[names[i] for i in row] for row in block['tokens']]
    assert shown == [
        ['cls', 'so', 'do', 'I', 'sep', 'pad', 'pad', 'pad'],
        ['cls', 'Pe', 'te', 'r', 'pl', 'ay', 's', 'sep'],
    ]
    np.testing.assert_array_equal(block['tag'], [[-1, 0, 0, 1, -1, -1, -1, -1], [-1, 2, -1, -1, 0, -1, -1, -1]])
    np.testing.assert_array_equal(block['segment'], [[1] * 5 + [0] * 3, [1] * 8])


def test_bytes_keep_the_spaces_between_words():
    data = tag_rows(length=16)(sentences(Bytes()))
    block = data.splits['train'][np.arange(2)]
    texts = [Bytes().decode(row) for row in block['tokens']]
    assert texts == ['Peter plays', 'so do I']
    for text, tags in zip(texts, block['tag'], strict=True):  # cls, then the bytes
        places = np.flatnonzero(tags >= 0) - 1
        assert places.tolist() == [0, *(i for i, letter in enumerate(text) if letter == ' ')]
    assert (data.splits['train'].keys() == sentences().splits['train'].keys()).all()


def test_rows_do_not_depend_on_the_block_they_are_read_in():
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 6, 1500)  # more than are tokenised at once
    words = np.array([' '.join('abcde'[i] * (i + 1) for i in range(count)) for count in counts], object)
    tags = np.where(np.arange(5) < counts[:, None], np.arange(5), -1).astype(np.int32)
    data = DataSet('many', {'train': ArraySource({'words': words, 'tags': tags})}, tuple('abcde'), Syllables())
    rows = tag_rows(length=12)(data).splits['train']
    whole = rows[np.arange(1500)]
    for index in (0, 1023, 1024, 1499):
        one = rows[np.array([index])]
        for key in ('tokens', 'tag', 'segment'):
            np.testing.assert_array_equal(one[key][0], whole[key][index])
        assert whole['tag'][index][whole['tag'][index] >= 0].tolist() == list(range(counts[index]))


def test_a_word_that_has_no_token_becomes_unknown():
    data = sentences()
    source = ArraySource({'words': np.array(['a void b'], object), 'tags': np.int32([[0, 1, 2]])})
    block = tag_rows(length=5)(DataSet('toy', {'train': source}, data.class_names, data.tokenizer)).splits['train'][
        np.array([0])
    ]
    assert block['tokens'][0, 2] == Syllables.unknown and block['tag'].tolist() == [[-1, 0, 1, 2, -1]]
    tokenizer = Syllables()
    tokenizer.unknown = None
    with pytest.raises(UsageError, match="makes nothing of the word ' void'"):
        tag_rows(length=5)(DataSet('toy', {'train': source}, data.class_names, tokenizer))


def test_long_sentences_are_cut_only_if_that_is_asked_for():
    with pytest.raises(UsageError, match=r'1 of 2 sentences are longer than length=7\n  fix: set length=8, or cut=True'):
        tag_rows(length=7)(sentences())
    block = tag_rows(length=5, cut=True)(sentences()).splits['train'][np.arange(2)]
    assert block['tag'].tolist() == [[-1, 2, -1, -1, -1], [-1, 0, 0, 1, -1]]
    assert (block['tokens'][:, 4] == Syllables.sep).all() and block['segment'].all()


def test_mistakes_are_refused():
    with pytest.raises(UsageError, match="transform 'tag_rows' needs a tokenizer"):
        tag_rows()(DataSet('toy', sentences().splits, ('O',)))
    with pytest.raises(UsageError, match="no 'tag'\n  fix: did you mean 'tags'"):
        tag_rows(tags='tag')(sentences())
    short = {'train': ArraySource({'words': np.array(['one two'], object), 'tags': np.int32([[0]])})}
    with pytest.raises(UsageError, match="'one two' has 2 words and 1 tags"):
        tag_rows()(DataSet('toy', short, ('O',), Syllables()))


def test_a_run_from_file_to_span_f1(tmp_path):
    """Two steps of a small tagger: all parts fit together."""
    names = ('Ann', 'Bob', 'Eve')
    lines = [f'{name} B-PER\n{verb} O\n{other} B-PER\n' for name in names for verb in ('sees', 'asks') for other in names]
    (tmp_path / 'people.txt').write_text('\n'.join(lines))
    config = schema.default_config()
    config.name = 'tags'
    config.data.source = {'name': 'conll', 'path': str(tmp_path / 'people.txt')}
    config.data.tokenizer = 'byte'
    config.data.transforms = ['tag_rows(length=16)']
    config.data.batch_size = 8
    config.data.evaluation_batch_size = 8
    config.model = 'tests.tasks.tiny_text:Mixing(causal=False)'
    config.task = {'name': 'tag', 'metrics': ('accuracy', 'span_f1')}
    config.train.duration = '2 steps'
    config.evaluate.every = '0 steps'
    config.log.tensorboard = False
    config.parallel.devices = 1
    summary = train(schema.resolve(json.loads(config.to_json())), tmp_path / 'run', quiet=True)
    assert summary['step'] == 2
    assert {'loss', 'accuracy', 'span_f1', 'span_precision', 'span_recall'} <= set(summary['metrics']['test'])
    assert 0 <= summary['metrics']['test']['span_f1'] <= 1 and np.isfinite(summary['metrics']['test']['loss'])
