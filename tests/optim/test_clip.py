"""Clipping against numpy: the norms, what stays untouched, and the units of adaptive clipping for every rank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.errors import UsageError
from research.optim import clip

SHAPES = {'scalar': (), 'bias': (5,), 'dense/kernel': (4, 5), 'conv1/kernel': (3, 4, 5), 'conv2/kernel': (3, 3, 4, 5)}
KINDS = {
    'global_norm': clip.global_norm(max_norm=0.5),
    'block_norm': clip.block_norm(max_norm=0.5),
    'value': clip.value(limit=0.5),
    'adaptive': clip.adaptive(clipping=0.5),
}


def tree(seed, size=1.0, dtype=np.float32):
    draw = np.random.default_rng(seed)
    return {name: np.asarray(size * draw.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def apply(transformation, gradient, params=None):
    params = tree(99) if params is None else params
    clipped, _ = jax.jit(transformation.update)(gradient, transformation.init(params), params)
    return jax.tree.map(np.asarray, clipped)


def length(x, axis=None):
    return np.sqrt(np.sum(np.asarray(x, np.float64) ** 2, axis=axis, keepdims=True))


def assert_close(ours, reference):
    for name in reference:
        np.testing.assert_allclose(ours[name], reference[name], rtol=2e-6, err_msg=name)


@pytest.mark.parametrize('seed', range(3))
def test_global_norm(seed):
    gradient = tree(seed)
    norm = np.sqrt(sum(length(g).item() ** 2 for g in gradient.values()))
    assert norm > 0.5
    assert_close(apply(KINDS['global_norm'], gradient), {k: 0.5 * g / norm for k, g in gradient.items()})


@pytest.mark.parametrize('seed', range(3))
def test_block_norm(seed):
    gradient = tree(seed, 0.3)
    reference = {k: g * min(1.0, 0.5 / length(g).item()) for k, g in gradient.items()}
    assert_close(apply(KINDS['block_norm'], gradient), reference)
    untouched = [k for k, g in gradient.items() if length(g).item() < 0.5]
    assert 0 < len(untouched) < len(gradient)


def test_value():
    gradient = tree(0)
    assert_close(apply(KINDS['value'], gradient), {k: np.clip(g, -0.5, 0.5) for k, g in gradient.items()})


# The axes over which the norm of one output unit is taken, written out for every kind of leaf.
UNITS = [
    ('scale', (), None),
    ('bias', (6,), None),
    ('dense/kernel', (4, 6), (0,)),
    ('one_output/kernel', (4, 1), (0,)),
    ('one_input/kernel', (1, 6), (0,)),
    ('convolution/kernel', (3, 4, 6), (0, 1)),
    ('attention/query/kernel', (4, 2, 3), (0,)),
    ('query/kernel', (4, 2, 3), (0,)),
    ('attention/value/bias', (2, 3), None),
    ('attention/out/kernel', (2, 3, 4), (0, 1)),
    ('convolution/kernel', (3, 3, 4, 6), (0, 1, 2)),
    ('pointwise/kernel', (1, 1, 1, 6), (0, 1, 2)),
    ('convolution/kernel', (2, 3, 3, 4, 6), (0, 1, 2, 3)),
    ('stack/layers_0_forward/recurrent_kernel', (3, 4, 3), (0,)),
    ('stack/layers_0_backward/input/kernel', (5, 4, 3), (0,)),
    ('stack/layers/up/kernel', (2, 4, 6), (1,)),  # two layers
    ('stack/layers/attention/query/kernel', (2, 4, 2, 3), (1,)),
    ('stack/layers/attention/out/kernel', (2, 2, 3, 4), (1, 2)),
    ('stack/layers/up/bias', (2, 6), (1,)),
]


@pytest.mark.parametrize(('name', 'shape', 'axes'), UNITS)
def test_adaptive_for_every_rank(name, shape, axes):
    draw = np.random.default_rng(len(name))
    params = {name: draw.normal(size=shape).astype(np.float32)}
    gradient = {name: (draw.normal(size=shape) * draw.choice([1e-3, 1.0], size=shape[-1:])).astype(np.float32)}
    found = apply(clip.adaptive(clipping=0.1, epsilon=1e-3), gradient, params)
    limit = 0.1 * np.maximum(length(params[name], axes), 1e-3)
    norm = length(gradient[name], axes).reshape(limit.shape)
    reference = np.where(norm > limit, gradient[name] * (limit / norm), gradient[name]).reshape(shape)
    np.testing.assert_allclose(found[name], reference, rtol=2e-6)


def test_adaptive_agrees_with_optax_where_optax_is_right():
    shapes = {'bias': (6,), 'dense/kernel': (4, 6), 'convolution/kernel': (3, 3, 4, 6)}
    draw = np.random.default_rng(0)
    params, gradient = ({k: draw.normal(size=s).astype(np.float32) for k, s in shapes.items()} for _ in range(2))
    assert_close(apply(clip.adaptive(), gradient, params), apply(optax.adaptive_grad_clip(0.01), gradient, params))


def test_adaptive_lets_zero_initialised_parameters_move():
    zeros = jax.tree.map(np.zeros_like, tree(0))
    found = apply(clip.adaptive(clipping=0.5, epsilon=1e-3), tree(0), zeros)
    np.testing.assert_allclose(length(found['conv2/kernel'], (0, 1, 2)), 0.5 * 1e-3, rtol=2e-6)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_small_gradients_pass_bit_for_bit(kind, dtype):
    gradient = tree(1, 1e-5, dtype)
    found = apply(KINDS[kind], gradient)
    for name, g in gradient.items():
        assert found[name].dtype == g.dtype
        assert found[name].tobytes() == g.tobytes(), name


@pytest.mark.parametrize('kind', KINDS)
def test_zero_gradients_stay_zero(kind):
    found = apply(KINDS[kind], jax.tree.map(np.zeros_like, tree(0)))
    assert all((g == 0).all() for g in found.values())


@pytest.mark.parametrize('kind', KINDS)
def test_not_a_number_is_not_hidden(kind):
    gradient = tree(0) | {'bias': np.full((5,), np.nan, np.float32)}
    assert np.isnan(apply(KINDS[kind], gradient)['bias']).all()


@pytest.mark.parametrize(
    ('component', 'arguments'),
    [
        ('global_norm', {'max_norm': 0.0}),
        ('block_norm', {'max_norm': -1.0}),
        ('value', {'limit': 0.0}),
        ('adaptive', {'clipping': 0.0}),
    ],
)
def test_mistakes(component, arguments):
    with pytest.raises(UsageError, match='is not positive'):
        getattr(clip, component)(**arguments)
