"""The classification task: terms, padding, precision, model state, mixing, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight

from research.core import registry, terms
from research.core.errors import UsageError
from research.data.source import DataSpec
from research.tasks.classify import Classify

K, FEATURES = 3, 4
SPEC = DataSpec(
    examples={'image': ((FEATURES,), np.dtype(np.float32)), 'label': ((), np.dtype(np.int32))},
    class_names=('a', 'b', 'c'),
    class_counts=(30, 10, 5),
)


class Linear(nn.Module):
    num_outputs: int

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        return nn.Dense(self.num_outputs)(jnp.tanh(nn.Dense(8)(inputs)))


class Stateful(nn.Module):
    """Batch statistics and dropout."""

    num_outputs: int

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(inputs))
        return nn.Dense(self.num_outputs)(nn.Dropout(0.5, deterministic=not train)(x))


def classify(model=Linear, data=SPEC, dtype=jnp.float32, **arguments):
    return Classify(model=model, data=data, dtype=dtype, **arguments)


def draw(seed=0, n=16):
    rng = np.random.default_rng(seed)
    return {
        'image': rng.normal(size=(n, FEATURES)).astype(np.float32),
        'label': rng.integers(0, K, n).astype(np.int32),
        'mask': np.ones(n, np.float32),
        'mix_label': rng.integers(0, K, n).astype(np.int32),
        'mix_weight': rng.random(n).astype(np.float32),
    }


def plain(batch):
    return {key: value for key, value in batch.items() if not key.startswith('mix')}


def rows(batch, take):
    return {key: value[take] for key, value in batch.items()}


def with_garbage(batch, keep):
    """The batch with garbage in all rows that are not kept, and their mask zero."""
    garbage = {'image': np.nan, 'label': -9, 'mix_label': 999, 'mix_weight': np.inf, 'mask': 0}
    return {key: np.where(keep.reshape(-1, *[1] * (v.ndim - 1)), v, garbage[key]).astype(v.dtype) for key, v in batch.items()}


@functools.partial(jax.jit, static_argnums=0)
def gradient_and_terms(task, variables, batch):
    def total(params):
        found, state = task.loss({**variables, 'params': params}, batch, {'dropout': jax.random.key(0)}, True)
        return found['loss'][0], (found, state)

    return jax.grad(total, has_aux=True)(variables['params'])


@functools.partial(jax.jit, static_argnums=0)
def evaluated(task, variables, batch):
    return task.loss(variables, batch, None, False)[0]


@functools.cache
def variables_of(model):
    """Fresh variables, compiled once per model: they do not depend on the task's other arguments."""
    return jax.jit(classify(model).init)(jax.random.key(0), plain(draw()))


VARIANTS = [{}, {'label_smoothing': 0.1, 'focal_gamma': 0.5, 'class_weights': (1.0, 0.5, 3.0)}]


@pytest.mark.parametrize('arguments', VARIANTS)
@pytest.mark.parametrize('mixed', [False, True])
def test_masked_rows_influence_nothing(arguments, mixed):
    task = classify(**arguments)
    batch = draw() if mixed else plain(draw())
    variables = variables_of(task.model)
    keep = np.arange(16) < 8
    half = gradient_and_terms(task, variables, rows(batch, slice(8)))
    zeroed = gradient_and_terms(task, variables, {**batch, 'mask': keep.astype(np.float32)})
    garbage = gradient_and_terms(task, variables, with_garbage(batch, keep))
    jax.tree.map(np.testing.assert_array_equal, garbage, zeroed)
    # Sums over 16 rows and over 8 may be taken in another order; where none rounds they are equal (test_regress).
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), garbage, half)


def test_nan_outputs_of_masked_rows_influence_nothing():
    """A module may make NaN of the zeros that stand in for masked inputs."""
    task, batch = classify(label_smoothing=0.1, focal_gamma=2.0), draw()
    batch['mask'][8:] = 0
    outputs = np.random.default_rng(0).normal(size=(16, K)).astype(np.float32)
    total = jax.jit(jax.value_and_grad(lambda x: task.terms(x, batch)['loss'][0]))
    clean, broken = total(outputs), total(np.where(batch['mask'][:, None] > 0, outputs, np.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, broken)
    assert clean[1][:8].any() and not clean[1][8:].any()


@pytest.mark.parametrize('arguments', VARIANTS)
def test_microbatches_add_up_to_the_whole(arguments):
    task, batch = classify(**arguments), draw(1)
    batch['mask'][[2, 4, 5, 6, 7]] = 0  # 3, 0, 4 and 4 examples count
    variables = variables_of(task.model)
    whole = gradient_and_terms(task, variables, batch)
    parts = [gradient_and_terms(task, variables, rows(batch, slice(i, i + 4))) for i in range(0, 16, 4)]
    together = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), together, whole)


