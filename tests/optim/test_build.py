"""The whole update rule: order of its parts, decay, rates, freezing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from research.core import leaves
from research.core.errors import UsageError
from research.optim import build, clip, optimizers, schedules

RATE = 0.1
DECAY = 0.05


class Net(nn.Module):
    """Every kind of leaf that the default rules must know."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 6)(tokens) + self.param('pos_embedding', nn.initializers.normal(), (1, 3, 6))
        x = nn.LayerNorm()(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
        x = nn.GroupNorm(num_groups=2)(nn.Conv(4, (3,))(x))
        return nn.Dense(2, name='head')(x.mean(axis=1))


SHAPES = {
    'Conv_0': {'kernel': (3, 2, 4), 'bias': (4,)},
    'LayerNorm_0': {'scale': (4,)},
    'pos_embedding': (2, 4),
    'head': {'kernel': (4, 3), 'bias': (3,)},
}


def abstract():
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def gradients(seed):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda p: draw.normal(size=p.shape).astype(p.dtype), abstract())


def params():
    return gradients(100)


def constant(step):
    return jnp.float32(RATE)


def make(algorithm=optimizers.sgd, rate=constant, **arguments):
    return build.build(params(), algorithm, rate, **arguments)


def updates(transformation, steps=1, start=None, gradient=None):
    """The update of the last of `steps` steps with `gradient` or changing ones, parameters moving."""
    p = start or params()
    state, update = jax.jit(transformation.init)(p), jax.jit(transformation.update)
    for step in range(steps):
        change, state = update(gradient or gradients(step), state, p)
        p = jax.tree.map(np.add, p, change)
    return jax.tree.map(np.asarray, change)


def zeros():
    return jax.tree.map(np.zeros_like, params())


def assert_close(tree, reference, rtol=1e-6):
    assert jax.tree.structure(tree) == jax.tree.structure(reference)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-8), tree, reference)


def named(tree):
    return dict(zip(leaves.names(tree), jax.tree.leaves(tree), strict=True))


def test_sgd_with_every_part_in_its_order():
    """clip, then L2 decay, then the rates: written out by hand."""
    rules = ((r'head/.*', 0.5), ('.*', 2.0))
    found = named(updates(make(clip=clip.global_norm(max_norm=1.0), weight_decay=DECAY, decay='l2', rate_rules=rules)))
    gradient, parameters = named(gradients(0)), named(params())
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradient.values()))
    assert norm > 1
    for name, g in gradient.items():
        decayed = DECAY if name.endswith(('kernel', 'embedding')) else 0.0
        factor = 0.5 if name.startswith('head') else 2.0
        expected = -RATE * factor * (g / norm + decayed * parameters[name])
        np.testing.assert_allclose(found[name], expected, rtol=2e-6, atol=1e-8, err_msg=name)


def test_default_rules_decay_kernels_and_embeddings_only():
    net = jax.eval_shape(Net().init, jax.random.key(0), np.zeros((1, 3), np.int32))['params']
    ones, none = (jax.tree.map(lambda p, v=v: np.full(p.shape, v, np.float32), net) for v in (1, 0))
    update = updates(build.build(net, optimizers.sgd, constant, weight_decay=1.0), start=ones, gradient=none)
    decayed = {name for name, u in named(update).items() if np.any(u != 0)}
    everything = set(leaves.names(net))
    assert everything - decayed == {n for n in everything if n.endswith(('bias', 'scale'))}
    assert {'pos_embedding', 'Embed_0/embedding', 'MultiHeadDotProductAttention_0/query/kernel'} <= decayed


def test_adamw_equals_optax_for_five_steps():
    mask = jax.tree.map(lambda name: name.endswith(('kernel', 'embedding')), named_tree())
    rate = schedules.learning_rate(RATE, schedules.cosine(10), 2)
    ours = make(optimizers.adamw, rate, weight_decay=DECAY)
    assert_close(updates(ours, 5), updates(optax.adamw(rate, weight_decay=DECAY, mask=mask), 5))


def named_tree():
    return jax.tree.unflatten(jax.tree.structure(params()), leaves.names(params()))


