"""Bad records: real damage on real files is named, stops by default, and is skipped the same way in every run and resume."""

import dataclasses
import gzip
import io
import json
import pathlib
import struct

import jax
import numpy as np
import pytest
import tensorflow_datasets as builders
from PIL import Image

from research.core import config_file, schema
from research.core.errors import ExitCode, UsageError
from research.data import columns, few_labels, packing, sequences
from research.data.bad_records import BadRecordError, BadRecords, Skipping, salvage
from research.data.build import build_splits, check_loaded, skipping
from research.data.mixture import Mixture
from research.data.pipeline import DeviceFeed, HostFeed, without_bad
from research.data.plan import EvaluationPlan, TrainPlan, plan_of
from research.data.source import ArraySource, DataSet, fingerprint
from research.data.sources.help_en_de import help_en_de
from research.data.sources.idx import idx
from research.data.sources.image_folder import image_folder
from research.data.sources.npz import npz
from research.data.sources.poetry_zh import poetry_zh
from research.data.sources.stamps import stamps
from research.data.sources.table import table
from research.data.sources.tfds import tfds
from research.data.sources.tokens_memmap import tokens_memmap
from research.data.tagging import tag_rows
from research.data.token_table import tokenise
from research.data.tokenizers import Bytes
from research.parallel import mesh as meshes
from research.train import build, step
from research.train.evaluate import Evaluator
from tests.data.sources.test_tfds import make_builder

RNG = np.random.default_rng(0)
F = builders.features
N = 40  # images of the folder, and of the first split of the prepared data set


def encoded(kind='PNG', size=12):
    data = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (size, size, 3), np.uint8)).save(data, kind)
    return data.getvalue()


@pytest.fixture
def folder(tmp_path):
    """N images of two classes, PNG and JPEG."""
    for i in range(N):
        kind = 'PNG' if i % 4 < 2 else 'JPEG'
        path = tmp_path / 'pets' / ('cat', 'dog')[i % 2] / f'{i:02d}.{kind.lower()}'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(kind))
    return tmp_path / 'pets'


def damage(folder, *places):
    """Cuts the files at these places of the source: in the middle, or (every second) all but nothing."""
    paths = image_folder(dir=str(folder), image_size=8).splits['all'].paths
    for number, place in enumerate(places):
        paths[place].write_bytes(paths[place].read_bytes()[: 200 if number % 2 == 0 else 7])
    return [paths[place] for place in places]


def data_of(folder, *overrides):
    """The data section of images in a folder, all of them for training."""
    config = json.loads(schema.default_config().to_json())
    config['data'] |= {'source': {'name': 'image_folder', 'dir': str(folder), 'image_size': 8}, 'test': 0.0, 'validation': 0.0}
    config['data'] |= {'batch_size': 16, 'evaluation_batch_size': 16}
    config['model'] = {'name': 'mlp', 'hidden': [8]}
    for override in overrides:
        path, _, text = override.partition('=')
        config_file.override(config, path, text)
    return schema.resolve(config)


def skip_of(folder, *overrides):
    return data_of(folder, 'data.on_bad_record=skip', 'data.max_bad_share=0.2', *overrides)


@pytest.fixture
def prepared(tmp_path):
    """A builder prepared in two shards of its training split, the images of which do not compress."""
    images = RNG.integers(0, 256, (2 * N, 16, 16, 3), np.uint8)
    examples = [{'image': Image.fromarray(image), 'label': i % 3, 'place': i} for i, image in enumerate(images)]
    features = {'image': F.Image(shape=(16, 16, 3)), 'label': F.ClassLabel(num_classes=3), 'place': np.int32}
    builder = make_builder('Torn', features, examples)(data_dir=tmp_path, file_format='array_record')
    settings = builders.download.DownloadConfig(num_shards=2)
    builder.download_and_prepare(download_config=settings)
    return tmp_path


def shards(prepared):
    return sorted(prepared.rglob('*train.array_record*'))


def flip(path, offset, size=1):
    data = bytearray(path.read_bytes())
    for place in range(offset, offset + size):
        data[place] ^= 0xFF
    path.write_bytes(data)


def everything(source):
    return source[np.arange(len(source))]


def host(batch):
    return {key: np.asarray(value) for key, value in batch.items()}


