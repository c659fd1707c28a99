"""LoRA: exactly the base model at first, frozen bits, merged weights, on every kind of module."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import leaves, registry
from research.core.errors import UsageError
from research.data.build import build_augmentation, build_splits
from research.models.cnn import CNN
from research.models.rnn import RNN
from research.models.transformer import Decoder
from research.tasks.classify import Classify
from research.train import adapters, build, partial, step
from research.train.adapters import Lora, factor_names, matrix, product
from research.train.evaluate import Evaluator
from research.train.evaluate_run import evaluate_run
from research.train.loop import evaluation_feeds
from research.train.state import TrainState
from research.train.weights import read_run
from tests.train.conftest import experiment_of
from tests.train.test_step import half_masked, parts_of

NORMAL = np.random.default_rng(0).normal


class Bare:
    """A task that only has variables, for what `split` and `merge` need."""

    def __init__(self, module, *inputs):
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        self.variables = jax.tree.map(lambda leaf: NORMAL(size=leaf.shape).astype(leaf.dtype), shapes)

    def init(self, rng, batch):
        return self.variables


def flat(tree):
    return {name: np.asarray(leaf) for name, leaf in leaves.flat(tree).items()}


def assert_same_bits(a, b):
    a, b = flat(a), flat(b)
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize(
    ('name', 'shape', 'expected'),
    [
        ('up/kernel', (16, 64), ((), (16,), (64,))),
        ('query/kernel', (16, 4, 4), ((), (16,), (4, 4))),
        ('out/kernel', (4, 4, 16), ((), (4, 4), (16,))),
        ('Conv_0/kernel', (3, 3, 8, 16), ((), (3, 3, 8), (16,))),
        ('embed/embedding', (5, 8), ((), (5,), (8,))),
        ('stack/layers/attention/key/kernel', (3, 16, 1, 4), ((3,), (16,), (1, 4))),
        ('stack/layers/norm/scale', (3, 16), ((3,), (), (16,))),
        ('scale', (), ((), (), ())),
    ],
)
def test_a_kernel_is_a_matrix_of_inputs_by_outputs(name, shape, expected):
    assert matrix(name, shape) == expected


def test_the_product_is_that_of_numpy_layer_by_layer():
    a, b = NORMAL(size=(3, 4, 2, 5)).astype(np.float32), NORMAL(size=(3, 5, 6)).astype(np.float32)
    found = product(jnp.asarray(a), jnp.asarray(b), 'layers/out/kernel')
    assert found.shape == (3, 4, 2, 6)
    for layer in range(3):
        np.testing.assert_allclose(found[layer], np.tensordot(a[layer], b[layer], 1), rtol=1e-5, atol=1e-6)
    found = product(jnp.asarray(a[0, :, 0]), jnp.asarray(b[0]), 'up/kernel')
    np.testing.assert_allclose(found, a[0, :, 0] @ b[0], rtol=1e-5, atol=1e-6)


TOKENS = jnp.zeros((1, 4), jnp.int32)
KINDS = {
    'decoder': (Decoder(num_outputs=5, depth=2, width=8, heads=2, max_length=4), (TOKENS,), None, 4 * (8 + 8) * 2),
    'scanned decoder': (
        Decoder(num_outputs=5, depth=2, width=8, heads=2, max_length=4, scan=True), (TOKENS,), None, 4 * (8 + 8) * 2,
    ),
    'rnn': (
        RNN(num_outputs=3, vocabulary_size=5, hidden=(4,)), (TOKENS,),
        (('.*(input/|recurrent_)kernel', 'lora'), ('.*', 'freeze')), 2 * (4 + 16) + 2 * (4 + 16),
    ),
    'cnn with running statistics': (
        CNN(num_outputs=3, features=(4,), pool=(2,), norm='batch', hidden=()), (jnp.zeros((1, 6, 6, 3)),),
        (('Conv_0/kernel', 'lora'), ('Dense_0/.*', 'train'), ('.*', 'freeze')), 2 * (27 + 4) + 16 * 3 + 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize('kind', KINDS)
def test_it_starts_as_the_base_model_to_the_last_bit(kind):
    module, inputs, rules, trained_numbers = KINDS[kind]
    task = Bare(module, *inputs)
    lora, plain = Lora(task, 2, 16, rules, 0.0), task.variables
    variables = lora.init(jax.random.key(3), {})
    assert_same_bits(lora.merge(variables), plain)
    assert sum(x.size for x in jax.tree.leaves(variables['params'])) == trained_numbers
    assert {k for k in variables if k not in ('params', 'base')} == {k for k in plain if k != 'params'}
    pairs = [factor_names(name) for name in flat(variables['base']) if factor_names(name)[0] in flat(variables['params'])]
    assert pairs
    for a, b in pairs:
        assert flat(variables['params'])[a].std() > 0.01
        assert not flat(variables['params'])[b].any()
    assert len({flat(variables['params'])[a].tobytes() for a, _ in pairs}) == len(pairs)  # each its own draw


def moved(variables):
    """The variables with every factor B away from zero."""
    params = {
        n: jnp.asarray(NORMAL(size=x.shape), jnp.float32) if '/b_' in n else x for n, x in flat(variables['params']).items()
    }
    return {**variables, 'params': leaves.nested(params)}


@pytest.mark.parametrize('kind', ['decoder', 'scanned decoder'])
def test_the_effective_kernel_is_base_plus_scaled_product(kind):
    module, inputs, rules, _ = KINDS[kind]
    lora = Lora(Bare(module, *inputs), 2, 6, rules, 0.0)
    variables = moved(lora.init(jax.random.key(3), {}))
    name = 'stack/layers/attention/query/kernel' if 'scan' in kind else 'stack/layers_1/attention/query/kernel'
    params, base = flat(variables['params']), flat(variables['base'])
    a, b = (params[factor] for factor in factor_names(name))
    a, b, whole = (a[1], b[1], base[name][1]) if 'scan' in kind else (a, b, base[name])
    effective = flat(lora.merge(variables)['params'])[name]
    effective = effective[1] if 'scan' in kind else effective
    np.testing.assert_allclose(effective, whole + 6 / 2 * np.tensordot(a, b, 1), rtol=1e-5, atol=1e-6)


ADAPTED = (
    'adapter=lora(rank=2, rules=(("Dense_0/kernel", "lora"), ("Dense_1/.*", "train"), (".*", "freeze")))',
    "optimizer.rate_rules=(('Dense_1/bias', None), ('.*', 1.0))",
    'model=mlp(hidden=(16,))', 'optimizer=momentum', 'train.ema=0.9', 'data.batch_size=56',
)  # fmt: skip


def trained_on_digits(devices, *overrides):
    """The state before and after three steps, as numpy."""
    experiment = experiment_of(*ADAPTED, *overrides)
    parts, mesh, source, _ = parts_of(experiment, devices)
    state, compiled = parts.init(), build.compile_parts(parts, experiment, mesh)
    before = jax.device_get(state)
    for k in range(3):
        state, _ = compiled(state, half_masked(source, mesh, 56, k))
    return before, jax.device_get(state)


@pytest.fixture(scope='module')
def one_device():
    return trained_on_digits(1)


def test_steps_move_what_is_trained_and_no_bit_of_the_rest(one_device):
    before, after = one_device
    assert_same_bits(before.model_state, after.model_state)
    assert set(flat(after.model_state['base'])) == {'Dense_0/kernel', 'Dense_0/bias'}
    trained = {'Dense_0/a_kernel', 'Dense_0/b_kernel', 'Dense_1/kernel'}
    assert set(flat(after.params)) == set(flat(after.extra['ema'])) == trained | {'Dense_1/bias'}
    for name in trained:
        assert not np.array_equal(flat(after.params)[name], flat(before.params)[name]), name
    moments = {name for name in leaves.names(after.optimizer_state) if 'Dense' in name}
    assert len(moments) == len(trained)  # one momentum each


def test_a_leaf_frozen_by_a_rate_rule_keeps_its_bits_in_the_average_too():
    frozen = {'kernel': NORMAL(size=1000).astype(np.float32)}
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(step=zero, params=frozen, model_state={}, optimizer_state=(), extra={'ema': frozen})
    averaged = jax.jit(step.averaged(lambda state, batch: (dataclasses.replace(state, step=state.step + 1), {}), 0.9))
    for _ in range(3):
        state, _ = averaged(state, {})
    assert_same_bits(state.extra['ema'], frozen)


def test_microbatches_on_many_devices_equal_one(one_device):
    _, after = trained_on_digits(8, 'train.accumulate=7')
    for name, leaf in flat(after).items():
        np.testing.assert_allclose(leaf, flat(one_device[1])[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_under_pmap_what_is_constant_keeps_its_bits():
    """The mean of seven equal numbers is not always that number, so constants must not be averaged."""
    constant = NORMAL(size=1000).astype(np.float32)
    variables = {'params': np.zeros(1), 'base': {'x': constant}, 'teacher': {'x': constant}, 'batch_stats': {'x': constant}}

    def gradients(variables, batch, rngs):
        return batch, {}, {name: variables[name] for name in ('base', 'teacher', 'batch_stats')}

    reduced = jax.pmap(
        lambda batch: step.all_reduce(gradients, 'data')(variables, batch, {})[2], 'data', devices=jax.devices()[:7]
    )(np.zeros(7))
    for name in ('base', 'teacher'):
        for device in range(7):
            np.testing.assert_array_equal(reduced[name]['x'][device], constant)
    np.testing.assert_allclose(reduced['batch_stats']['x'][0], constant, rtol=1e-6)
    assert (np.asarray(reduced['batch_stats']['x'][0]) != constant).any()


def test_merged_weights_need_no_adapter():
    parts, mesh, source, task = parts_of(experiment_of(*ADAPTED), 1)
    variables = moved(parts.init().variables)
    inner, whole = task.task, task.merge(variables)
    assert set(whole) == {'params'}
    batch = half_masked(source, mesh, 56, 0)
    batch['image'] = batch['image'].astype(jnp.float32) / 255
    np.testing.assert_allclose(inner.predict(whole, batch), task.predict(variables, batch), rtol=1e-6)
    assert np.abs(inner.predict(whole, batch) - inner.predict(inner.init(jax.random.key(0), batch), batch)).max() > 0.1


class Sum:
    """A task whose loss is the sum of its one kernel."""

    def __init__(self):
        self.variables = {'params': {'kernel': np.zeros((2000, 3), np.float32)}}

    def init(self, rng, batch):
        return self.variables

    def loss(self, variables, batch, rngs, train):
        return {'loss': (variables['params']['kernel'].sum(), 1.0)}, {}

    def predict(self, variables, batch):
        return variables['params']['kernel'].sum()


def test_what_compares_within_the_batch_still_does():
    assert not Lora(Sum(), 2, 2, None, 0.0).whole_batch
    task = Sum()
    task.whole_batch = True
    assert Lora(task, 2, 2, None, 0.0).whole_batch


def test_dropout_is_for_training_only_and_keeps_the_mean():
    def loss_of(rate, train, seed):
        lora = Lora(Sum(), 2, 2, (('kernel', 'lora'),), rate)
        variables = lora.init(jax.random.key(0), {})
        variables['params'] = {'a_kernel': jnp.ones((2000, 2)), 'b_kernel': jnp.ones((2, 3))}
        return float(lora.loss(variables, {}, {'dropout': jax.random.key(seed)}, train)[0]['loss'][0])

    assert loss_of(0.5, False, 1) == loss_of(0.0, True, 1) == 12000
    drawn = [loss_of(0.5, True, seed) for seed in range(5)]
    assert len(set(drawn)) == 5
    assert all(value % 12 == 0 for value in drawn)  # whole rows, each doubled
    assert np.mean(drawn) == pytest.approx(12000, rel=0.05)


@pytest.mark.parametrize(
    ('adapter', 'message'),
    [
        ('lora(rank=0)', 'rank=0, alpha=16, dropout=0.0 is out of range'),
        ('lora(dropout=1.0)', 'dropout=1.0 is out of range'),
        ('lora(rules=((".*", "frozen"),))', "'.*' has 'frozen'\n  fix: give 'lora', 'train', 'freeze'"),
        ('lora(rank=9)', 'rank=9 is more than stack/layers_0/attention/query/kernel of shape'),
        ('lora(rank=1, rules=((".*scale", "lora"), (".*", "freeze")))', 'rank=1 is more than stack/final_norm/scale'),
        ('lora(rules=((".*", "train"),))', 'adapt no leaf\n  fix: give one of these'),
        ('lora(rules=((".*quary/kernel", "lora"), (".*", "freeze")))', "'.*quary/kernel' decides no leaf"),
    ],
)
def test_mistakes(adapter, message):
    module = Decoder(num_outputs=5, depth=1, width=8, heads=2, max_length=4)
    with pytest.raises(UsageError) as error:
        registry.component('adapter', adapter, 'config.adapter').build(Bare(module, TOKENS)).init(jax.random.key(0), {})
    assert message in str(error.value)


def test_the_size_is_told_as_what_is_trained_of_all():
    params, state = {'a': np.zeros((2, 3)), 'b': np.zeros(4)}, {'base': {'c': np.zeros(100)}, 'teacher': {'d': np.zeros(1000)}}
    assert adapters.describe_size(params, {}, (('.*', 1.0),)) == '10 parameters'
    assert adapters.describe_size(params, {}, (('a', None), ('.*', 1.0))) == '4 of 10 parameters trained'
    assert adapters.describe_size(params, state, (('.*', 1.0),)) == '10 of 110 parameters trained'


def test_from_a_run_to_its_adapter_and_back(run):
    """A run is adapted and evaluated; its merged weights fill a whole model."""
    base, _, path = run('parallel.devices=1', folder='base')
    summary, _, adapted = run(f'init_from={path}', *ADAPTED, 'parallel.devices=1', folder='adapted')
    assert summary['metrics']['test']['loss'] < base['metrics']['test']['loss']
    assert evaluate_run(adapted, [])['newest']['metrics'] == summary['metrics']
    weights, origin = read_run(adapted, 'config.init_from')
    assert origin == f'parameters of step 12 from {adapted}, averaged'
    parts, mesh, _, task = parts_of(experiment_of(), 1)
    variables = partial.renewed(parts.init().variables, weights)
    evaluator = Evaluator(task, build_augmentation(experiment_of().data.preprocess), mesh)
    feeds = evaluation_feeds(experiment_of(), build_splits(experiment_of().data)[0], mesh)
    assert evaluator(variables, *feeds['test'])['loss'] == pytest.approx(summary['metrics']['test']['loss'], rel=1e-5)


def test_an_adapter_serves_any_task_of_the_protocol():
    spec = build_splits(experiment_of().data)[1]
    task = adapters.lora(Classify(model=CNN, data=spec), rank=1, rules=(('Conv_0/kernel', 'lora'), ('.*', 'freeze')))
    assert isinstance(task.module, CNN)
    assert set(task.metrics) == {'accuracy'}
    assert task.constants() == {}
