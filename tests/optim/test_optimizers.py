"""Optimisers against numpy implementations of their papers in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import registry
from research.core.errors import UsageError
from research.optim import optimizers

SHAPES = {'bias': (5,), 'conv/kernel': (2, 3, 2, 5), 'dense/kernel': (4, 5), 'head/kernel': (5, 3)}
STEPS = 5
DECAY = 0.1
NAMES = list(registry.TABLES['optimizer'])
MUON = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: the coefficients of the quintic iteration


def tree(seed):
    draw = np.random.default_rng(seed)
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def directions(transformation, params=None):
    """The directions of STEPS updates of fixed parameters by changing gradients: a list of trees."""
    params = tree(100) if params is None else params
    state, update, found = jax.jit(transformation.init)(params), jax.jit(transformation.update), []
    for step in range(STEPS):
        direction, state = update(tree(step), state, params)
        found.append(direction)
    return found


class Reference:
    """One leaf of an optimiser in float64; `step(g, p, t)` gives the direction at t = 1, 2, ... without decay."""

    def __init__(self, shape):
        self.m, self.v = np.zeros(shape), np.zeros(shape)


class Sgd(Reference):
    def step(self, g, p, t):
        return g


class Momentum(Reference):
    def step(self, g, p, t):
        self.m = 0.9 * self.m + g
        return self.m


class Nesterov(Momentum):
    def step(self, g, p, t):
        return g + 0.9 * super().step(g, p, t)


class Adam(Reference):
    eps = 1e-8

    def step(self, g, p, t):
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        return self.first(g, t) / (np.sqrt(self.v / (1 - 0.999**t)) + self.eps)

    def first(self, g, t):
        return self.m / (1 - 0.9**t)


class Nadam(Adam):
    def first(self, g, t):
        return 0.9 * self.m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)


class Lion(Reference):
    def step(self, g, p, t):
        direction = np.sign(0.9 * self.m + 0.1 * g)
        self.m = 0.99 * self.m + 0.01 * g
        return direction


class Lamb(Adam):
    eps = 1e-6

    def step(self, g, p, t):
        adam = super().step(g, p, t) + DECAY * p  # the decay is inside the trust ratio
        return adam * np.linalg.norm(p) / np.linalg.norm(adam) - DECAY * p


REFERENCES = {
    'sgd': Sgd,
    'momentum': Momentum,
    'nesterov': Nesterov,
    'adam': Adam,
    'adamw': Adam,
    'nadamw': Nadam,
    'lion': Lion,
    'lamb': Lamb,
}


@pytest.mark.parametrize('name', REFERENCES)
def test_against_the_paper(name):
    params = tree(100)
    found = directions(getattr(optimizers, name)(optax.add_decayed_weights(DECAY)))
    references = {leaf: REFERENCES[name](shape) for leaf, shape in SHAPES.items()}
    for t, direction in enumerate(found, 1):
        for leaf, reference in references.items():
            p = params[leaf].astype(np.float64)
            expected = reference.step(tree(t - 1)[leaf].astype(np.float64), p, t) + DECAY * p
            # In float32 1 - 0.999 ** 2 is off by 3e-5 of itself (one rounding of 0.998), its root by half of that.
            atol = 2e-5 if issubclass(REFERENCES[name], Adam) else 2e-6
            np.testing.assert_allclose(direction[leaf], expected, rtol=0, atol=atol, err_msg=f'{leaf} {t}')


@pytest.mark.parametrize(('momentum', 'scaled'), [(None, True), (0.9, False)])
def test_adafactor_against_optax(momentum, scaled):
    arguments = {'momentum': momentum, 'multiply_by_parameter_scale': scaled, 'min_dim_size_to_factor': 3}
    ours = optimizers.adafactor(optax.add_decayed_weights(DECAY), **arguments)
    reference = optax.chain(optax.adafactor(None, **arguments), optax.scale(-1), optax.add_decayed_weights(DECAY))
    for a, b in zip(directions(ours), directions(reference), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_adafactor_first_step_against_the_paper():
    """Algorithm 4 at t = 1, where the decay rate is 0: the moment is R C / sum, from this gradient alone."""
    found = directions(optimizers.adafactor(optax.identity(), min_dim_size_to_factor=3))[0]
    g, p = tree(0)['dense/kernel'].astype(np.float64), tree(100)['dense/kernel'].astype(np.float64)
    moment = np.outer((g**2).sum(1), (g**2).sum(0)) / (g**2).sum()
    update = g / np.sqrt(moment)
    update /= max(1.0, np.sqrt((update**2).mean()))
    np.testing.assert_allclose(found['dense/kernel'], update * np.sqrt((p**2).mean()), rtol=1e-5)


def newton_schulz(matrix):
    x = matrix / np.linalg.norm(matrix)
    a, b, c = MUON
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def momentum_of_muon(leaf, t):
    """The Nesterov momentum after gradients 1..t in float64."""
    m = np.zeros(SHAPES[leaf])
    for step in range(t):
        g = tree(step)[leaf].astype(np.float64)
        m = 0.95 * m + 0.05 * g
    return 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)


@pytest.mark.parametrize('rms', [0.2, None])
def test_muon_against_numpy(rms):
    """Two kernels by Muon, the bias and the head by Adam, all with their decay."""
    adam = {leaf: Adam(SHAPES[leaf]) for leaf in ('bias', 'head/kernel')}
    found = directions(optimizers.muon(optax.add_decayed_weights(DECAY), rms=rms, adam_scale=0.5))
    for t, direction in enumerate(found, 1):
        for leaf, reference in adam.items():
            expected = 0.5 * reference.step(tree(t - 1)[leaf].astype(np.float64), None, t)
            np.testing.assert_allclose(direction[leaf], expected + DECAY * tree(100)[leaf], rtol=0, atol=2e-5)
        for leaf, rows, columns in [('dense/kernel', 4, 5), ('conv/kernel', 12, 5)]:
            scale = max(1, columns / rows) ** 0.5 if rms is None else rms * max(rows, columns) ** 0.5
            expected = scale * newton_schulz(momentum_of_muon(leaf, t).reshape(rows, columns)).reshape(SHAPES[leaf])
            np.testing.assert_allclose(direction[leaf], expected + DECAY * tree(100)[leaf], atol=2e-5)


def test_muon_is_nearly_orthogonal():
    """Every singular value of the first update lies in the iteration's range, although the gradient's spread by 50."""
    u, _, v = np.linalg.svd(np.random.default_rng(0).normal(size=(16, 40)), full_matrices=False)
    params = {'conv/kernel': np.zeros((2, 4, 5, 16), np.float32)}
    gradient = {'conv/kernel': ((u * np.geomspace(0.02, 1, 16)) @ v).T.reshape(2, 4, 5, 16).astype(np.float32)}
    transformation = optimizers.muon(optax.identity(), rms=None)
    direction, _ = jax.jit(transformation.update)(gradient, transformation.init(params), params)
    singular = np.linalg.svd(np.asarray(direction['conv/kernel']).reshape(40, 16), compute_uv=False)
    assert singular.min() > 0.65
    assert singular.max() < 1.25


@pytest.mark.parametrize(
    ('name', 'shape', 'rows', 'columns'),
    [
        ('attention/query/kernel', (6, 2, 3), (6,), (2, 3)),
        ('attention/out/kernel', (2, 3, 6), (2, 3), (6,)),
        ('conv/kernel', (3, 2, 6), (3, 2), (6,)),
    ],
)
def test_muon_matrices_of_rank_three(name, shape, rows, columns):
    gradient = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    transformation = optimizers.muon(optax.identity(), rms=None)
    params = {name: gradient}
    direction, _ = jax.jit(transformation.update)(params, transformation.init(params), params)
    matrix = np.asarray(direction[name]).reshape(np.prod(rows), np.prod(columns))
    expected = newton_schulz(gradient.astype(np.float64).reshape(matrix.shape))
    np.testing.assert_allclose(matrix, expected * max(1, matrix.shape[1] / matrix.shape[0]) ** 0.5, atol=2e-5)


def test_muon_sees_stacked_layers_one_by_one():
    """The leaves of `nn.scan` are updated as those of the same layers side by side."""
    draw = np.random.default_rng(2)
    one = {'up/kernel': (6, 8), 'attention/query/kernel': (6, 2, 3), 'attention/out/kernel': (2, 3, 6)}
    apart = {f'layers_{i}/{name}': draw.normal(size=shape).astype(np.float32) for i in (0, 1) for name, shape in one.items()}
    stacked = {f'layers/{name}': np.stack([apart[f'layers_{i}/{name}'] for i in (0, 1)]) for name in one}
    for rms in (None, 0.2):
        muon = optimizers.muon(optax.identity(), rms=rms)
        expected, found = (jax.jit(muon.update)(tree, muon.init(tree), tree)[0] for tree in (apart, stacked))
        for name in one:
            both = np.stack([expected[f'layers_{i}/{name}'] for i in (0, 1)])
            np.testing.assert_allclose(found[f'layers/{name}'], both, atol=1e-5)


def test_muon_keeps_one_moment_for_kernels_and_two_for_the_rest():
    params = {'conv/kernel': np.zeros((3, 3, 4, 8)), 'query/bias': np.zeros((2, 3)), 'cls': np.zeros((1, 1, 7))}
    state = jax.eval_shape(optimizers.muon(optax.identity()).init, params)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.shape in {p.shape for p in params.values()})
    assert numbers == 288 + 2 * 6 + 2 * 7


def test_muon_refuses_a_name_that_no_leaf_has():
    with pytest.raises(UsageError, match=r'muon\.adam_names'):
        optimizers.muon(optax.identity(), adam_names=('.*/haed/.*',)).init(tree(0))


@pytest.mark.parametrize('name', NAMES)
def test_reduces_a_quadratic(name):
    """The mean square of normal parameters falls by two thirds in 200 steps at a rate of 0.03, whatever the optimiser."""
    params = {leaf: jnp.asarray(tree(100)[leaf]) for leaf in ('bias', 'dense/kernel')}
    transformation = getattr(optimizers, name)(optax.identity())

    def loss(p):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    @jax.jit
    def step(carry, _):
        p, state = carry
        direction, state = transformation.update(jax.grad(loss)(p), state, p)
        return (jax.tree.map(lambda x, d: x - 0.03 * d, p, direction), state), None

    (end, _), _ = jax.lax.scan(step, (params, transformation.init(params)), length=200)
    assert loss(end) < loss(params) / 3


@pytest.mark.parametrize('name', NAMES)
def test_state_keeps_its_structure_and_types(name):
    params, transformation = tree(100), getattr(optimizers, name)(optax.add_decayed_weights(DECAY))
    before = jax.eval_shape(transformation.init, params)
    direction, after = jax.eval_shape(transformation.update, tree(0), before, params)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(before)] == [(x.shape, x.dtype) for x in jax.tree.leaves(after)]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), direction) == jax.tree.map(lambda x: (x.shape, x.dtype), params)


@pytest.mark.parametrize('kind', ['optimizer', 'schedule', 'clip'])
def test_every_component_of_the_registry_is_there(kind):
    for name in registry.TABLES[kind]:
        component = registry.component(kind, {'name': name, **REQUIRED.get(name, {})}, kind)
        function = component.load()
        positional = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_ONLY]
        assert len(positional) == (0 if kind == 'clip' else 1)
        component.build(*{'optimizer': [optax.identity()], 'schedule': [10], 'clip': []}[kind])


REQUIRED = {'inverse_time': {'beta': 0.1}, 'polynomial': {'power': 2.0}, 'step': {'at': (0.5,)}}