# ---- by default a bad record stops, named


def test_a_truncated_image_stops_with_file_record_and_code(folder):
    for place, path in zip((3, 21), damage(folder, 3, 21), strict=True):
        splits, spec = build_splits(data_of(folder).data)
        assert 'bad' not in spec.examples
        assert type(splits['train']).__name__ == 'ImageFolder'  # nothing is wrapped
        with pytest.raises(BadRecordError) as caught:
            splits['train'][np.array([0, place, 5])]
        assert (caught.value.shard, caught.value.record) == (str(path), place)
        assert f'{path}, record {place}: cannot be decoded: ' in caught.value.message
        assert "config.data.on_bad_record='skip'" in caught.value.fix
        assert caught.value.exit_code == ExitCode.STORAGE


def test_a_disk_that_fails_is_not_a_bad_record(folder):
    source = Skipping(image_folder(dir=str(folder), image_size=8).splits['all'], 'all', BadRecords(share=1.0))
    source.source.paths[3].unlink()
    with pytest.raises(FileNotFoundError):
        source[np.arange(5)]


@pytest.mark.parametrize('in_memory', [True, False])
def test_a_flipped_byte_of_a_shard_names_shard_and_record(prepared, in_memory):
    good = everything(tfds(dataset='torn', data_dir=str(prepared), in_memory=False).splits['train'])
    _, second = shards(prepared)
    flip(second, 2000)
    source = tfds(dataset='torn', data_dir=str(prepared), in_memory=in_memory).splits['train']
    with pytest.raises(BadRecordError, match='hash mismatch') as caught:
        everything(source)
    assert caught.value.shard == str(second)
    bad = len(good['label']) // 2 + caught.value.record
    others = np.delete(np.arange(N), bad)
    for key, column in source[others].items():
        np.testing.assert_array_equal(column, good[key][others])
    assert 0 < caught.value.record < N // 2