@pytest.mark.parametrize('class_weights', [None, 'balanced', (1.0, 0.0, 2.5)])
def test_loss_and_accuracy_are_those_of_scikit_learn(class_weights):
    task, batch = classify(class_weights=class_weights), plain(draw(2))
    batch['mask'][:3] = 0
    variables = variables_of(Linear)
    found = evaluated(task, variables, batch)
    logits = np.asarray(task.predict(variables, batch), np.float64)[3:]
    labels = batch['label'][3:]
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    weights = {None: np.ones(K), 'balanced': np.array([0.5, 1.5, 3.0])}.get(class_weights, np.array(class_weights))[labels]
    assert float(terms.mean(found['loss'])) == pytest.approx(
        log_loss(labels, probabilities, labels=range(K), sample_weight=weights), rel=2e-6
    )
    assert float(found['loss'][1]) == pytest.approx(weights.sum(), rel=1e-6)
    assert float(terms.mean(found['accuracy'])) == pytest.approx(np.mean(logits.argmax(-1) == labels), rel=1e-6)


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.repeat(np.arange(K), SPEC.class_counts)
    want = compute_class_weight('balanced', classes=np.arange(K), y=labels)
    np.testing.assert_allclose(classify(class_weights='balanced').weight_of_class, want, rtol=1e-7)


def test_mixed_labels_are_weighed():
    task, batch = classify(class_weights=(1.0, 0.5, 3.0), label_smoothing=0.1), draw(3)
    variables = variables_of(task.model)
    share = batch['mix_weight']
    values = [evaluated(task, variables, rows(batch, slice(i, i + 1))) for i in range(16)]
    for i, got in enumerate(values):
        row = rows(plain(batch), slice(i, i + 1))
        first = evaluated(task, variables, row)
        second = evaluated(task, variables, {**row, 'label': batch['mix_label'][i : i + 1]})
        want = jax.tree.map(lambda a, b, w=share[i]: w * a + (1 - w) * b, first, second)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, want)


@pytest.mark.parametrize('label', [-1, K])
def test_a_label_that_is_no_class_makes_the_loss_nan(label):
    task, batch = classify(), plain(draw())
    variables = variables_of(task.model)
    batch['label'][5] = label
    gradient, (found, _) = gradient_and_terms(task, variables, batch)
    assert np.isnan(found['loss'][0]) and all(np.isnan(g).any() for g in jax.tree.leaves(gradient))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_outside():
    batch = plain(draw())
    full, low = classify(Stateful), classify(Stateful, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(low.init, jax.random.key(0), batch))} == {
        np.dtype(np.float32)
    }
    variables = variables_of(Stateful)
    gradient, (found, state) = gradient_and_terms(low, variables, batch)
    predict = jax.jit(low.predict)
    for tree in (variables, gradient, found, state, predict(variables, batch)):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}
    exact = gradient_and_terms(full, variables, batch)[0]
    difference = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), gradient, exact)))
    assert 0 < difference < 0.5  # sums over 16 examples; bfloat16 keeps 8 bits
    text = predict.lower(variables, batch).as_text()
    assert 'dot_general' in text
    assert all('bf16' in line for line in text.splitlines() if 'dot_general' in line)


def test_model_state_changes_in_training_only():
    task, batch = classify(Stateful), plain(draw())
    variables = variables_of(task.model)
    trained = gradient_and_terms(task, variables, batch)[1][1]
    kept = jax.jit(lambda v: task.loss(v, batch, None, False)[1])(variables)
    assert set(trained) == set(kept) == {'batch_stats'}
    jax.tree.map(np.testing.assert_array_equal, kept['batch_stats'], variables['batch_stats'])
    mean = trained['batch_stats']['BatchNorm_0']['mean']
    assert np.abs(mean - variables['batch_stats']['BatchNorm_0']['mean']).max() > 0
    assert jax.tree.structure(trained) == jax.tree.structure(kept)
    stateless = classify()
    assert stateless.loss(variables_of(Linear), batch, None, True)[1] == {}


def test_dropout_follows_its_key():
    task, batch = classify(Stateful), plain(draw())
    variables = variables_of(task.model)
    loss = jax.jit(lambda key: task.loss(variables, batch, {'dropout': key}, True)[0]['loss'][0])
    a, b, c = (loss(jax.random.key(i)) for i in (0, 0, 1))
    assert a == b != c


def test_integer_inputs_reach_the_module_as_they_are():
    seen = []

    class Watch(Linear):
        def __call__(self, inputs, train: bool = False):
            seen.append(inputs.dtype)
            return jnp.zeros((len(inputs), self.num_outputs))

    batch = {'image': np.full((2, FEATURES), 255, np.uint8), 'label': np.zeros(2, np.int32), 'mask': np.ones(2, np.float32)}
    classify(Watch, dtype=jnp.bfloat16).predict({'params': {}}, batch)
    assert seen == [np.dtype(np.uint8)]


