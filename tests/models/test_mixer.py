"""MLP-Mixer against numpy, its sizes, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import leaves, registry
from research.core.errors import UsageError
from research.models.mixer import PARTITION_RULES, Mixer
from research.parallel.rules import shardings

TINY = {'patch': 4, 'width': 16, 'depth': 2, 'patch_hidden': 12, 'channel_hidden': 24}


def shapes(module, shape):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.ones(shape))


@pytest.mark.parametrize(('name', 'expected'), [('mixer_s16', 18_528_264), ('mixer_b16', 59_880_472)])
def test_the_size_table_is_true(name, expected):
    module = registry.component('model', name, 'model').build(num_outputs=1000)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(module, (1, 224, 224, 3)))) == expected


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def normalised(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']


def dense(x, p):
    return x @ p['kernel'] + p['bias']


def test_the_network_is_that_of_numpy():
    module = Mixer(3, **TINY)
    x = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: rng.normal(0.2, 0.4, leaf.shape).astype(np.float32), shapes(module, x.shape))
    p = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables['params'])
    y = np.stack([x[:, r : r + 4, c : c + 4].reshape(2, -1) for r in (0, 4) for c in (0, 4, 8)], 1)  # (2, 6, 48)
    y = dense(y, {'kernel': p['patch']['kernel'].reshape(48, 16), 'bias': p['patch']['bias']})
    for i in range(2):
        q = p[f'layers_{i}']
        for b in range(2):  # one example at a time, tokens as columns
            columns = normalised(y[b], q['patch_norm']).T
            y[b] += dense(gelu(dense(columns, q['over_patches']['up'])), q['over_patches']['down']).T
        y = y + dense(gelu(dense(normalised(y, q['channel_norm']), q['over_channels']['up'])), q['over_channels']['down'])
    want = dense(normalised(y, p['final_norm']).mean(1), p['head'])
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_it_starts_at_zero_and_drops_out_in_training_only():
    module = Mixer(3, **TINY | {'depth': 1}, dropout=0.5)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    fresh = jax.jit(Mixer(3, **TINY | {'depth': 0}).init)(jax.random.key(0), x)
    assert not fresh['params']['head']['kernel'].any()
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: rng.normal(0.2, 0.4, leaf.shape).astype(np.float32), shapes(module, x.shape))
    trained = jax.jit(lambda key: module.apply(variables, x, train=True, rngs={'dropout': key}))
    assert np.abs(trained(jax.random.key(0)) - trained(jax.random.key(1))).max() > 1e-3
    assert jax.eval_shape(module.apply, variables, x).shape == (2, 3)  # without a key: nothing is drawn


def test_partition_rules_split_the_dense_layers():
    abstract = shapes(Mixer(10, **TINY), (1, 8, 8, 3))
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ('data', 'model'))
    placed = jax.tree.leaves(shardings(mesh, PARTITION_RULES, {'params': abstract['params']}))
    split = {n for n, s in zip(leaves.names(abstract['params']), placed, strict=True) if 'model' in s.spec}
    assert {n for n in split if n.startswith('layers_1')} == {
        f'layers_1/over_{what}/{leaf}' for what in ('patches', 'channels') for leaf in ('up/kernel', 'up/bias', 'down/kernel')
    }
    assert len(split) == 13 and 'head/kernel' in split


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((1, 8, 10, 3), 'an image of 8 x 10 is no whole number of patches of 4 x 4\n.*model.patch'),
        ((1, 8), r"model 'mixer' reads images"),
    ],
)
def test_mistakes(shape, message):
    with pytest.raises(UsageError, match=message):
        shapes(Mixer(3, **TINY), shape)
