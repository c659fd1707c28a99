"""Tensor parallelism and sharded states: where the arrays lie, and that it changes no number."""

import importlib
import inspect
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from research.core import leaves, registry
from research.core.errors import UsageError
from research.core.tables import TABLES
from research.data.build import build_splits
from research.models.presets import GPT2Small
from research.parallel import mesh as meshes
from research.parallel import rules
from research.train import build
from tests.train.conftest import experiment_of
from tests.train.small_text import DECODER, text_experiment, text_parts, trained
from tests.train.test_step import half_masked, train_on_half_masked

SPEC = PartitionSpec


def specs(tree):
    return {name: sharding.spec for name, sharding in leaves.flat(tree).items()}


def shapes(**sizes):
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in sizes.items()}


def assert_close(a, b, tolerance=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def test_the_mesh_has_groups_of_neighbours():
    mesh = meshes.make_mesh(8, 2)
    assert dict(mesh.shape) == {'data': 4, 'model': 2}
    assert [[d.id for d in group] for group in mesh.devices] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert meshes.data_size(mesh) == 4
    meshes.check_divisible(mesh, 4, 1)  # four groups, not eight devices
    with pytest.raises(UsageError, match=r'shared by 4 groups of 2 devices\n  fix: use config.data.batch_size=4 or 8'):
        meshes.check_divisible(mesh, 6, 1)
    with pytest.raises(UsageError, match=r'model_axis=3 does not divide 8 devices\n  fix: use 1, 2, 4, 8'):
        meshes.make_mesh(8, 3)


def test_a_batch_is_the_same_for_the_devices_of_a_group():
    mesh = meshes.make_mesh(8, 2)
    batch = jax.device_put(np.arange(8), meshes.batch_sharding(mesh))
    assert {s.device.id: s.data.tolist() for s in batch.addressable_shards} == {
        d: [d // 2 * 2, d // 2 * 2 + 1] for d in range(8)
    }


def test_rules_are_those_beside_the_class_or_its_base():
    from research.models import transformer

    assert rules.own_rules(GPT2Small(num_outputs=5)) is transformer.PARTITION_RULES
    preset = type('Preset', (Ruled,), {'__module__': 'a_module_without_rules'})
    assert rules.own_rules(preset(num_outputs=5)) is PARTITION_RULES
    plain = type('Plain', (nn.Module,), {'__module__': 'a_module_without_rules'})
    with pytest.raises(UsageError, match='model Plain has none'):
        rules.own_rules(plain())


def test_every_model_of_the_table_has_rules():
    for name in TABLES['model']:
        module, thing = registry.address('model', name).split(':')
        model = getattr(importlib.import_module(module), thing)
        if inspect.isclass(model):  # `pretrained` is a function that gives one of the others
            assert any(hasattr(sys.modules[cls.__module__], 'PARTITION_RULES') for cls in model.__mro__), name


def test_own_rules_fit_every_size_and_every_optimiser():
    mesh = meshes.make_mesh(8, 4)
    own = (('.*up', (None, 'model')), ('.*head', ('model',)), ('.*nowhere', ('model',)), ('.*', ()))
    tree = shapes(up=(6, 8), v_row_up=(6,), head=(10, 2), bias=(8,))
    found = specs(rules.own_shardings(mesh, own, tree))
    assert found == {'up': SPEC(None, 'model'), 'v_row_up': SPEC(), 'head': SPEC(None), 'bias': SPEC()}
    with pytest.raises(UsageError, match="model's own rules partition nothing"):
        rules.own_shardings(mesh, own, shapes(up=(6, 7)))


def test_large_leaves_are_spread_over_what_is_whole():
    mesh = meshes.make_mesh(8, 2)
    tree = {'layers': {'up': jax.ShapeDtypeStruct((64, 8, 16), np.float32)}, **shapes(up=(8, 32), odd=(6, 50), small=(4, 4))}
    layout = {'layers': {'up': SPEC()}, 'up': SPEC(None, 'model'), 'odd': SPEC(), 'small': SPEC()}
    layout = jax.tree.map(lambda spec: NamedSharding(mesh, spec), layout, is_leaf=lambda x: isinstance(x, PartitionSpec))
    found = specs(rules.spread(mesh, layout, tree, minimum=100))
    assert found['layers/up'] == SPEC(None, None, 'data')  # not along the layers
    assert found['up'] == SPEC('data', 'model')
    assert found['odd'] == SPEC()
    assert found['small'] == SPEC()
    again = rules.spread(mesh, rules.spread(mesh, layout, tree, minimum=100), tree, minimum=100)
    assert specs(again) == found


def test_a_decoder_over_four_groups_of_two_equals_one_device():
    shallow = DECODER.replace('depth=2', 'depth=1')
    whole = jax.device_get(trained(text_experiment('train.ema=0.9', model=shallow), 1)[1])
    _, state = trained(text_experiment('train.ema=0.9', 'parallel.model_axis=2', model=shallow))
    for tree in (state.params, state.extra['ema']):
        query = tree['stack']['layers_0']['attention']['query']['kernel']  # (16, 4, 4)
        assert query.sharding.spec == SPEC(None, 'model', None)
        assert {s.data.shape for s in query.addressable_shards} == {(16, 2, 4)}
        assert tree['stack']['layers_0']['feed_forward']['down']['kernel'].sharding.spec == SPEC('model', None)
        assert tree['stack']['final_norm']['scale'].sharding.is_fully_replicated
    assert state.params['embed']['embedding'].sharding.is_fully_replicated  # 11 letters
    assert_close(jax.device_get(state), whole)


def test_a_scanned_decoder_is_cut_along_its_heads_not_its_layers():
    scanned = DECODER.replace(')', ', scan=True)')
    parts, _, _ = text_parts(text_experiment('parallel.model_axis=4', model=scanned))
    query = parts.abstract.params['stack']['layers']['attention']['query']['kernel']  # (2, 16, 4, 4)
    assert query.sharding.shard_shape(query.shape) == (2, 16, 1, 4)


class Ruled(nn.Module):
    """Two dense layers, the first cut by its outputs and the second by its inputs."""

    num_outputs: int

    @nn.compact
    def __call__(self, inputs, train=False):
        x = nn.relu(nn.Dense(32, name='up')(inputs.reshape(inputs.shape[0], -1)))
        return nn.Dense(self.num_outputs, name='head')(x)


PARTITION_RULES = (('.*up/kernel', (None, 'model')), ('.*up/bias', ('model',)), ('.*head/kernel', ('model',)), ('.*', ()))


def test_an_own_model_with_rules_and_a_spread_state_equals_one_device(monkeypatch):
    monkeypatch.setattr(rules, 'SPREAD_MINIMUM', 300)
    model = 'model=tests.parallel.test_model_axis:Ruled'
    _, whole = train_on_half_masked(1, model, 'optimizer=momentum')
    experiment = experiment_of(model, 'optimizer=momentum', 'train.ema=0.9', 'parallel.model_axis=2', 'parallel.fsdp=True')
    mesh = meshes.make_mesh(8, 2)
    splits, spec = build_splits(experiment.data)
    task = build.make_task(experiment, spec)
    facts = build.measure(experiment, task, spec, splits['train'])
    parts = build.make_parts(experiment, task, spec, mesh, build.learning_rate(experiment.optimizer, facts))
    state, compiled = parts.init(), build.compile_parts(parts, experiment, mesh)
    for k in range(4):
        state, _ = compiled(state, half_masked(splits['train'], mesh, 64, k))
    placed = {n: x.sharding.spec for n, x in leaves.flat(state).items() if n.endswith('up/kernel')}  # (64, 32)
    assert len(placed) == 3  # parameter, momentum and average
    assert set(placed.values()) == {SPEC('data', 'model')}
    assert state.params['head']['kernel'].sharding.spec == SPEC('model')  # (32, 10)
    assert_close(jax.device_get(state), whole)


def test_rules_of_the_config_go_before_those_of_the_model():
    given = "parallel.rules=(('.*embed/embedding', (None, 'model')), ('.*', ()))"
    parts, _, _ = text_parts(text_experiment('parallel.model_axis=2', given))
    cut = {n for n, leaf in leaves.flat(parts.abstract).items() if not leaf.sharding.is_fully_replicated}
    assert cut == {'params/embed/embedding'}


def test_pmap_cannot_cut_a_state():
    for key in ('model_axis=2', 'fsdp=True'):
        with pytest.raises(UsageError, match='pmap keeps the whole state on every device'):
            experiment_of('parallel.compile=pmap', f'parallel.{key}')