@pytest.mark.parametrize('size', [0, 100, 2**16, 2**16 + 3000, -1])
def test_a_truncated_shard_is_lost_whole_and_the_other_is_not(prepared, size):
    """At 64 KiB array_record itself sees nothing wrong, and gives records of no bytes."""
    first, _ = shards(prepared)
    first.write_bytes(first.read_bytes()[:size])
    source = tfds(dataset='torn', data_dir=str(prepared), in_memory=False).splits['train']
    with pytest.raises(BadRecordError) as caught:
        source[np.array([N - 1, 2])]
    assert (caught.value.shard, caught.value.record) == (str(first), 2)
    if size == 2**16:
        assert caught.value.reason == f'the shard holds 0 records, not {N // 2}'
    skipping = Skipping(source, 'train', BadRecords(share=0.5))
    np.testing.assert_array_equal(everything(skipping)['bad'], np.arange(N) < N // 2)
    assert skipping.records.count == N // 2


def test_data_in_memory_stop_at_the_start(prepared):
    flip(shards(prepared)[0], 2000)
    config = data_of(prepared)
    component = dataclasses.replace(config.data.source, name='tfds', arguments={'dataset': 'torn', 'data_dir': str(prepared)})
    data = dataclasses.replace(config.data, source=component)
    with pytest.raises(BadRecordError, match=shards(prepared)[0].name):
        build_splits(data)
    splits, spec = build_splits(dataclasses.replace(data, on_bad_record='skip', max_bad_share=0.1))
    assert everything(splits['train'])['bad'].sum() == 1
    assert sum(spec.class_counts) == N - 1  # nobody knows the class of the lost one


def test_labels_of_a_torn_shard(prepared):
    source = tfds(dataset='torn', data_dir=str(prepared), in_memory=False).splits['train']
    whole = source.labels()
    kept = next(prepared.rglob('fulcrum-labels-train.npy'))
    np.save(prepared / 'short.npy', whole[:5])
    for content in (kept.read_bytes()[:-30], (prepared / 'short.npy').read_bytes()):
        kept.write_bytes(content)  # what an earlier run left is damaged itself: it is read anew
        fresh = tfds(dataset='torn', data_dir=str(prepared), in_memory=False).splits['train']
        np.testing.assert_array_equal(fresh.labels(), whole)
    kept.unlink()
    flip(shards(prepared)[0], 2000)
    torn = tfds(dataset='torn', data_dir=str(prepared), in_memory=False).splits['train']
    with pytest.raises(BadRecordError):
        torn.labels()
    skipping = Skipping(torn, 'train', BadRecords(share=0.1))
    bad = everything(skipping)['bad']
    np.testing.assert_array_equal(skipping.labels(), np.where(bad, -1, whole))
    assert bad.sum() == 1
    assert not kept.exists()  # the mended shard shall have its own labels


# ---- files that are of no use in parts: named, whatever is set


def damaged(raw):
    """Several kinds of damage to the bytes of a file: cut, bytes flipped, a stretch of zeros."""
    rng = np.random.default_rng(1)
    for _ in range(25):
        yield raw[: rng.integers(len(raw))]
        data = bytearray(raw)
        for place in rng.integers(len(raw), size=2):
            data[place] ^= int(rng.integers(1, 256))
        yield bytes(data)
        start = rng.integers(len(raw))
        yield raw[:start] + bytes(len(raw[start : start + 64])) + raw[start + 64 :]


def idx_bytes(array):
    return struct.pack('>BBBB', 0, 0, 8, array.ndim) + struct.pack(f'>{array.ndim}I', *array.shape) + array.tobytes()


def make_npz(root):
    np.savez_compressed(root / 'a.npz', x=RNG.integers(0, 256, (20, 5, 5), np.uint8), y=np.arange(20) % 3)
    return root / 'a.npz', lambda: npz(path=str(root / 'a.npz'))


def make_idx(root):
    for prefix in ('train', 't10k'):
        packed = gzip.compress(idx_bytes(RNG.integers(0, 256, (30, 5, 5), np.uint8)))
        (root / f'{prefix}-images-idx3-ubyte.gz').write_bytes(packed)
        (root / f'{prefix}-labels-idx1-ubyte').write_bytes(idx_bytes((np.arange(30) % 4).astype(np.uint8)))
    return root / 'train-images-idx3-ubyte.gz', lambda: idx(dir=str(root))


def make_parquet(root):
    import pyarrow as pa
    from pyarrow import parquet

    columns = {'a': list(range(50)), 'ward': ['east', 'west'] * 25, 'y': ['ill', 'cured'] * 25}
    parquet.write_table(pa.table(columns), root / 'a.parquet')
    return root / 'a.parquet', lambda: table(path=str(root / 'a.parquet'), target='y', typed=True)


def make_poems(root):
    poems = [{'title': '帝京', 'paragraphs': ['秦川雄帝宅']}] * 9
    (root / 'poet.tang.0.json').write_text(json.dumps(poems), encoding='utf-8')
    return root / 'poet.tang.0.json', lambda: poetry_zh(dir=str(root))


def make_stamps(root):
    (root / 'k').mkdir()
    (root / 'k' / 'a.txt').write_text('A frog.\nde.utf8=Ein Frosch, schön.\n', encoding='utf-8')
    (root / 'k' / 'a.png').write_bytes(encoded())
    return root / 'k' / 'a.txt', lambda: stamps(dir=str(root), size=8)


def make_help(root):
    for language, text in (('en-US', 'Click the café.'), ('de', 'Schaltfläche drücken.')):
        (root / language / 'text').mkdir(parents=True)
        (root / language / 'text' / 'a.html').write_text(f'<html><p id="p1">{text}</p></html>', encoding='utf-8')
    return root / 'de' / 'text' / 'a.html', lambda: help_en_de(dir=str(root))


def make_tokens(root):
    np.save(root / 'train.npy', np.arange(400, dtype=np.uint16))
    return root / 'train.npy', lambda: tokens_memmap(dir=str(root), length=16)


@pytest.mark.parametrize(
    'make', [make_npz, make_idx, make_parquet, make_poems, make_stamps, make_help, make_tokens], ids=lambda f: f.__name__[5:]
)
def test_a_damaged_file_is_named_and_no_library_speaks(tmp_path, make):
    path, read = make(tmp_path)
    read()
    errors = []
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        try:
            read()
        except UsageError as error:  # anything else fails this test
            errors.append(error)
    assert len(errors) > 5
    assert max(len(str(error).splitlines()) for error in errors) == 2
    assert [error.message for error in errors if str(tmp_path) not in error.message and 'tokens' not in error.message] == []


# ---- skipping


def test_bad_rows_are_zeros_and_good_rows_are_untouched(folder):
    whole = everything(image_folder(dir=str(folder), image_size=8).splits['all'])
    damage(folder, 3, 4, 39)
    source = Skipping(image_folder(dir=str(folder), image_size=8).splits['all'], 'all', BadRecords(share=0.2))
    for indices in (np.arange(N), np.array([39, 3, 3, 17, 4]), np.array([4]), np.array([], np.int64)):
        block = source[indices]
        np.testing.assert_array_equal(block['bad'], np.isin(indices, [3, 4, 39]))
        for key in whole:
            assert block[key].dtype == whole[key].dtype
            np.testing.assert_array_equal(block[key][~block['bad']], whole[key][indices][~block['bad']])
            assert not block[key][block['bad']].any()
    assert source.records.count == 3
    np.testing.assert_array_equal(source.labels(), whole['label'])  # the folder of a torn image tells its class
    assert len(source) == N
    np.testing.assert_array_equal(source.keys(), source.source.keys())


def test_a_bad_record_is_tried_once(folder):
    damage(folder, 3)
    source = Skipping(image_folder(dir=str(folder), image_size=8).splits['all'], 'all', BadRecords(share=0.2))
    everything(source)
    calls = []
    read = source.source.__class__.__getitem__
    source.source.__class__.__getitem__ = lambda self, indices: calls.append(len(indices)) or read(self, indices)
    try:
        everything(source)
    finally:
        source.source.__class__.__getitem__ = read
    assert calls == [N - 1]


def test_salvage_costs_little():
    read = []

    def reader(indices):
        read.append(len(indices))
        if 77 in indices:
            raise BadRecordError('shard', 77, 'torn')
        return {'x': indices}

    block, errors = salvage(reader, np.arange(128))
    assert (list(errors), len(block['x'])) == ([77], 127)
    assert 77 not in block['x']
    assert sum(read) < 3 * 128
    assert errors[77].__traceback__ is None


def batches(folder, steps, records, *overrides):
    """The batches of some steps, each from splits of their own, as a resumed run has them."""
    experiment = skip_of(folder, *overrides)
    splits, _ = build_splits(experiment.data, records)
    plan = plan_of(splits['train'], 16, experiment.seed)
    feed = HostFeed(splits['train'], plan, meshes.batch_sharding(meshes.make_mesh(1)))
    return [host(feed(k)) for k in steps]


def test_a_batch_is_the_same_from_any_start_and_the_count_survives(folder, tmp_path):
    damage(folder, 3, 4, 39)
    path = tmp_path / 'bad_records.jsonl'
    straight = batches(folder, range(6), BadRecords(path, 0.2))
    assert sum(batch['bad'].sum() for batch in straight) >= 3
    lines = path.read_text()
    for start in (0, 2, 5):
        records = BadRecords(path, 0.2)
        assert records.count == 3
        for a, b in zip(straight[start:], batches(folder, range(start, 6), records), strict=True):
            assert set(a) == set(b) >= {'image', 'label', 'mask', 'bad', 'id', 'epoch'}
            for key in a:
                np.testing.assert_array_equal(a[key], b[key])
        assert records.count == 3
    assert path.read_text() == lines
    entries = [json.loads(line) for line in lines.splitlines()]
    assert {entry['split'] for entry in entries} == {'all'}
    assert sorted(entry['record'] for entry in entries) == [3, 4, 39]
    assert all(pathlib.Path(entry['shard']).exists() and 'cannot be decoded' in entry['reason'] for entry in entries)


def test_more_than_the_share_stops_now_and_after_resuming(folder, tmp_path):
    damage(folder, 3, 4, 39)
    path = tmp_path / 'bad_records.jsonl'
    source = image_folder(dir=str(folder), image_size=8).splits['all']
    first = Skipping(source, 'all', BadRecords(path, share=2 / N))
    assert first[np.array([3, 4])]['bad'].all()  # as many as are allowed
    with pytest.raises(BadRecordError, match=rf"3 of {N} records of split 'all' are bad, more than config.data.max_bad_share"):
        first[np.array([39])]
    with pytest.raises(BadRecordError, match='max_bad_share') as caught:
        Skipping(source, 'all', BadRecords(path, share=2 / N))[np.array([3])]  # though this one alone was allowed
    assert 'raise config.data.max_bad_share' in caught.value.fix
    assert Skipping(source, 'all', BadRecords(path, share=3 / N))[np.array([39])]['bad'].all()
    with pytest.raises(BadRecordError, match='1 of 40'):
        Skipping(source, 'all', BadRecords(share=0.0))[np.array([3])]


def test_the_share_counts_each_split_apart():
    records = BadRecords(share=0.1)
    for split in ('train', 'test'):
        records.note(split, BadRecordError('shard', 1, 'torn'), 10)
        records.note(split, BadRecordError('shard', 1, 'torn'), 10)
    assert records.count == 2
    with pytest.raises(BadRecordError, match="split 'test'"):
        records.note('test', BadRecordError('other', 1, 'torn'), 10)


def test_a_torn_last_line_of_the_count_is_left_out(tmp_path):
    path = tmp_path / 'bad_records.jsonl'
    for record in (1, 2):
        BadRecords(path, 1.0).note('train', BadRecordError('shard', record, 'torn'), 10)
    path.write_bytes(path.read_bytes()[:-9])
    assert BadRecords(path, 1.0).count == 1


def test_processes_write_apart_and_begin_with_what_all_know(tmp_path):
    path = tmp_path / 'bad_records.jsonl'
    main, other = BadRecords(path, 0.3), BadRecords(path, 0.3, process=1)
    main.note('train', BadRecordError('shard', 1, 'torn'), 10)
    for record in (1, 2, 3):
        other.note('train', BadRecordError('shard', record, 'torn'), 10)
    assert {file.name: file.read_text().count('\n') for file in tmp_path.iterdir()} == {
        'bad_records.jsonl': 1,
        'bad_records.1.jsonl': 3,
    }
    assert [BadRecords(path, 0.3, process).count for process in (0, 1, 2)] == [3, 3, 3]
    with pytest.raises(BadRecordError, match='4 of 10'):
        BadRecords(path, 0.3, process=2).note('train', BadRecordError('shard', 4, 'torn'), 10)


def test_without_a_good_record_it_stops(folder):
    damage(folder, *range(0, N))
    with pytest.raises(BadRecordError):
        build_splits(skip_of(folder).data)
    with pytest.raises(BadRecordError):
        Skipping(image_folder(dir=str(folder), image_size=8).splits['all'], 'all', BadRecords(share=1.0))[np.array([0])]


def test_a_key_called_bad_is_refused():
    source = Skipping(ArraySource({'bad': np.zeros(3)}), 'train', BadRecords())
    with pytest.raises(UsageError, match="have a key 'bad'"):
        source[np.array([0])]


# ---- masks


@pytest.mark.parametrize('make', [HostFeed, DeviceFeed])
def test_masks_in_training_and_evaluation(folder, mesh, make):
    damage(folder, 0, 4, 39)  # 0 is also what fills up the last batch of an evaluation
    source = Skipping(image_folder(dir=str(folder), image_size=8).splits['all'], 'all', BadRecords(share=0.2))
    sharding = meshes.batch_sharding(mesh)
    seen, evaluation = [], EvaluationPlan(N, 16)
    for k in range(len(evaluation)):
        batch = host(make(source, evaluation, sharding)(k))
        real = 16 * k + np.arange(16) < N
        bad = np.isin(batch['id'], [0, 4, 39])
        np.testing.assert_array_equal(batch['mask'], (real & ~bad).astype(np.float32))
        np.testing.assert_array_equal(batch['bad'], real & bad)
        seen += batch['id'][batch['mask'] > 0].tolist()
    assert seen == [i for i in range(N) if i not in (0, 4, 39)]
    batch = host(make(source, TrainPlan(N, 40, 0), sharding)(0))
    assert (batch['mask'].sum(), batch['bad'].sum(), batch['mask'].dtype) == (37, 3, np.float32)


def test_masks_of_tokens():
    batch = {'bad': np.array([False, True, True]), 'mask': np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], np.float32)}
    for found in (without_bad(batch), jax.jit(without_bad)(batch)):
        np.testing.assert_array_equal(found['mask'], [[1, 1, 0], [0, 0, 0], [0, 0, 0]])
        np.testing.assert_array_equal(found['bad'], [False, True, False])  # the last one was padding


