"""Rows of tokens: nothing lost, nothing invented, a row is a function of its index, documents stay apart."""

import numpy as np
import pytest

from research.core.errors import UsageError
from research.data import buckets as buckets_
from research.data import packing, sequences, splits, token_table
from research.data.mixture import Mixture
from research.data.plan import TrainPlan, unique_examples
from research.data.source import ArraySource, DataSet, Subset
from research.data.sources.help_en_de import PairSource
from research.data.sources.python_docs import python_docs
from research.data.sources.text_files import as_column
from research.data.sources.tokens_memmap import tokens_memmap
from research.data.tokenizer_training import byte, token_ids
from research.data.tokenizers import Bytes

BYTE = Bytes()


def dataset(texts, tokenizer=BYTE, **columns):
    return DataSet('d', {'train': ArraySource({'text': as_column(texts), **columns})}, tokenizer=tokenizer)


def rows(data, indices=None):
    source = data.splits['train']
    return source[np.arange(len(source)) if indices is None else np.array(indices)]


def random_texts(count, longest, seed=0):
    random = np.random.default_rng(seed)
    return [''.join(random.choice(list('abcdé'), random.integers(0, longest))) for _ in range(count)]


def stream_of(texts, ends):
    return [token for text in texts for token in [*text.encode(), *ends]]


# Windows.


@pytest.mark.parametrize('length', [1, 3, 7, 20])
def test_windows_hold_every_target_once_but_for_the_moved_last_row(length):
    texts = random_texts(12, 30)
    stream = stream_of(texts, [258])
    data = sequences.windows(length=length)(dataset(texts))
    tokens = rows(data)['tokens']
    assert tokens.dtype == np.int32
    assert tokens.shape[1] == length + 1
    *first, last = tokens.tolist()
    assert [row[0] for row in first] == stream[: len(first) * length : length]
    assert [token for row in first for token in row[1:]] == stream[1 : len(first) * length + 1]
    assert last == stream[-length - 1 :]
    assert 0 <= len(tokens) * length - (len(stream) - 1) < length


def test_a_stride_overlaps_windows():
    data = sequences.windows(length=4, stride=2)(dataset(['abcdefgh']))
    assert rows(data)['tokens'].tolist() == [[*b'abcde'], [*b'cdefg'], [*b'efgh', 258]]


def test_windows_read_any_block_in_any_order():
    source = sequences.windows(length=5)(dataset(random_texts(9, 40))).splits['train']
    whole = source[np.arange(len(source))]['tokens']
    chosen = np.array([7, 0, len(source) - 1, 7])
    np.testing.assert_array_equal(source[chosen]['tokens'], whole[chosen])


def test_keys_of_rows_tell_texts_and_tokenizers_apart():
    def keys(texts, tokenizer=BYTE):
        return sequences.windows(length=4)(dataset(texts, tokenizer)).splits['train'].keys()

    first = keys(['abcdefgh', 'ijkl'])
    assert len(set(first.tolist())) == len(first)
    np.testing.assert_array_equal(first, keys(['abcdefgh', 'ijkl']))
    assert not set(first.tolist()) & set(keys(['abcdefgh', 'ijkm']).tolist())
    assert first.dtype == np.uint64


# The table of tokens.


def test_a_large_table_lies_in_a_file_and_is_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv('FULCRUM_CACHE', str(tmp_path))
    texts = random_texts(3000, 20)
    source = dataset(texts).splits['train']
    small = token_table.tokenise(source, 'text', BYTE, before=[257], after=[258])
    assert not isinstance(small.tokens, np.memmap)
    monkeypatch.setattr(token_table, 'MEMORY_LIMIT', 5000)
    large = token_table.tokenise(source, 'text', BYTE, before=[257], after=[258])
    assert isinstance(large.tokens, np.memmap)
    np.testing.assert_array_equal(large.tokens, small.tokens)
    np.testing.assert_array_equal(large.offsets, small.offsets)
    monkeypatch.setattr(Bytes, 'encode', lambda self, texts: pytest.fail('tokenised again'))
    again = token_table.tokenise(source, 'text', BYTE, before=[257], after=[258])
    np.testing.assert_array_equal(again.tokens, small.tokens)
    assert sorted(p.name for p in (tmp_path / 'tokens').iterdir()) == [large.address, f'{large.address}.offsets']


