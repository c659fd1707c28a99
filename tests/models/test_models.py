import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from research.core.errors import UsageError
from research.models import layers
from research.models.cnn import CNN
from research.models.mlp import MLP


@pytest.mark.parametrize(('shape', 'window'), [((2, 8, 8, 3), 2), ((1, 7, 5, 2), 2), ((2, 9, 10, 1), 3), ((1, 4, 4, 1), 4)])
def test_max_pool_has_the_values_and_gradients_of_flax(shape, window):
    x = jax.random.normal(jax.random.key(0), shape)  # without ties
    weights = jax.random.normal(jax.random.key(1), layers.max_pool(x, window).shape)
    reference = functools.partial(nn.max_pool, window_shape=(window, window), strides=(window, window))
    np.testing.assert_array_equal(layers.max_pool(x, window), reference(x))
    ours, theirs = (
        jax.grad(lambda x, f=f: jnp.sum(f(x) * weights))(x) for f in (lambda x: layers.max_pool(x, window), reference)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_max_pool_shares_the_gradient_of_a_tie_and_is_zero_behind_relu():
    tied = jnp.ones((1, 2, 2, 1))
    np.testing.assert_allclose(jax.grad(lambda x: layers.max_pool(x, 2).sum())(tied), np.full((1, 2, 2, 1), 0.25))
    dead = -tied
    np.testing.assert_array_equal(jax.grad(lambda x: layers.max_pool(nn.relu(x), 2).sum())(dead), 0)


def test_max_pool_compiles_to_no_select_and_scatter():
    text = jax.jit(jax.grad(lambda x: layers.max_pool(x, 2).sum())).lower(jnp.ones((1, 4, 4, 1))).as_text()
    assert 'select_and_scatter' not in text


def parameters(module, shape):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), jnp.ones(shape))['params']))


def test_size_tables_are_true():
    assert parameters(CNN(10), (1, 32, 32, 3)) == 122_570
    assert parameters(CNN(10, padding='SAME', hidden=(128,)), (1, 28, 28, 1)) == 458_570
    assert parameters(MLP(10), (1, 8, 8, 1)) == 4_810


def test_the_cnn_against_a_numpy_convolution():
    module = CNN(3, features=(2,), pool=(2,), hidden=())
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 1)).astype(np.float32)
    variables = module.init(jax.random.key(0), x)
    p = jax.tree.map(np.asarray, variables['params'])
    convolved = np.zeros((2, 3, 3, 2))
    for i in range(3):
        for j in range(3):
            patch = x[:, i : i + 3, j : j + 3, :]
            convolved[:, i, j] = np.einsum('bhwc,hwco->bo', patch, p['Conv_0']['kernel']) + p['Conv_0']['bias']
    pooled = np.maximum(convolved, 0)[:, :2, :2].max((1, 2))  # 3 x 3 pooled by 2: one window, the rest is cut
    expected = pooled @ p['Dense_0']['kernel'] + p['Dense_0']['bias']
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-5, atol=1e-6)


def test_a_padding_for_each_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 1))
    mixed = CNN(3, features=(2, 2), pool=(1, 1), padding=('SAME', 'VALID'), hidden=())
    variables = mixed.init(jax.random.key(0), x)
    valid = CNN(3, features=(2, 2), pool=(1, 1), hidden=())
    bordered = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    np.testing.assert_allclose(mixed.apply(variables, x), valid.apply(variables, bordered), rtol=1e-5, atol=1e-6)


def test_rms_of_an_example_is_that_of_flax():
    x = 3 * jax.random.normal(jax.random.key(0), (4, 6, 5, 8)) + 1
    scale = {'params': {'scale': jax.random.normal(jax.random.key(1), (8,))}}
    ours, theirs = layers.ExampleRMSNorm(), nn.RMSNorm(reduction_axes=(1, 2, 3), feature_axes=-1)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)) == jax.tree.map(
        jnp.shape, theirs.init(jax.random.key(0), x)
    )
    weights = jax.random.normal(jax.random.key(2), x.shape)
    found, expected = (
        jax.value_and_grad(lambda v, x, m=module: (m.apply(v, x) * weights).sum(), (0, 1))(scale, x)
        for module in (ours, theirs)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)


def test_the_cnn_pools_normalises_and_activates():
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 1))
    module = CNN(3, features=(4,), pool=(2,), norm='rms', activation='gelu', hidden=())
    variables = module.init(jax.random.key(0), x)
    p = variables['params']
    y = layers.max_pool(nn.Conv(4, (3, 3), padding='VALID').apply({'params': p['Conv_0']}, x), 2)
    y = nn.gelu(y / jnp.sqrt(jnp.square(y).mean((1, 2, 3), keepdims=True) + 1e-6))
    expected = y.reshape(4, -1) @ p['Dense_0']['kernel'] + p['Dense_0']['bias']
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('norm', ['none', 'batch', 'group', 'rms'])
def test_norms_and_dropout(norm):
    module = CNN(3, features=(4,), pool=(1,), norm=norm, dropout=0.5)
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 1))
    variables = module.init(jax.random.key(0), x)
    assert ('batch_stats' in variables) == (norm == 'batch')
    still = module.apply(variables, x)
    np.testing.assert_array_equal(still, module.apply(variables, x))
    moved, state = module.apply(variables, x, train=True, rngs={'dropout': jax.random.key(1)}, mutable=['batch_stats'])
    assert np.abs(moved - still).max() > 1e-3
    assert bool(state) == (norm == 'batch')


@pytest.mark.parametrize(
    ('module', 'shape', 'message'),
    [
        (CNN(3, activation='rleu'), (1, 32, 32, 3), "activation 'rleu' does not exist"),
        (CNN(3, norm='layer'), (1, 32, 32, 3), "norm 'layer' does not exist"),
        (CNN(3, pool=(2,)), (1, 32, 32, 3), 'model.pool=.* differ in length'),
        (CNN(3, padding=('SAME', 'VALID', 'SMAE')), (1, 32, 32, 3), "padding 'SMAE' does not exist"),
        (CNN(3, padding=('SAME', 'VALID')), (1, 32, 32, 3), 'model.padding=.* differ in length'),
        (CNN(3), (1, 8, 8, 3), "cannot be pooled by 2\n.*set model.padding='SAME'"),
        (CNN(3, pool=(1, 1, 1)), (1, 6, 6, 3), "too small for a convolution\n.*set model.padding='SAME'"),
        (CNN(3, pool=(2, 2, 9), padding='SAME'), (1, 8, 8, 3), 'cannot be pooled by 9'),
    ],
)
def test_mistakes(module, shape, message):
    with pytest.raises(UsageError, match=message):
        module.init(jax.random.key(0), jnp.ones(shape))