def test_the_task_can_be_evaluated_abstractly():
    task, batch = classify(), plain(draw())
    variables = jax.eval_shape(task.init, jax.random.key(0), batch)
    assert variables['params']['Dense_0']['kernel'].shape == (8, K)
    found = jax.eval_shape(lambda v, b: task.loss(v, b, None, True)[0], variables, batch)
    assert {name: tuple(x.shape for x in pair) for name, pair in found.items()} == {'loss': ((), ()), 'accuracy': ((), ())}


def test_metrics_are_made_by_name():
    task, batch = classify(metrics=('accuracy', 'f1')), plain(draw())
    assert list(task.metrics) == ['accuracy', 'f1'] and task.num_outputs == K
    variables = variables_of(task.model)
    metric = task.metrics['accuracy']
    got = metric.compute(metric.batch(task.predict(variables, batch), batch))['accuracy']
    assert got == pytest.approx(float(terms.mean(evaluated(task, variables, batch)['accuracy'])), rel=1e-6)
    assert classify(metrics=task.metrics).metrics == task.metrics


def test_the_registry_sees_every_config_field():
    names = {field.name for field in dataclasses.fields(Classify)} - registry.SUPPLIED['task']
    assert set(registry.signature('task', 'classify')) == names
    built = registry.component('task', {'name': 'classify', 'label_smoothing': 0.1, 'metrics': ['f1']}, 'task').build(
        model=Linear, data=SPEC, dtype=jnp.float32
    )
    assert built.label_smoothing == 0.1 and list(built.metrics) == ['f1']


class FirstColumn(nn.Module):
    """Outputs that say what is on the left."""

    num_outputs: int

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        return nn.Dense(self.num_outputs)(inputs[:, :, 0, 0])


def test_a_flip_in_evaluation_averages_two_views():
    image = ((FEATURES, 5, 1), np.dtype(np.float32))
    data = dataclasses.replace(SPEC, examples={**SPEC.examples, 'image': image})
    plain, task = (classify(FirstColumn, data, test_time_flip=flip) for flip in (False, True))
    batch = {**draw(), 'image': np.random.default_rng(1).normal(size=(16, *image[0])).astype(np.float32)}
    mirrored = {**batch, 'image': batch['image'][:, :, ::-1]}
    variables = task.init(jax.random.key(0), batch)
    found, views = task.predict(variables, batch), [plain.predict(variables, b) for b in (batch, mirrored)]
    np.testing.assert_allclose(found, (views[0] + views[1]) / 2, rtol=1e-6, atol=1e-6)
    assert not np.allclose(found, views[0])
    np.testing.assert_allclose(task.predict(variables, mirrored), found, rtol=1e-6, atol=1e-6)
    in_training = [t.loss(variables, batch, {'dropout': jax.random.key(1)}, train=True)[0]['loss'] for t in (plain, task)]
    np.testing.assert_array_equal(*in_training)
    evaluated = [t.loss(variables, batch, None, train=False)[0]['loss'][0] for t in (plain, task)]
    assert evaluated[0] != evaluated[1]


NUMBERS = DataSpec(examples={'image': ((4,), np.dtype(np.float32)), 'label': ((), np.dtype(np.float32))})
REFUSED = [
    ({'data': NUMBERS}, r"needs classes[^\n]*\n  fix: use task.name='regress'"),
    ({'inputs': 'imge'}, r"no 'imge'\n  fix: did you mean 'image'"),
    ({'labels': 'lable'}, "did you mean 'label'"),
    ({'label_smoothing': 1.0}, r'label_smoothing is 1.0, outside \[0, 1\)'),
    ({'label_smoothing': -0.1}, 'label_smoothing is -0.1'),
    ({'focal_gamma': -1.0}, 'focal_gamma is -1.0'),
    ({'focal_gamma': float('nan')}, 'focal_gamma is nan'),
    ({'test_time_flip': True}, r'test_time_flip mirrors images, not inputs of shape \(4,\)'),
    ({'class_weights': (1.0, 2.0)}, '2 values for 3 classes'),
    ({'class_weights': 'even'}, "class_weights is 'even'"),
    ({'class_weights': (1.0, -1.0, 1.0)}, 'finite numbers >= 0'),
    ({'class_weights': (0.0, 0.0, 0.0)}, 'not all of them 0'),
    ({'class_weights': 'balanced', 'data': dataclasses.replace(SPEC, class_counts=(3, 0, 1))}, r'counts are \(3, 0, 1\)'),
    ({'class_weights': 'balanced', 'data': dataclasses.replace(SPEC, class_counts=None)}, 'counts are None'),
    ({'metrics': ('acuracy',)}, "did you mean 'accuracy'"),
    ({'metrics': ('top5',)}, 'always 1 with 3 classes'),
    ({'metrics': ('r2',)}, "'r2' is not for this task"),
]


@pytest.mark.parametrize(('arguments', 'message'), REFUSED)
def test_mistakes_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        classify(**arguments)