def parts_of(experiment, devices):
    mesh = meshes.make_mesh(devices)
    splits, spec = build_splits(experiment.data)
    task = build.make_task(experiment, spec)
    facts = build.measure(experiment, task, spec, splits['train'])
    parts = build.make_parts(experiment, task, spec, mesh, build.learning_rate(experiment.optimizer, facts))
    return parts, mesh, splits['train'], task, spec


@pytest.mark.parametrize(
    ('devices', 'overrides'),
    [(1, ()), (8, ()), (8, ('parallel.compile=pmap',)), (2, ('train.accumulate=2',)), (1, ('data.augment=flip, mixup',))],
)
def test_a_step_counts_bad_records_and_learns_nothing_from_them(folder, devices, overrides):
    damage(folder, 3, 4, 39)
    experiment = skip_of(folder, *overrides)
    parts, mesh, source, _, spec = parts_of(experiment, devices)
    assert spec.examples['bad'] == ((), np.dtype(bool))
    assert parts.batch['bad'].dtype == bool
    compiled, state = build.compile_parts(parts, experiment, mesh), parts.init()
    feed = HostFeed(source, plan_of(source, 16, experiment.seed), meshes.batch_sharding(mesh))
    bad = 0
    for k in range(3):
        batch = feed(k)
        count = int(np.asarray(batch['bad']).sum())
        state, terms = compiled(state, batch)
        assert [float(x) for x in terms['bad_records']] == [count, 1.0]
        assert float(terms['loss'][1]) == 16 - count
        assert np.isfinite(float(terms['loss'][0]))
        bad += count
    assert bad >= 3