def test_tables_are_found_by_their_texts_whatever_the_keys_of_the_examples_hash(monkeypatch, tmp_path):
    monkeypatch.setenv('FULCRUM_CACHE', str(tmp_path))
    monkeypatch.setattr(token_table, 'MEMORY_LIMIT', 0)
    english = as_column(['Hello.', 'Good night!'])
    german, dutch = (
        PairSource({'source': english, 'target': as_column(texts)}) for texts in (['Hallo.', 'Nacht!'], ['Dag.', 'Nee!'])
    )
    np.testing.assert_array_equal(german.keys(), dutch.keys())
    for source, words in ((german, 'Hallo.Nacht!'), (dutch, 'Dag.Nee!')):
        assert BYTE.decode(token_table.tokenise(source, 'target', BYTE).tokens) == words
    one, other = (token_table.tokenise(dataset(texts).splits['train'], 'text', BYTE) for texts in (['ab', 'c'], ['a', 'bc']))
    assert one.address != other.address
    assert one.lengths.tolist() == [2, 1]


def test_a_file_of_tokens_needs_a_private_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('FULCRUM_CACHE', str(tmp_path))
    monkeypatch.setattr(token_table, 'MEMORY_LIMIT', 10)
    (tmp_path / 'tokens').mkdir()
    (tmp_path / 'tokens').chmod(0o777)
    with pytest.raises(UsageError, match=r'the tokens need a file: .*chmod 700'):
        sequences.windows(length=4)(dataset(['abcdefgh' * 4]))


def test_ids_beyond_16_bits_are_kept():
    data = dataset(['70000 1 2 3', '69999'], token_ids([], vocabulary_size=70001, eos=70000))
    assert rows(sequences.windows(length=5)(data))['tokens'].tolist() == [
        [70000, 1, 2, 3, 70000, 69999],
        [1, 2, 3, 70000, 69999, 70000],
    ]


# Token files.


@pytest.mark.parametrize('suffix', ['.bin', '.npy'])
def test_token_files_are_read_as_windows(tmp_path, suffix):
    arrays = {
        name: np.random.default_rng(i).integers(0, 50257, 1000 + i).astype(np.uint16) for i, name in enumerate(('train', 'val'))
    }
    for name, tokens in arrays.items():
        if suffix == '.bin':
            tokens.tofile(tmp_path / f'{name}.bin')
        else:
            np.save(tmp_path / f'{name}.npy', tokens)
    data = tokens_memmap(dir=str(tmp_path), length=16)
    assert sorted(data.splits) == ['train', 'validation']
    source = data.splits['train']
    assert len(source) == 63
    np.testing.assert_array_equal(source[np.array([3])]['tokens'][0], arrays['train'][48:65])
    np.testing.assert_array_equal(data.splits['validation'][np.array([0])]['tokens'][0], arrays['val'][:17])
    assert len(set(source.keys().tolist())) == 63
    assert isinstance(source.tokens, np.memmap)


TOKEN_FILES = [
    ({}, {}, 'has no train.bin and no train.npy'),
    ({}, {'dtype': 'int64'}, "dtype='int64'"),
    ({'train.npy': np.zeros((3, 3))}, {}, 'not token ids'),
    ({'train.npy': np.zeros(3, np.uint16)}, {}, "split 'train': a split has 3 tokens, fewer than a window of 1024"),
    (
        {'train.npy': np.zeros(9, np.uint16), 'val.npy': np.zeros(3, np.uint16)},
        {'length': 4},
        "split 'validation': a split has 3 tokens.*\n  fix: lower length",
    ),
    ({'train.bin': b'abc'}, {}, 'cannot be mapped'),
]


@pytest.mark.parametrize(('written', 'arguments', 'message'), TOKEN_FILES)
def test_wrong_token_files_are_named(tmp_path, written, arguments, message):
    for name, content in written.items():
        (tmp_path / name).write_bytes(content) if isinstance(content, bytes) else np.save(tmp_path / name, content)
    with pytest.raises(UsageError, match=message):
        tokens_memmap(dir=str(tmp_path), **arguments)