def test_decoupled_and_l2_are_the_same_for_sgd_and_differ_for_adam():
    everywhere = {'weight_decay': DECAY, 'decay_rules': (('.*', 1.0),)}
    assert_close(updates(make(**everywhere), 3), updates(make(**everywhere, decay='l2'), 3), rtol=1e-5)
    decoupled, l2 = (named(updates(make(optimizers.adam, **everywhere, decay=decay))) for decay in ('decoupled', 'l2'))
    for name, g in named(gradients(0)).items():
        p = named(params())[name]
        np.testing.assert_allclose(decoupled[name], -RATE * (first_of_adam(g) + DECAY * p), rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(l2[name], -RATE * first_of_adam(g + DECAY * p), rtol=1e-5)


def first_of_adam(g):
    """Adam's first direction; in float32 1 - 0.999 is off by 1.3e-5, so its root by half of that."""
    return g / (np.abs(g) + 1e-8)


def test_decay_factors_multiply():
    update = updates(make(weight_decay=DECAY, decay_rules=(('head/kernel', 3.0), ('.*', 1.0))), gradient=zeros())
    for name, u in named(update).items():
        factor = 3.0 if name == 'head/kernel' else 1.0
        np.testing.assert_allclose(u, -RATE * DECAY * factor * named(params())[name], rtol=1e-6)


def test_rate_factors_scale_the_decoupled_decay_too():
    half = updates(make(optimizers.adam, weight_decay=DECAY, rate_rules=(('.*', 0.5),)))
    assert_close(half, jax.tree.map(lambda u: 0.5 * u, updates(make(optimizers.adam, weight_decay=DECAY))))


@pytest.mark.parametrize('name', ['sgd', 'adam', 'adafactor', 'lamb', 'muon'])
def test_frozen_leaves_keep_every_bit_and_have_no_state(name):
    rules = (('(head|Conv_0)/.*', None), ('.*', 1.0))
    start = params() | {'head': {'kernel': params()['head']['kernel'], 'bias': np.array([-0.0, 1e-30, 3.0], np.float32)}}
    transformation = make(getattr(optimizers, name), rate_rules=rules, weight_decay=DECAY, clip=clip.global_norm())
    p, state, update = start, jax.jit(transformation.init)(start), jax.jit(transformation.update)
    paths = leaves.names(state)
    assert not [path for path in paths if 'head' in path or 'Conv_0' in path]
    for step in range(3):
        change, state = update(gradients(step), state, p)
        p = optax.apply_updates(p, change)
    for path, before in named(start).items():
        same = np.asarray(before).tobytes() == np.asarray(named(p)[path]).tobytes()
        assert same == path.startswith(('head', 'Conv_0')), path


@pytest.mark.parametrize('kind', [clip.global_norm(max_norm=0.1), clip.adaptive(), clip.block_norm(max_norm=0.1)])
def test_frozen_gradients_do_not_count_in_the_clipping_norm(kind):
    transformation = make(clip=kind, rate_rules=(('head/.*', None), ('.*', 1.0)))
    jax.tree.map(np.testing.assert_array_equal, updates(transformation, gradient=wild()), updates(transformation))


def wild():
    """The first gradients with a head a million times larger."""
    return gradients(0) | {'head': jax.tree.map(lambda g: 1e6 * g, gradients(0)['head'])}


def test_the_global_norm_counts_what_is_trained():
    """The other side of the test above: unfrozen, the same wild gradient does change the others."""
    transformation = make(clip=clip.global_norm(max_norm=0.1))
    calm, found = updates(transformation), updates(transformation, gradient=wild())
    assert np.abs(found['Conv_0']['kernel']).max() < 1e-4 * np.abs(calm['Conv_0']['kernel']).max()


def test_the_learning_rate_follows_the_updates_made():
    rate = schedules.learning_rate(1.0, schedules.linear(4), 2)
    transformation, ones = make(rate=rate), jax.tree.map(np.ones_like, params())
    state, update, found = transformation.init(params()), jax.jit(transformation.update), []
    for _ in range(7):
        change, state = update(ones, state, params())
        found.append(-float(change['head']['bias'][0]))
    np.testing.assert_allclose(found, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0], rtol=1e-6)


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'adafactor', 'muon'])
def test_built_from_abstract_parameters(name):
    rules = (('head/.*', None), ('.*', 1.0))
    arguments = {'weight_decay': DECAY, 'rate_rules': rules, 'clip': clip.adaptive()}
    transformation = build.build(abstract(), getattr(optimizers, name), constant, **arguments)
    state = jax.eval_shape(transformation.init, abstract())
    update, after = jax.eval_shape(transformation.update, abstract(), state, abstract())
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert jax.tree.structure(update) == jax.tree.structure(abstract())
    assert_close(updates(transformation, 2), updates(make(getattr(optimizers, name), **arguments), 2))


def test_no_recompilation_after_the_first_update():
    transformation = make(optimizers.muon, weight_decay=DECAY, clip=clip.global_norm())
    update, state = jax.jit(transformation.update), jax.jit(transformation.init)(params())
    for step in range(3):
        _, state = update(gradients(step), state, params())
    assert update._cache_size() == 1


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'rate_rules': (('haed/.*', 0.1), ('.*', 1.0))}, "optimizer.rate_rules: 'haed/.*' decides no leaf"),
        ({'rate_rules': (('head/.*', 0.1),)}, 'optimizer.rate_rules: no rule covers'),
        ({'rate_rules': (('.*', 0.0),)}, 'None to freeze'),
        ({'rate_rules': (('.*', None),)}, 'freeze every leaf'),
        ({'weight_decay': 0.1, 'decay_rules': (('.*/w', 1.0), ('.*', 0.0))}, "optimizer.decay_rules: '.*/w' decides no leaf"),
        ({'weight_decay': 0.1, 'decay_rules': (('.*', -1.0),)}, 'at least 0'),
        ({'weight_decay': 0.1, 'decay_rules': (('.*', 0.0),)}, 'let no leaf decay'),
        ({'decay': 'L2'}, "optimizer.decay is 'L2'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UsageError) as error:
        make(**arguments)
    assert message in str(error.value)