def test_what_a_bad_row_holds_does_not_matter(folder):
    damage(folder, 3, 4, 39)
    experiment = skip_of(folder, 'data.augment=mixup')
    parts, mesh, source, _, _ = parts_of(experiment, 1)
    compiled = build.compile_parts(parts, experiment, mesh)
    results = []
    for garbage in (0, 255):
        block = source[np.arange(16)]
        block['image'][block['bad']] = garbage
        rest = {'mask': np.ones(16, np.float32), 'id': np.arange(16, dtype=np.int32), 'epoch': np.zeros(16, np.int32)}
        batch = jax.device_put(without_bad({**block, **rest}), meshes.batch_sharding(mesh))
        results.append(jax.device_get(compiled(parts.init(), batch)[0].params))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_stop_leaves_the_step_as_it_was(folder):
    experiment = data_of(folder)
    parts, mesh, source, _, _ = parts_of(experiment, 1)
    feed = HostFeed(source, plan_of(source, 16, experiment.seed), meshes.batch_sharding(mesh))
    _, terms = build.compile_parts(parts, experiment, mesh)(parts.init(), feed(0))
    assert 'bad_records' not in terms
    assert 'bad' not in parts.batch


def test_counted_passes_batches_without_bad():
    plain = lambda state, batch: (state, {'loss': (1.0, 1.0)})  # noqa: E731
    assert step.counted(plain, None)(0, {'mask': np.ones(2)}) == (0, {'loss': (1.0, 1.0)})