@pytest.mark.parametrize('within', [lambda source: source, lambda source: Mixture([source, source], (1, 1), (None, None))])
def test_overlapping_windows_are_not_split_by_hash(tmp_path, within):
    tokens = np.arange(1000, dtype=np.uint16)
    tokens.tofile(tmp_path / 'train.bin')

    def split(stride, **shares):
        data = tokens_memmap(dir=str(tmp_path), length=16, stride=stride)
        return splits.split(data.map(within), **{'validation': 0.0, 'test': 0.0, **shares})

    with pytest.raises(
        UsageError, match=r'overlapping windows.*test would share.*\n  fix: set stride=length.*config.data.test=0\.0$'
    ):
        split(4, test=0.2)
    with pytest.raises(UsageError, match='test and validation would share tokens with train'):
        split(4, test=0.2, validation=0.1)
    assert list(split(4)) == ['train']
    parts = split(16, test=0.2)
    targets = {name: set(part[np.arange(len(part))]['tokens'][:, 1:].ravel().tolist()) for name, part in parts.items()}
    assert len(targets['train'] & targets['test']) < 16  # only the last window is moved back
    tokens.tofile(tmp_path / 'test.bin')
    assert sorted(split(4, test=0.2)) == ['test', 'train']


# Packing.


def unpack(block):
    """The documents or pieces in packed rows, as lists of tokens; checks that segments and positions are in order."""
    found = []
    for tokens, segment, position in zip(block['tokens'], block['segment'], block['position'], strict=True):
        numbers = segment[segment > 0]
        assert (np.diff(numbers) >= 0).all()
        assert list(np.unique(numbers)) == list(range(1, 1 + numbers.max()))
        assert (segment[len(numbers) :] == 0).all()
        assert (tokens[len(numbers) :] == BYTE.pad).all()
        for number in range(1, 1 + numbers.max()):
            piece = tokens[segment == number]
            np.testing.assert_array_equal(position[segment == number], np.arange(len(piece)))
            found.append(piece.tolist())
    return found


@pytest.mark.parametrize('length', [8, 31, 64])
def test_packed_rows_hold_every_document_once(length):
    texts = random_texts(200, length - 2)
    block = rows(packing.pack(length=length)(dataset(texts)))
    assert sorted(block) == ['position', 'segment', 'tokens']
    assert {(column.dtype, column.shape[1]) for column in block.values()} == {(np.dtype(np.int32), length + 1)}
    expected = [[257, *text.encode(), 258] for text in texts]
    fitting = [document for document in expected if len(document) <= length + 1]
    found = unpack(block)
    for document in fitting:
        found.remove(document)
    assert len(found) == sum(-(-(len(d) - 1) // length) for d in expected if len(d) > length + 1)


def test_long_documents_are_cut_so_that_every_target_is_predicted_once():
    texts = ['abcdefghijklmnopqrstuvwxyz', 'ABCDEFG']
    source = packing.pack(length=8)(dataset(texts)).splits['train']
    pieces = unpack(source[np.arange(len(source))])
    targets = sorted(token for piece in pieces for token in piece[1:])
    assert targets == sorted(stream_of(texts, [258]))
    contexts = sorted((piece[0], piece[1]) for piece in pieces)
    assert contexts == [(ord('h'), ord('i')), (ord('p'), ord('q')), (ord('x'), ord('y')), (257, ord('A')), (257, ord('a'))]


def test_the_example_of_the_module():
    data = dataset(['a' * 4, 'b' * 2, 'c'])  # with bos and eos 6, 4 and 3 tokens
    block = rows(packing.pack(length=7)(data))
    assert block['segment'].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 2, 2, 2, 0]]
    assert block['position'].tolist() == [[0, 1, 2, 3, 4, 5, 0, 0], [0, 1, 2, 3, 0, 1, 2, 0]]


def test_a_packed_row_is_a_function_of_its_index():
    source = packing.pack(length=16)(dataset(random_texts(100, 60))).splits['train']
    whole = source[np.arange(len(source))]
    chosen = np.array([5, 0, len(source) - 1, 5])
    for key, column in source[chosen].items():
        np.testing.assert_array_equal(column, whole[key][chosen])


def test_best_fit_is_as_good_as_a_plain_search():
    sizes = np.random.default_rng(1).integers(2, 34, 500)
    rows_ = packing.best_fit(sizes, 33)
    used = np.bincount(rows_, weights=sizes)
    assert used.max() <= 33
    room = []  # the textbook's algorithm, looking at every row
    for size in sorted(sizes.tolist(), reverse=True):
        fitting = [(left, row) for row, left in enumerate(room) if left >= size]
        if fitting:
            room[min(fitting)[1]] -= size
        else:
            room.append(33 - size)
    assert sorted(33 - used) == sorted(room)


def test_pythons_documents_fill_their_rows():
    texts = python_docs().splits['all'].arrays['text']
    for length in (128, 256, 1024):
        source = packing.pack(length=length)(dataset(list(texts))).splits['train']
        assert source.efficiency > 0.97
        sample = source[np.arange(0, len(source), 50)]
        assert source.efficiency == pytest.approx((sample['segment'] > 0).mean(), abs=0.05)


