"""The regression task: terms against scikit-learn, targets of every shape, padding, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn
from sklearn.metrics import mean_absolute_error, mean_squared_error

from research.core import registry, terms
from research.core.errors import UsageError
from research.data.source import DataSpec
from research.tasks.metrics import summarise
from research.tasks.regress import Regress


class Linear(nn.Module):
    num_outputs: int

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        return nn.Dense(self.num_outputs)(inputs)


def spec(shape=(), dtype=np.float32, class_names=None):
    examples = {'features': ((4,), np.dtype(np.float32)), 'label': (shape, np.dtype(dtype))}
    return DataSpec(examples=examples, class_names=class_names)


def regress(data=None, dtype=jnp.float32, **arguments):
    return Regress(model=Linear, data=data or spec(), dtype=dtype, **arguments)


def draw(shape=(), seed=0, n=12):
    rng = np.random.default_rng(seed)
    return {
        'features': rng.normal(size=(n, 4)).astype(np.float32),
        'label': 3 * rng.normal(size=(n, *shape)).astype(np.float32),
        'mask': np.ones(n, np.float32),
    }


REFERENCES = {
    'mse': mean_squared_error,
    'mae': mean_absolute_error,
    'huber': lambda a, b: scipy.special.huber(0.7, a - b).mean(),
}


def eighths(values):
    return np.round(np.asarray(values) * 8) / 8


@functools.partial(jax.jit, static_argnums=0)
def gradient_and_terms(task, variables, batch):
    def total(params):
        found = task.loss({'params': params}, batch, None, True)[0]
        return found['loss'][0], found

    return jax.grad(total, has_aux=True)(variables['params'])


def fresh(task):
    """Variables as `init` makes them, filled by numpy: much quicker than compiling jax's random numbers for each shape."""
    shapes, rng = jax.eval_shape(task.init, jax.random.key(0), draw()), np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@pytest.mark.parametrize('name', REFERENCES)
@pytest.mark.parametrize('shape', [(), (1,), (3,)])
def test_loss_against_references(name, shape):
    task, batch = regress(spec(shape), loss_function=name, huber_delta=0.7), draw(shape)
    batch['mask'][[0, 5]] = 0
    variables = fresh(task)
    outputs = np.asarray(task.predict(variables, batch), np.float64)
    assert outputs.shape == (12, *(shape or (1,)))
    kept = batch['mask'] > 0
    want = REFERENCES[name](batch['label'].reshape(12, -1)[kept].astype(np.float64), outputs[kept])
    found = task.loss(variables, batch, None, False)[0]['loss']
    assert float(terms.mean(found)) == pytest.approx(want, rel=1e-6) and float(found[1]) == 10


@pytest.mark.parametrize('name', REFERENCES)
@pytest.mark.parametrize('shape', [(), (2,)])
def test_masked_rows_influence_nothing(name, shape):
    """Bit for bit: all numbers are multiples of 1/8, so that no sum rounds and its order does not matter."""
    task, batch = regress(spec(shape), loss_function=name), draw(shape)
    batch = jax.tree.map(eighths, batch)
    variables = jax.tree.map(eighths, fresh(task))
    garbage = {key: value.copy() for key, value in batch.items()}
    for value, bad in (('features', np.inf), ('label', np.nan), ('mask', 0)):
        garbage[value][6:] = bad
    half = {key: value[:6] for key, value in batch.items()}
    jax.tree.map(
        np.testing.assert_array_equal,
        gradient_and_terms(task, variables, garbage),
        gradient_and_terms(task, variables, half),
    )


def test_microbatches_add_up_to_the_whole():
    task, batch = regress(spec((2,)), loss_function='huber'), draw((2,))
    batch['mask'][4] = 0
    variables = fresh(task)
    parts = [
        gradient_and_terms(task, variables, {k: v[take] for k, v in batch.items()}) for take in (slice(0, 5), slice(5, 12))
    ]
    whole = gradient_and_terms(task, variables, batch)
    together = jax.tree.map(lambda a, b: a + b, *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6), together, whole)


def test_class_labels_can_be_regressed():
    task = regress(spec(dtype=np.int32, class_names=tuple('0123456789')))
    batch = draw() | {'label': np.arange(12, dtype=np.int32) % 10}
    variables = fresh(task)
    outputs = np.asarray(task.predict(variables, batch), np.float64)
    found = task.loss(variables, batch, None, False)[0]['loss']
    assert task.num_outputs == 1
    assert float(terms.mean(found)) == pytest.approx(mean_squared_error(batch['label'], outputs), rel=1e-6)


def test_nan_targets_make_the_loss_nan():
    task, batch = regress(), draw()
    variables = fresh(task)
    batch['label'][3] = np.nan
    assert np.isnan(task.loss(variables, batch, None, False)[0]['loss'][0])


def test_bfloat16_keeps_float32_outside():
    task, batch = regress(dtype=jnp.bfloat16), draw()
    variables = fresh(task)
    found = gradient_and_terms(task, variables, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, found))} == {jnp.dtype(jnp.float32)}
    exact = gradient_and_terms(regress(), variables, batch)
    assert float(found[1]['loss'][0]) != float(exact[1]['loss'][0])
    assert float(found[1]['loss'][0]) == pytest.approx(float(exact[1]['loss'][0]), rel=2**-6)


def test_metrics_agree_with_the_loss():
    task, batch = regress(spec((2,))), draw((2,))
    variables = fresh(task)
    outputs = task.predict(variables, batch)
    results = summarise(task.metrics, {name: metric.batch(outputs, batch) for name, metric in task.metrics.items()})
    assert set(results) == {'mse', 'mae', 'r2'}
    assert results['mse'] == pytest.approx(float(terms.mean(task.loss(variables, batch, None, False)[0]['loss'])), rel=1e-6)


def test_the_registry_sees_every_config_field():
    names = {field.name for field in dataclasses.fields(Regress)} - registry.SUPPLIED['task']
    assert set(registry.signature('task', 'regress')) == names


REFUSED = [
    ({'loss_function': 'mes'}, r"'mes' does not exist\n  fix: did you mean 'mse'"),
    ({'huber_delta': 0.0}, 'huber_delta is 0.0'),
    ({'inputs': 'feature'}, "did you mean 'features'"),
    ({'labels': 'target'}, "no 'target'"),
    ({'data': spec((2, 2))}, r'shape \(2, 2\)'),
    ({'metrics': ('accuracy',)}, "'accuracy' is not for this task"),
]


@pytest.mark.parametrize(('arguments', 'message'), REFUSED)
def test_mistakes_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        regress(**arguments)


def test_mixed_examples_count_against_both_targets():
    task, batch = regress(), draw()
    variables = task.init(jax.random.key(0), batch)
    other, share = batch['label'][::-1].copy(), np.linspace(0, 1, 12).astype(np.float32)
    outputs = np.asarray(task.predict(variables, batch))[:, 0]
    expected = share * (outputs - batch['label']) ** 2 + (1 - share) * (outputs - other) ** 2
    found, _ = task.loss(variables, {**batch, 'mix_label': other, 'mix_weight': share}, None, train=True)
    np.testing.assert_allclose(found['loss'][0], expected.sum(), rtol=1e-5)


def test_names_of_classes_are_no_numbers():
    regress(spec(dtype=np.int32, class_names=('0', '1', '2')))
    with pytest.raises(UsageError, match="'label' holds classes \\(cat, dog\\)"):
        regress(spec(dtype=np.int32, class_names=('cat', 'dog')))