def test_an_evaluation_leaves_bad_records_out(folder):
    good = [i for i in range(N) if i not in (0, 4, 39)]
    clean = everything(image_folder(dir=str(folder), image_size=8).splits['all'])
    damage(folder, 0, 4, 39)
    experiment = skip_of(folder)
    parts, mesh, source, task, _ = parts_of(experiment, 1)
    evaluator = Evaluator(task, build.build_augmentation(experiment.data.preprocess), mesh)
    variables = parts.init().evaluation_variables
    results = []
    for data in (source, Skipping(ArraySource({k: v[good] for k, v in clean.items()}), 'all', BadRecords())):
        plan = EvaluationPlan(len(data), 16)
        results.append(evaluator(variables, HostFeed(data, plan, meshes.batch_sharding(mesh)), len(plan)))
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        np.testing.assert_allclose(value, results[1][name], rtol=1e-6, err_msg=name)


# ---- with what comes behind


def test_the_fingerprint_of_files_does_not_change_by_damage(folder):
    before = fingerprint(build_splits(data_of(folder).data)[0]['train'])
    damage(folder, 0, 4)
    splits, spec = build_splits(skip_of(folder, 'data.test=0.25', 'data.budget=50%').data)
    assert sum(spec.class_counts) == len(splits['train'])
    assert everything(splits['train'])['bad'].sum() + everything(splits['test'])['bad'].sum() <= 2
    assert fingerprint(build_splits(skip_of(folder).data)[0]['train']) == before


