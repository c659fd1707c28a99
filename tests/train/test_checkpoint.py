"""Checkpoints: damage is found, leaves are compared, devices do not matter, policies keep and delete what they should."""

import errno
import json
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bench import corruptions
from research.core.errors import NumericalError, StorageError
from research.parallel.mesh import make_mesh
from research.train import manifest, verify
from research.train.checkpoint import TEMPORARY, Checkpoints
from research.train.fingerprint import Fingerprints
from research.train.manifest import CorruptError


@pytest.fixture(scope='module')
def victim(tmp_path_factory):
    return corruptions.Victim(tmp_path_factory.mktemp('victim'))


def abstract_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture
def copy(victim, tmp_path):
    shutil.copytree(victim.folder, tmp_path / 'copy')
    return tmp_path / 'copy'


@pytest.mark.parametrize('damage', sorted(set(corruptions.DAMAGES), key=lambda d: d.__name__), ids=lambda d: d.__name__)
def test_no_damage_to_any_file_is_restored(victim, damage):
    rng = random.Random(damage.__name__)
    outcomes = {name: victim.verified(name, damage, rng) for name in victim.files}
    assert {n: o for n, o in outcomes.items() if o not in ('fell back', 'no change')} == {}
    assert 'fell back' in outcomes.values()  # where zeros, say, replaced zeros, nothing changed


def test_a_flipped_bit_of_the_array_data_is_found_by_its_fingerprint_alone(victim, copy):
    data = max((p for p in (copy / '2' / 'state').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    assert data.stat().st_size > manifest.SMALL
    corruptions.flip(data, random.Random(3))
    manifest.check_files(copy / '2', manifest.read(copy / '2'))  # sizes and small files are as they were
    told = []
    with Checkpoints(copy, keep=2, say=told.append) as checkpoints:
        step, state, meta = checkpoints.newest(victim.abstract)
    assert (step, meta) == (1, {'seconds': {'train': 1.0}})
    assert corruptions.as_bytes(state) == victim.bits[1]
    assert sorted(p.name for p in copy.iterdir()) == ['1', '2.corrupt']
    assert 'is damaged' in told[0]
    assert '2.corrupt' in told[1]


def test_a_folder_without_a_manifest_is_no_checkpoint(victim, copy):
    (copy / '3').mkdir()
    with Checkpoints(copy, keep=2, say=lambda text: None) as checkpoints:
        assert checkpoints.latest() == 2
        assert checkpoints.newest(victim.abstract)[0] == 2


def test_leftovers_go_at_the_next_start_but_not_by_a_reader(copy):
    (copy / '3.tmp' / 'state').mkdir(parents=True)
    (copy / '1.deleted.tmp').mkdir()
    Checkpoints(copy, writable=False).close()
    assert (copy / '3.tmp').exists()
    Checkpoints(copy, keep=2).close()
    assert sorted(p.name for p in copy.iterdir()) == ['1', '2']


def test_what_does_not_fit_is_named_and_nothing_is_put_away(victim, copy):
    state = victim.states[1]
    kernel = state.params['dense']['kernel']
    cases = {
        r'params/dense/kernel is float32\(640, 480\), expected float16\(640, 480\)': {'kernel': kernel.astype('float16')},
        r'params/dense/kernel is float32\(640, 480\), expected float32\(480, 640\)': {'kernel': kernel.T},
        r'params/dense/more is missing': {'kernel': kernel, 'more': kernel},
        r'params/dense/kernel is not expected': {},
    }
    for message, dense in cases.items():
        dense = {'bias': state.params['dense']['bias'], **dense}
        wanted = abstract_of(state.replace(params={**state.params, 'dense': dense}))
        with Checkpoints(copy, keep=2) as checkpoints, pytest.raises(StorageError, match=message):
            checkpoints.newest(wanted)
    assert sorted(p.name for p in copy.iterdir()) == ['1', '2']


def test_state_goes_through_1_2_4_8_devices_and_back(victim, tmp_path):
    spec = PartitionSpec('data')
    state, step = victim.states[2], 2
    prints = Fingerprints(state).by_name()
    for devices in (1, 8, 2, 4, 1):
        mesh = make_mesh(devices)

        def placed(x, mesh=mesh):
            cut = x.ndim > 0 and x.shape[0] % mesh.size == 0
            return NamedSharding(mesh, spec if cut else PartitionSpec())

        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(x)), state)
        with Checkpoints(tmp_path / 'moved', keep=9) as checkpoints:
            checkpoints.save(step, state, {})
            checkpoints.wait()
            assert checkpoints.failure is None
            _, state, _ = checkpoints.newest(wanted)
        assert Fingerprints(state).by_name() == prints
        assert corruptions.as_bytes(state) == victim.bits[2]
        step += 1


