import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from research.core.errors import UsageError
from research.parallel import cache, hardware
from research.parallel import mesh as meshes
from research.parallel.rules import shardings


def test_the_mesh_has_automatic_axes_that_linen_needs():
    mesh = meshes.make_mesh()
    assert dict(mesh.shape) == {'data': 8, 'model': 1}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert meshes.make_mesh(2).size == 2


def test_jax_that_cannot_start_is_told(monkeypatch):
    def broken():
        raise RuntimeError('Unable to initialize backend cuda')

    monkeypatch.setattr(jax, 'devices', broken)
    with pytest.raises(UsageError, match='jax finds no device: Unable to initialize backend'):
        meshes.make_mesh()


@pytest.mark.parametrize(
    ('size', 'parts', 'better'), [(60, 1, '56 or 64'), (3, 1, '8'), (12, 1, '8 or 16'), (64, 16, '128'), (200, 4, '192 or 224')]
)
def test_a_batch_that_cannot_be_shared_names_the_nearest(size, parts, better):
    with pytest.raises(UsageError, match=f'use config.data.batch_size={better}$'):
        meshes.check_divisible(meshes.make_mesh(), size, parts)


TREE = {'a': {'kernel': jax.ShapeDtypeStruct((16, 6), np.float32)}, 'b': jax.ShapeDtypeStruct((), np.int32)}


def test_rules_give_specs():
    found = shardings(meshes.make_mesh(), [('.*/kernel', ('data',)), ('.*', ())], TREE)
    assert found['a']['kernel'].spec == PartitionSpec('data')
    assert found['b'].spec == PartitionSpec()


@pytest.mark.parametrize(
    ('rules', 'message'),
    [
        ([('.*/kernel', ('data',))], "no rule covers 'b'"),
        ([('.*/kernal', ('data',)), ('.*', ())], 'decides no leaf'),
        ([('.*/kernel', ('modle',)), ('.*', ())], 'does not fit a/kernel'),
        ([('.*/kernel', (None, None, 'data')), ('.*', ())], 'does not fit a/kernel'),
        ([('.*/kernel', (None, 'data')), ('.*', ())], "'data' has 8 devices, which do not divide a/kernel"),
    ],
)
def test_mistakes_in_rules(rules, message):
    with pytest.raises(UsageError, match=message):
        shardings(meshes.make_mesh(), rules, TREE)


def test_utilisation_is_of_all_devices_and_unknown_where_the_peak_is():
    chip = types.SimpleNamespace(device_kind='NVIDIA H200')
    assert hardware.utilisation(989e12, [chip, chip], 'bfloat16') == pytest.approx(0.5)
    assert hardware.utilisation(1e12, [chip, types.SimpleNamespace(device_kind='cpu')], 'bfloat16') is None
    assert hardware.peak_flops(jax.devices()[0], 'float32') is None
    assert all(peaks['float32'] <= peaks['bfloat16'] for peaks in hardware.PEAKS.values())


def test_the_cache_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv('FULCRUM_CACHE', str(tmp_path / 'cache'))
    assert cache.problem(cache.folder()) is None
    assert (tmp_path / 'cache').stat().st_mode & 0o777 == 0o700
    (tmp_path / 'cache').chmod(0o770)
    assert 'chmod 700' in cache.problem(cache.folder())
    assert 'no compilation cache' in cache.enable()
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('FULCRUM_CACHE', str(tmp_path / 'file' / 'cache'))
    assert 'cannot be made' in cache.problem(cache.folder())