def test_data_in_memory_stop_at_the_start_inside_a_mixture():
    whole, torn = (ArraySource({'x': np.arange(3.0)}) for _ in range(2))
    torn.errors = {1: BadRecordError('corpus.bin', 1, 'torn')}
    check_loaded(DataSet('m', {'train': Mixture([whole, whole], None, (None, None))}))
    with pytest.raises(BadRecordError, match=r'corpus\.bin, record 1'):
        check_loaded(DataSet('m', {'train': Mixture([whole, torn], None, (None, None))}))


def test_few_labels_and_mixtures(folder):
    damage(folder, 0, 4)
    raw = image_folder(dir=str(folder), image_size=8)
    mixed = Mixture([raw.splits['all'], raw.splits['all']], (3, 1), (None, None))  # its first record is bad
    records = BadRecords(share=0.1)
    wrapped = skipping(DataSet('m', {'train': mixed}, raw.class_names), records).splits['train']
    assert isinstance(wrapped, Mixture)
    block = everything(wrapped)
    np.testing.assert_array_equal(np.flatnonzero(block['bad']), [0, 4, N, N + 4])
    assert records.count == 2  # the same files
    labelled = few_labels.few_labels(labels='10 examples', unlabelled=3)(
        DataSet('p', {'train': Skipping(raw.splits['all'], 'train', records)}, raw.class_names)
    ).splits['train']
    found = everything(labelled)
    assert {'bad', 'labelled', 'label'} <= set(found)
    assert found['bad'].sum() in (2, 3, 4)


class Documents(ArraySource):
    """Texts and numbers of which some cannot be read."""

    def __init__(self, arrays, torn):
        super().__init__(arrays)
        self.torn = torn

    def __getitem__(self, indices):
        for index in np.asarray(indices).tolist():
            if index in self.torn:
                raise BadRecordError('corpus.bin', index, 'torn')
        return super().__getitem__(indices)


def documents(torn=(1,)):
    texts = np.array(['abc', 'never seen', 'de', 'fghi'], object)
    numbers = np.array([[1.0], [1000.0], [3.0], [5.0]], np.float32)
    return Documents({'text': texts, 'numeric': numbers, 'label': np.arange(4, dtype=np.int32)}, torn)


def skipped(transform):
    source = Skipping(documents(), 'train', BadRecords(share=0.5))
    return transform(DataSet('d', {'train': source}, tokenizer=Bytes())).splits['train']


def test_padded_rows_of_bad_documents_are_marked():
    block = everything(skipped(sequences.pad(length=8)))
    np.testing.assert_array_equal(block['bad'], [False, True, False, False])
    assert block['segment'][1].sum() == 1  # sep alone
    assert block['segment'][[0, 2, 3]].any(axis=1).all()


@pytest.mark.parametrize('transform', [sequences.windows(length=4), packing.pack(length=8)])
def test_windows_and_packed_rows_see_nothing_of_a_bad_document(transform):
    found = everything(skipped(transform))['tokens']
    kept = np.array([0, 2, 3])
    good = ArraySource({key: column[kept] for key, column in documents().arrays.items()})
    np.testing.assert_array_equal(
        found, everything(transform(DataSet('d', {'train': good}, tokenizer=Bytes())).splits['train'])['tokens']
    )


