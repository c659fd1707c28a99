"""The step: exact under masks, microbatches and devices; the wrappers do what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import rng
from research.core.errors import UsageError
from research.data.build import build_splits
from research.parallel import mesh as meshes
from research.train import build, step
from research.train import state as states
from tests.train.conftest import experiment_of


def parts_of(experiment, devices):
    mesh = meshes.make_mesh(devices)
    splits, spec = build_splits(experiment.data)
    task = build.make_task(experiment, spec)
    facts = build.measure(experiment, task, spec, splits['train'])
    rate = build.learning_rate(experiment.optimizer, facts)
    return build.make_parts(experiment, task, spec, mesh, rate), mesh, splits['train'], task


def half_masked(source, mesh, size, step_number):
    """A batch of real digits whose second half (and one row of the first) is masked and holds garbage."""
    indices = np.arange(size) + step_number * size
    block = source[indices]
    mask = (np.arange(size) < size // 2).astype(np.float32)
    mask[1] = 0
    block['label'] = np.where(mask > 0, block['label'], 9).astype(np.int32)
    block['image'] = np.where(mask[:, None, None, None] > 0, block['image'], 255).astype(np.uint8)
    batch = {**block, 'mask': mask, 'id': indices.astype(np.int32), 'epoch': np.zeros(size, np.int32)}
    return jax.device_put(batch, meshes.batch_sharding(mesh))


def train_on_half_masked(devices, *overrides, steps=4):
    experiment = experiment_of('train.ema=0.9', *overrides)
    parts, mesh, source, _ = parts_of(experiment, devices)
    compiled = build.compile_parts(parts, experiment, mesh)
    state, losses = parts.init(), []
    for k in range(steps):
        state, terms = compiled(state, half_masked(source, mesh, 64, k))
        assert float(terms['loss'][1]) == 31
        losses.append(float(terms['loss'][0] / terms['loss'][1]))
    return np.array(losses), jax.device_get(state)


def assert_states_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope='module')
def one_device():
    return train_on_half_masked(1)


@pytest.mark.parametrize('devices', [2, 8])
@pytest.mark.parametrize('kind', ['jit', 'pmap'])
def test_jit_and_pmap_on_many_devices_equal_one_device(one_device, devices, kind):
    losses, state = train_on_half_masked(devices, f'parallel.compile={kind}')
    np.testing.assert_allclose(losses, one_device[0], atol=1e-6, rtol=0)
    assert_states_close(state, one_device[1], 1e-6)


@pytest.mark.parametrize('kind', ['jit', 'pmap'])
def test_augmentation_is_the_same_on_any_devices(kind):
    augment = 'data.augment=pad_crop(padding=1), mixup, cutmix'
    losses, _ = train_on_half_masked(1, augment)
    assert np.abs(losses - train_on_half_masked(1)[0]).max() > 1e-3
    np.testing.assert_allclose(train_on_half_masked(8, augment, f'parallel.compile={kind}')[0], losses, atol=1e-6)


@pytest.mark.parametrize(('devices', 'kind'), [(1, 'jit'), (8, 'jit'), (4, 'pmap')])
@pytest.mark.parametrize('count', [2, 8])
def test_accumulation_equals_the_whole_batch_under_ragged_masks(one_device, count, devices, kind):
    losses, state = train_on_half_masked(devices, f'train.accumulate={count}', f'parallel.compile={kind}')
    np.testing.assert_allclose(losses, one_device[0], atol=1e-6, rtol=0)
    assert_states_close(state, one_device[1], 1e-6)


def test_masked_rows_change_nothing():
    experiment = experiment_of()
    parts, mesh, source, _ = parts_of(experiment, 1)
    compiled = jax.jit(parts.step)
    batch = half_masked(source, mesh, 64, 0)
    keep = np.flatnonzero(np.asarray(batch['mask']))
    alone = {k: v[keep] for k, v in batch.items()}
    a, b = compiled(parts.init(), batch)[0], compiled(parts.init(), alone)[0]
    assert_states_close(a.params, b.params, 1e-6)


def test_a_wholly_masked_batch_is_survived_without_a_change():
    experiment = experiment_of('optimizer=sgd')
    parts, mesh, source, _ = parts_of(experiment, 1)
    batch = half_masked(source, mesh, 64, 0)
    batch['mask'] = jnp.zeros(64)
    before = parts.init()
    after, _ = jax.jit(parts.step)(before, batch)
    for x, y in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_bfloat16_computes_low_and_keeps_parameters_high():
    low, low_state = train_on_half_masked(1, 'train.precision=bfloat16')
    high, _ = train_on_half_masked(1)
    assert 0 < np.abs(low - high).max() < 0.02
    assert {leaf.dtype for leaf in jax.tree.leaves(low_state.params)} == {np.dtype('float32')}


def plain_step(decay=None, optimizer='sgd', **more):
    """A step on one parameter w with loss w * x; the gradient is the mean of x."""

    class Line:
        def init(self, key, batch):
            return {'params': {'w': jnp.ones(())}}

        def loss(self, variables, batch, rngs, train):
            loss = jnp.sum(variables['params']['w'] * batch['x'])
            return {'loss': (loss, jnp.float32(len(batch['x'])))}, {}

    import optax

    task, tx = Line(), optax.sgd(0.1, momentum=0.9)
    extras = {'skips': step.no_skips, 'ema': lambda p: jax.tree.map(jnp.copy, p)}
    state = states.init(task, lambda params: tx, extras, 0, None)
    return state, step.make_step(step.gradients_of(task), tx, 0)


def test_the_guard_leaves_every_bit_but_counts():
    state, one = plain_step()
    guarded = jax.jit(step.guarded(step.averaged(one, 0.5)))
    state, _ = guarded(state, {'x': jnp.array([1.0, 2.0])})
    before = jax.device_get(state)
    for k, bad in enumerate((jnp.nan, jnp.inf), start=1):
        state, terms = guarded(state, {'x': jnp.array([1.0, bad])})
        assert int(state.extra['skips']['in_a_row']) == k
        assert float(terms['skipped'][0]) == 1
        assert np.isnan(terms['loss'][0] / terms['loss'][1])  # weighs nothing
    after = jax.device_get(state)
    assert int(after.step) == int(before.step) + 2
    same = dataclasses.replace(after, step=before.step, extra={**after.extra, 'skips': before.extra['skips']})
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(x, y)
    state, terms = guarded(state, {'x': jnp.array([1.0, 1.0])})
    assert (int(state.extra['skips']['in_a_row']), int(state.extra['skips']['total'])) == (0, 2)
    assert float(terms['skipped'][0]) == 0


def test_the_average_follows_its_formula():
    state, one = plain_step()
    averaged = jax.jit(step.averaged(one, 0.15))
    expected, xs = 1.0, [1.0, -2.0, 0.5, 3.0]
    for k, x in enumerate(xs, start=1):
        state, _ = averaged(state, {'x': jnp.array([x])})
        rate = min(0.15, (1 + k) / (10 + k))
        expected = expected * rate + float(state.params['w']) * (1 - rate)
    np.testing.assert_allclose(state.extra['ema']['w'], expected, rtol=1e-6)
    np.testing.assert_array_equal(state.evaluation_variables['params']['w'], state.extra['ema']['w'])


def test_dropout_is_addressed_by_the_step_and_differs_between_devices_of_pmap():
    seen = []

    def gradients(variables, batch, rngs):
        return {}, {'loss': (jax.random.uniform(rngs['dropout']), jnp.ones(()))}, {}

    keys = {'dropout': rng.key(0, 'dropout', 3)}
    mapped = jax.pmap(lambda x: gradients({}, {}, keys)[1]['loss'][0] + x, axis_name='data')(jnp.zeros(8))
    reduced = jax.pmap(lambda x: step.all_reduce(gradients, 'data')({}, {}, keys)[1]['loss'][0] + x, axis_name='data')(
        jnp.zeros(8)
    )
    assert len(set(np.asarray(mapped).tolist())) == 1
    each = [float(jax.random.uniform(jax.random.fold_in(keys['dropout'], i))) for i in range(8)]
    np.testing.assert_allclose(reduced, np.full(8, sum(each)), rtol=1e-6)
    seen.append(reduced)


def test_parameters_and_batches_are_placed_as_the_rules_say():
    experiment = experiment_of("parallel.rules=(('.*/Dense_0/kernel', (None, 'data')), ('.*', ()))")
    parts, mesh, source, _ = parts_of(experiment, 8)
    state = parts.init()
    spec = jax.sharding.PartitionSpec
    kernel = state.params['Dense_0']['kernel']
    assert kernel.sharding.spec == spec(None, 'data')
    assert {s.data.shape for s in kernel.addressable_shards} == {(64, 2)}
    assert state.params['Dense_1']['kernel'].sharding.spec == spec()
    moments = [
        s for p, s in jax.tree_util.tree_leaves_with_path(state.optimizer_state) if 'Dense_0' in str(p) and 'kernel' in str(p)
    ]
    assert len(moments) == 2
    assert all(m.sharding.spec == spec(None, 'data') for m in moments)
    compiled = build.compile_parts(parts, experiment, mesh)
    after, _ = compiled(state, half_masked(source, mesh, 64, 0))
    assert after.params['Dense_0']['kernel'].sharding.spec == spec(None, 'data')
    whole, _ = jax.jit(parts_of(experiment_of(), 1)[0].step)(
        parts_of(experiment_of(), 1)[0].init(), half_masked(source, meshes.make_mesh(1), 64, 0)
    )
    assert_states_close(jax.device_get(after.params), jax.device_get(whole.params), 1e-6)


def test_the_old_state_is_donated():
    experiment = experiment_of()
    parts, mesh, source, _ = parts_of(experiment, 8)
    for kind in ('jit', 'pmap'):
        changed = dataclasses.replace(experiment, parallel=dataclasses.replace(experiment.parallel, compile=kind))
        parts, mesh, source, _ = parts_of(changed, 8)
        before = parts.init()
        build.compile_parts(parts, changed, mesh)(before, half_masked(source, mesh, 64, 0))
        assert before.params['Dense_0']['kernel'].is_deleted()


def test_partition_rules_are_refused_under_pmap():
    experiment = experiment_of("parallel.rules=(('.*/Dense_0/kernel', (None, 'data')), ('.*', ()))", 'parallel.compile=pmap')
    parts, mesh, _, _ = parts_of(experiment, 8)
    with pytest.raises(UsageError, match='which pmap cannot'):
        build.compile_parts(parts, experiment, mesh)