# Padded rows and pairs.


def test_padded_rows_keep_their_label():
    texts = ['ab', '', 'abcdefgh']
    data = sequences.pad(length=6)(dataset(texts, label=np.array([2, 0, 1], np.int32)))
    block = rows(data)
    cls, sep, fill = BYTE.cls, BYTE.sep, BYTE.pad
    assert block['tokens'].tolist() == [
        [cls, 97, 98, sep, fill, fill],
        [cls, sep, fill, fill, fill, fill],
        [cls, 97, 98, 99, 100, sep],
    ]
    assert block['segment'].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6]
    assert block['label'].tolist() == [2, 0, 1]
    assert sorted(block) == ['label', 'segment', 'tokens']
    np.testing.assert_array_equal(data.splits['train'].labels(), [2, 0, 1])
    np.testing.assert_array_equal(
        data.splits['train'].keys(), dataset(texts, label=np.array([2, 0, 1], np.int32)).splits['train'].keys()
    )


def test_padded_rows_without_special_tokens():
    block = rows(sequences.pad(length=4, special=False)(dataset(['ab', 'abcdef'])), [1, 0])
    assert block['tokens'].tolist() == [[97, 98, 99, 100], [97, 98, BYTE.pad, BYTE.pad]]
    assert block['segment'].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_pairs_begin_and_end_and_a_cut_text_does_not():
    columns = {'source': as_column(['ab', 'abcdef']), 'target': as_column(['x', 'uvwxyz'])}
    data = DataSet('d', {'train': ArraySource(columns)}, tokenizer=BYTE)
    block = rows(sequences.pairs(source_length=4, target_length=3)(data))
    bos, eos, fill = BYTE.bos, BYTE.eos, BYTE.pad
    assert block['source'].tolist() == [[97, 98, eos, fill], [97, 98, 99, 100]]
    assert block['source_segment'].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert block['target'].tolist() == [[bos, ord('x'), eos, fill], [bos, *b'uvw']]
    assert block['target_segment'].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert sorted(block) == ['source', 'source_segment', 'target', 'target_segment']


# Buckets.


def bucketed(texts, lengths=(4, 8, 16)):
    data = sequences.pad(length=lengths[-1], special=False)(dataset(texts, label=np.arange(len(texts), dtype=np.int32)))
    return buckets_.buckets(lengths=lengths)(data).splits['train']


@pytest.fixture(scope='module')
def source():
    random = np.random.default_rng(4)
    texts = [
        random.choice(['a', 'b']) * int(n)
        for n in random.choice([0, 1, 4, 5, 8, 9, 16], 61, p=[0.05, 0.2, 0.2, 0.2, 0.2, 0.1, 0.05])
    ]
    return bucketed(texts)