def test_fingerprints_notice_every_flipped_bit_and_every_swap():
    rng = np.random.default_rng(0)
    for dtype in ('float32', 'bfloat16', 'int32', 'uint8', 'bool', 'float16'):
        x = np.asarray(jax.numpy.asarray(rng.integers(0, 2, (7, 9))).astype(dtype))
        first = Fingerprints({'x': x}).by_name()
        for _ in range(20):
            y = x.copy()
            flat = y.view(np.uint8).reshape(-1)
            flat[rng.integers(flat.size)] ^= 1 if dtype == 'bool' else 1 << rng.integers(8)
            assert Fingerprints({'x': y}).by_name() != first
        a, b = np.argwhere(x.reshape(-1) != x.reshape(-1)[0])[0][0], 0
        y = x.copy().reshape(-1)
        y[[a, b]] = y[[b, a]]
        assert Fingerprints({'x': y.reshape(x.shape)}).by_name() != first


def test_nan_is_never_saved(victim, tmp_path):
    state = victim.states[1]
    bad = state.replace(extra={**state.extra, 'ema': {**state.extra['ema'], 'half': state.params['half'] * np.nan}})
    with Checkpoints(tmp_path / 'c') as checkpoints:
        with pytest.raises(NumericalError, match=r'the state holds NaN \(extra/ema/half\)'):
            checkpoints.save(1, bad, {})
        assert checkpoints.steps() == []
    assert not (tmp_path / 'c').exists()


def test_the_newest_permanent_ones_and_one_temporary_stay(victim, tmp_path):
    state = victim.states[1]
    kept = []
    with Checkpoints(tmp_path / 'c', keep=2) as checkpoints:
        for step, kind in (
            (1, 'permanent'),
            (2, TEMPORARY),
            (3, TEMPORARY),
            (4, 'permanent'),
            (5, 'permanent'),
            (6, TEMPORARY),
        ):
            checkpoints.save(step, state, {}, kind)
            checkpoints.wait()
            kept.append(checkpoints.steps())
        assert kept == [[1], [1, 2], [1, 3], [1, 4], [4, 5], [4, 5, 6]]
        assert not checkpoints.save(6, state, {})  # the same step is due: the temporary one is made permanent
        checkpoints.save(7, state, {}, TEMPORARY)
        checkpoints.wait()
        assert checkpoints.steps() == [5, 6, 7]


def test_a_save_that_fails_is_told_of_and_leaves_nothing(victim, tmp_path, monkeypatch):
    told, events = [], []
    with Checkpoints(tmp_path / 'c', say=told.append, event=lambda kind, **more: events.append(kind)) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(
                'research.train.manifest.write', lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left on device'))
            )
            assert checkpoints.save(1, victim.states[1], {})
            checkpoints.wait()
        assert 'No space left on device' in checkpoints.failure.reason
        assert list((tmp_path / 'c').iterdir()) == []
        assert events == ['save_failed']
        checkpoints.save(2, victim.states[2], {})
        checkpoints.wait()
        assert checkpoints.failure is None
        assert checkpoints.latest() == 2
    assert 'saved again' in told[-1]