def test_a_bad_document_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    monkeypatch.setenv('FULCRUM_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr('research.data.token_table.MEMORY_LIMIT', 0)
    empty = ArraySource({'text': np.array(['abc', '', 'de'], object)})
    bad = Skipping(Documents({'text': np.array(['abc', 'x', 'de'], object)}, (1,)), 'train', BadRecords(share=0.5))
    lengths = [tokenise(source, 'text', Bytes(), after=[258]).lengths.tolist() for source in (empty, bad, empty)]
    assert lengths == [[4, 1, 3], [4, 0, 3], [4, 1, 3]]


def test_tagged_rows_of_bad_sentences_are_marked():
    words, tags = np.array(['a bc', 'x', 'd'], object), np.int32([[0, 1], [1, -1], [1, -1]])
    for torn in ((1,), (0,), (0, 1, 2)):
        source = Skipping(Documents({'words': words, 'tags': tags}, torn), 'train', BadRecords(share=1.0))
        if len(torn) == 3:  # nothing is known of the shape of a good one
            with pytest.raises(BadRecordError):
                tag_rows(length=8)(DataSet('d', {'train': source}, ('O', 'X'), Bytes()))
            continue
        block = everything(tag_rows(length=8)(DataSet('d', {'train': source}, ('O', 'X'), Bytes())).splits['train'])
        np.testing.assert_array_equal(block['bad'], np.isin(np.arange(3), torn))
        assert (block['tag'][block['bad']] == -1).all()
        assert (block['tag'] >= 0).sum(1).tolist() == [0 if i in torn else n for i, n in enumerate((2, 1, 1))]


def test_windows_and_packed_rows_of_bad_documents_have_no_mask_and_are_the_same_again():
    for transform in (sequences.windows(length=4), packing.pack(length=8)):
        block, again = everything(skipped(transform)), everything(skipped(transform))
        assert 'bad' not in block
        for key in block:
            np.testing.assert_array_equal(block[key], again[key])
        text = Bytes().decode(block['tokens'].reshape(-1))
        assert set('abcdefghi') <= set(text)
        assert not set('nvr') & set(text)


def test_a_scale_is_not_learnt_from_bad_rows():
    block = everything(skipped(columns.standardise()))
    np.testing.assert_allclose(block['numeric'][[0, 2, 3], 0], [-1.2247, 0, 1.2247], atol=1e-4)


def test_damaged_caches_are_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv('FULCRUM_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr('research.data.token_table.MEMORY_LIMIT', 0)
    texts = np.array(['some text', 'and more of it'], object)

    def rows():
        source = ArraySource({'text': texts})
        data = sequences.windows(length=4)(DataSet('d', {'train': source}, tokenizer=Bytes()))
        return everything(data.splits['train'])['tokens']

    want = rows()
    kept = [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]
    assert len(kept) == 2
    for path in kept:
        for size in (0, 8):
            whole = path.read_bytes()
            path.write_bytes(whole[:size])
            np.testing.assert_array_equal(rows(), want)
            assert path.read_bytes() == whole


def test_the_settings():
    config = schema.default_config()
    assert (config.data.on_bad_record, config.data.max_bad_share) == ('stop', 0.01)
    config.data.on_bad_record = 'ignore'
    with pytest.raises(UsageError, match='on_bad_record'):
        schema.resolve(config)
    config.data.on_bad_record = 'skip'
    changes = schema.differences(schema.resolve(schema.default_config()), schema.resolve(config))
    assert [(change.path, change.resumable) for change in changes] == [('data.on_bad_record', True)]


def test_text_of_a_parquet_file_that_is_none_is_refused(tmp_path):
    path, read = make_parquet(tmp_path)
    content = path.read_bytes()
    assert b'west' in content
    path.write_bytes(content.replace(b'west', b'w\xffst'))
    with pytest.raises(UsageError, match=r'a\.parquet (is damaged|cannot be read): '):
        read()


def test_lines_of_the_record_that_say_nothing_are_passed_over(tmp_path):
    path = tmp_path / 'bad_records.jsonl'
    path.write_text('{"other": 1}\n{"split": "train", "shard": "a", "record": 3}\n')
    assert BadRecords(path).count == 1


def test_a_source_with_an_order_of_its_own_is_not_wrapped():
    class Ordered:
        def plan(self, batch_size, seed): ...

        def __len__(self):
            return 4

    with pytest.raises(UsageError, match='says the order of training itself'):
        skipping(DataSet(name='ordered', splits={'train': Ordered()}), BadRecords())