@pytest.mark.parametrize('batch_size', [1, 2, 7, 16, 100])
def test_every_batch_is_one_bucket_and_every_example_comes_once_an_epoch(source, batch_size):
    epochs, counts = 12, np.array(source.counts)
    plan = source.plan(batch_size, seed=3)
    steps = int((epochs * counts // batch_size).sum())
    seen = []
    for step in range(steps):
        indices, epoch, mask = plan.batch(step)
        assert mask.all()
        assert len(indices) == batch_size
        bucket = np.searchsorted(np.cumsum(counts), indices, side='right')
        assert (bucket == bucket[0]).all()
        seen += zip(indices.tolist(), epoch.tolist(), strict=True)
    assert len(set(seen)) == len(seen)  # no example twice in an epoch
    wanted = {(i, e) for i in range(len(source)) for e in range(epochs)}
    missing = wanted - set(seen)
    late = np.bincount(np.searchsorted(np.cumsum(counts), [i for i, _ in missing], side='right'), minlength=len(counts))
    assert (late < batch_size).all()  # what is carried over the end of the last epoch
    assert set(seen) <= wanted
    following = {
        pair
        for step in range(steps, steps + len(counts) * (1 + batch_size // min(counts)) * 40)
        for pair in zip(*(column.tolist() for column in plan.batch(step)[:2]), strict=True)
    }
    assert missing <= following


def test_blocks_are_cut_to_their_bucket(source):
    plan = source.plan(8, seed=0)
    widths = set()
    for step in range(20):
        block = source[plan.batch(step)[0]]
        width = block['tokens'].shape[1]
        widths.add(width)
        longest = block['segment'].sum(axis=1).max()
        assert block['segment'].shape == block['tokens'].shape == (8, width)
        assert width / 2 < longest <= width or width == 4
    assert widths == {4, 8, 16}
    assert source[np.array([0])]['tokens'].shape == (1, 16)  # the first example shows the largest shape
    labels = np.concatenate([source[np.array([i])]['label'] for i in range(len(source))])
    np.testing.assert_array_equal(labels, source.labels())
    assert sorted(labels) == list(range(len(source)))


def test_bucket_plans_differ_by_seed_and_do_not_depend_on_what_came_before(source):
    first, other = source.plan(4, seed=1), source.plan(4, seed=2)
    late = first.batch(50)
    for step in range(5):
        first.batch(step)
    for one, again in zip(late, source.plan(4, seed=1).batch(50), strict=True):
        np.testing.assert_array_equal(one, again)
    assert any((first.batch(step)[0] != other.batch(step)[0]).any() for step in range(3))
    indices, epochs, _ = first.batch(10**7)
    assert len(set(indices)) == 4
    assert abs(epochs.mean() - 4 * 10**7 / len(source)) < 4 * len(source.counts)


@pytest.mark.parametrize('batch_size', [4, 30, 100])
def test_unique_rows_of_buckets_are_those_that_the_plan_has_drawn(source, batch_size):
    training = source.plan(batch_size, seed=1)
    for steps in (0, 1, 2, 3, 10, 40):
        drawn = {int(i) for step in range(steps) for i in training.batch(step)[0]}
        assert unique_examples(source, steps, batch_size, seed=1) == len(drawn)


def test_buckets_of_one_size_are_not_shuffled_alike():
    plan = bucketed(['a', 'a' * 8] * 32).plan(8, seed=0)
    long, short = (
        [i % 32 for step in range(8) for i in plan.batch(step)[0].tolist() if i // 32 == bucket] for bucket in (0, 1)
    )
    assert sorted(long) == sorted(short) == list(range(32))
    assert long != short


@pytest.mark.parametrize('batch_size', [1, 4, 30, 100])
def test_evaluation_sees_every_row_once_bucket_by_bucket(source, batch_size):
    plan = source.evaluation_plan(batch_size)
    seen = []
    for step in range(len(plan)):
        indices, epochs, mask = plan.batch(step)
        assert len(indices) == batch_size
        assert len({int(b) for b in source._bucket[indices]}) == 1
        assert not epochs.any()
        seen += indices[mask > 0].tolist()
    assert sorted(seen) == list(range(len(source)))


def test_pairs_go_where_both_fit_and_audio_goes_by_its_samples():
    columns = {'source': as_column(['a' * 3, 'a', 'a' * 7]), 'target': as_column(['b', 'b' * 7, 'b'])}
    data = sequences.pairs(source_length=8, target_length=8)(DataSet('d', {'train': ArraySource(columns)}, tokenizer=BYTE))
    source = buckets_.buckets(lengths=(4, 8))(data).splits['train']
    assert source.counts == (2, 1)
    block = source[np.array([2])]
    assert (block['source'].shape, block['target'].shape, block['target_segment'].shape) == ((1, 4), (1, 5), (1, 5))
    audio = ArraySource({'audio': np.ones((3, 100), np.int16), 'audio_length': np.array([30, 100, 50], np.int32)}, label=None)
    source = buckets_.buckets(lengths=(50, 100), along='audio')(DataSet('d', {'train': audio})).splits['train']
    assert source.counts == (1, 2)
    assert source[np.array([1, 2])]['audio'].shape == (2, 50)
    assert source[np.array([1, 2])]['audio_length'].tolist() == [30, 50]


# Mixtures, splits and mistakes.


def test_transforms_go_into_the_parts_of_a_mixture():
    parts = [ArraySource({'text': as_column(random_texts(20, 30, seed))}) for seed in (0, 1)]
    data = DataSet('m', {'train': Mixture(parts, (1, 2), (None, 3))}, tokenizer=BYTE)
    for transform in (sequences.windows(length=8), packing.pack(length=8), sequences.pad(length=8)):
        found = transform(data).splits['train']
        assert isinstance(found, Mixture)
        assert (found.weights, found.max_epochs) == ((1, 2), (None, 3))
        apart = [transform(DataSet('p', {'train': part}, tokenizer=BYTE)).splits['train'] for part in parts]
        assert [len(part) for part in found.parts] == [len(part) for part in apart]
        np.testing.assert_array_equal(found[np.array([len(apart[0]) + 1])]['tokens'], apart[1][np.array([1])]['tokens'])


@pytest.mark.parametrize(
    ('transform', 'message'),
    [
        (sequences.windows(length=4), 'a split has 1 tokens, fewer than a window of 4'),
        (packing.pack(length=4), 'no document of a split has two tokens'),
        (sequences.windows(length=2, text='no'), 'the examples have no text'),
    ],
)
def test_a_mistake_names_the_split_whose_data_do_not_fit(transform, message):
    fine = dataset(['abcdefgh'], NoEnds()).splits['train']
    bad = ArraySource({'text' if 'no text' not in message else 'other': as_column(['a'])})
    named = fine if 'no text' not in message else ArraySource({'no': as_column(['abcdefgh'])})
    with pytest.raises(UsageError, match=f"^split 'test': {message}.*\n  fix: "):
        transform(DataSet('d', {'train': named, 'test': bad}, tokenizer=NoEnds()))


def test_rows_too_long_for_the_buckets_name_their_split():
    data = DataSet('d', {n: dataset([t]).splits['train'] for n, t in (('train', 'a'), ('test', 'abcdef'))}, tokenizer=BYTE)
    with pytest.raises(UsageError, match=r"^split 'test': a row has length 6, the last bucket holds 3"):
        buckets_.buckets(lengths=(3,))(sequences.pad(length=8, special=False)(data))


def test_every_split_is_transformed_alone():
    texts = random_texts(50, 30)
    whole = ArraySource({'text': as_column(texts)})
    splits = {'train': Subset(whole, np.arange(40)), 'test': Subset(whole, np.arange(40, 50))}
    data = sequences.windows(length=4)(DataSet('d', splits, tokenizer=byte([])))
    assert sorted(data.splits) == ['test', 'train']
    tail = data.splits['test']
    assert tail[np.array([len(tail) - 1])]['tokens'][0].tolist() == stream_of(texts[40:], [258])[-5:]
    assert TrainPlan(len(data.splits['train']), 4, 0).batch(0)[0].shape == (4,)


class NoEnds(Bytes):
    """Bytes without special tokens."""

    def __init__(self):
        super().__init__(special={'pad': 256})


MISTAKES = [
    (
        sequences.windows(length=4),
        dataset(['abc'], None),
        "transform 'windows' needs a tokenizer\n  fix: set config.data.tokenizer",
    ),
    (packing.pack(length=4), dataset(['abc'], None), "transform 'pack' needs a tokenizer"),
    (sequences.pad(length=4), dataset(['abc'], None), "transform 'pad' needs a tokenizer"),
    (sequences.pairs(), dataset(['abc'], None), "transform 'pairs' needs a tokenizer"),
    (sequences.windows(length=4, text='txt'), dataset(['abc']), "no text 'txt'\n  fix: did you mean 'text'"),
    (sequences.windows(length=9), dataset(['abc']), 'a split has 4 tokens, fewer than a window of 9'),
    (sequences.windows(length=2, stride=3), dataset(['abc']), 'would leave tokens out'),
    (packing.pack(length=0), dataset(['abc']), 'has no room for a target'),
    (packing.pack(length=4), dataset(['', 'a'], NoEnds()), 'no document of a split has two tokens'),
    (sequences.pad(length=2), dataset(['abc']), 'has no room for text between the special tokens'),
    (sequences.pairs(), dataset(['abc'], NoEnds()), 'needs a token to begin with'),
    (buckets_.buckets(lengths=(2,)), sequences.pad(length=6)(dataset(['abc'])), 'a row has length 5, the last bucket holds 2'),
    (buckets_.buckets(), dataset(['abc']), "fix: put 'pad' or 'pairs' before it"),
    (
        buckets_.buckets(),
        DataSet('m', {'train': Mixture([dataset(['a']).splits['train']], None, (None,))}),
        'cannot be put into buckets',
    ),
]


@pytest.mark.parametrize(('transform', 'data', 'message'), MISTAKES)
def test_mistakes_are_named(transform, data, message):
    with pytest.raises(UsageError, match=message):
        transform(data)


@pytest.mark.parametrize(('arguments', 'message'), [({'lengths': (8, 4)}, 'do not rise'), ({'along': 'x'}, "along='x'")])
def test_impossible_buckets_are_named_at_once(arguments, message):
    with pytest.raises(UsageError, match=message):
        buckets_.buckets(**arguments)