def test_a_disk_without_room_is_noticed_before_anything_is_written(victim, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with Checkpoints(tmp_path / 'c', say=lambda text: None) as checkpoints:
        assert not checkpoints.save(1, victim.states[1], {})
        assert 'MB are needed' in checkpoints.failure.reason


def test_verify_scrubs_a_run_and_gives_good_ones_their_name_back(victim, tmp_path, capsys):
    folder = tmp_path / 'run' / 'checkpoints'
    shutil.copytree(victim.folder, folder)
    verify.report(tmp_path / 'run', [], False)
    assert capsys.readouterr().out.count('good') == 2
    (folder / '1').rename(folder / '1.corrupt')
    data = max((p for p in (folder / '2').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    corruptions.flip(data, random.Random(1))
    with pytest.raises(StorageError, match='1 damaged: checkpoints/2'):
        verify.report(tmp_path / 'run', [], False)
    assert sorted(p.name for p in folder.iterdir()) == ['1', '2.corrupt']
    out = capsys.readouterr().out
    assert 'checkpoints/1  has its name back' in out
    assert 'checkpoints/2  DAMAGED' in out
    assert '; renamed to 2.corrupt' in out
    verify.report(tmp_path / 'run', [], False)  # what was put away counts no more
    assert 'note: nothing needs checkpoints/2.corrupt any more' in capsys.readouterr().out
    shutil.rmtree(folder / '1')
    with pytest.raises(StorageError, match=r'1 damaged: checkpoints/2\.corrupt') as error:
        verify.report(tmp_path / 'run', [], False)
    assert 'from a backup' in error.value.fix


def test_a_good_one_gets_its_name_back_only_where_none_is_good(victim, tmp_path, capsys):
    folder = tmp_path / 'run' / 'checkpoints'
    shutil.copytree(victim.folder, folder)
    (folder / '2').rename(folder / '2.corrupt')
    verify.report(tmp_path / 'run', [], False)  # the run may have gone on from 1, and its record with it
    assert sorted(p.name for p in folder.iterdir()) == ['1', '2.corrupt']
    (folder / '1').rename(folder / '1.corrupt')
    verify.report(tmp_path / 'run', [], False)
    assert sorted(p.name for p in folder.iterdir()) == ['1.corrupt', '2']
    assert 'checkpoints/2  has its name back' in capsys.readouterr().out


def test_a_later_format_is_no_damage(victim, copy, monkeypatch):
    monkeypatch.setattr(manifest, 'FORMAT', 0)
    with Checkpoints(copy, keep=2, say=lambda text: None) as checkpoints, pytest.raises(StorageError, match='has format 1'):
        checkpoints.newest(victim.abstract)
    assert sorted(p.name for p in copy.iterdir()) == ['1', '2']


def test_a_torn_rewrite_of_a_manifest_goes_at_the_next_start(victim, copy):
    (copy / '2' / f'.{manifest.NAME}.123.tmp').write_text('{"for')
    with Checkpoints(copy, keep=2, say=lambda text: None) as checkpoints:
        assert checkpoints.newest(victim.abstract)[0] == 2
    assert not list(copy.rglob('*.tmp'))


def test_a_file_system_that_takes_nothing_is_named(victim, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, 'Read-only file system')

    with Checkpoints(tmp_path / 'c', say=lambda text: None) as checkpoints:
        checkpoints.save(1, victim.states[1], {})
        checkpoints.wait()
        monkeypatch.setattr(pathlib.Path, 'mkdir', refuse)
        assert not checkpoints.save(2, victim.states[2], {})
        assert 'Read-only file system' in checkpoints.failure.reason
        assert checkpoints.latest() == 1


def test_a_reader_falls_back_but_renames_nothing(victim, copy):
    (copy / '2' / 'manifest.json').unlink()
    with Checkpoints(copy, writable=False, say=lambda text: None) as checkpoints:
        assert checkpoints.newest(victim.abstract)[0] == 1
    assert sorted(p.name for p in copy.iterdir()) == ['1', '2']


def test_weights_for_another_run_are_proved_too(victim, copy):
    with Checkpoints(copy, writable=False) as checkpoints:
        model, average = checkpoints.read(2)
        np.testing.assert_array_equal(model['params']['dense']['kernel'], victim.states[2].params['dense']['kernel'])
        np.testing.assert_array_equal(average['half'], victim.states[2].extra['ema']['half'])
    described = json.loads((copy / '2' / 'manifest.json').read_text())
    described['leaves']['params/half']['fingerprint'] = '0' * 16
    manifest.rewrite(copy / '2', {k: v for k, v in described.items() if k != 'digest'})
    with Checkpoints(copy, writable=False) as checkpoints, pytest.raises(StorageError, match='params/half does not hold'):
        checkpoints.read(2)


def test_a_manifest_says_what_is_wrong(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'x').write_text('x')
    manifest.write(tmp_path / 'a', {'step': 1, 'kind': 'permanent', 'leaves': {}, 'meta': {}})
    described = manifest.read(tmp_path / 'a')
    cases: list[tuple[str, str]] = [
        ('x is missing', ''),
        ('x has 2 bytes, expected 1', 'xx'),
        ('x is not what was written', 'y'),
    ]
    for message, content in cases:
        (tmp_path / 'a' / 'x').write_text(content) if content else (tmp_path / 'a' / 'x').unlink()
        with pytest.raises(CorruptError, match=message):
            manifest.check_files(tmp_path / 'a', described)
    (tmp_path / 'a' / 'x').write_text('x')
    pathlib.Path(tmp_path / 'a' / 'stranger').write_text('')
    with pytest.raises(CorruptError, match='stranger does not belong to it'):
        manifest.check_files(tmp_path / 'a', described)
