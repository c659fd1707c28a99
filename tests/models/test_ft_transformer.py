"""FT-Transformer and MLP on columns: against numpy, with missing values and categories, sizes, gradients, mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import leaves, registry
from research.core.errors import UsageError
from research.data.source import DataSpec
from research.models import ft_transformer
from research.models.columns import CategoryTokens, NumericTokens, filled
from research.models.ft_transformer import FTTransformer
from research.models.mlp import MLP
from research.tasks.base import make_module
from research.tasks.classify import Classify

CARDINALITIES = (3, 5)
SMALL = {'depth': 1, 'width': 8, 'heads': 2, 'hidden': 12, 'dropout': 0.0}


def draw(n=6, missing=True, seed=0):
    rng = np.random.default_rng(seed)
    numeric = rng.normal(size=(n, 4)).astype(np.float32)
    if missing:
        numeric[rng.random((n, 4)) < 0.3] = np.nan
    return numeric, np.stack([rng.integers(0, c, n) for c in CARDINALITIES], 1).astype(np.int32)


def model(kind, **arguments):
    if kind is FTTransformer:
        return FTTransformer(**{'num_outputs': 2, 'cardinalities': CARDINALITIES, **SMALL, **arguments})
    return MLP(**{'num_outputs': 2, 'hidden': (16,), 'missing': True, 'cardinalities': CARDINALITIES, **arguments})


def drawn(shapes, seed=3):
    """Random variables of these shapes, without compiling an initialisation."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: (0.5 * rng.normal(size=s.shape)).astype(s.dtype), shapes)


def init(module, numeric, categories=None):
    return drawn(jax.eval_shape(lambda: module.init(jax.random.key(0), numeric, categories=categories)))


def parameters(module, numeric, categories=None):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), numeric, categories=categories))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_size_table_is_true():
    nine = jnp.ones((1, 9))
    assert parameters(FTTransformer(2), nine) == 897_602
    assert parameters(FTTransformer(2, width=32, hidden=64), nine) == 32_994
    assert parameters(FTTransformer(2, cardinalities=(3, 5)), nine, jnp.zeros((1, 2), jnp.int32)) == 897_602 + (3 + 5 + 2) * 192
    assert parameters(MLP(10, missing=True), jnp.ones((1, 64))) == 4_810 + 64 * 64


def test_numeric_tokens_against_numpy():
    numeric, _ = draw()
    module = NumericTokens(8)
    variables = module.init(jax.random.key(0), numeric)
    p = jax.tree.map(np.asarray, variables['params'])
    expected = np.where(np.isnan(numeric)[..., None], p['missing'], np.nan_to_num(numeric)[..., None] * p['weight'] + p['bias'])
    np.testing.assert_allclose(module.apply(variables, numeric), expected, rtol=1e-6)
    assert {leaf.shape for leaf in p.values()} == {(4, 8)}
    assert all(np.abs(leaf).max() <= 8**-0.5 for leaf in p.values())


def test_category_tokens_against_numpy():
    _, categories = draw()
    module = CategoryTokens(CARDINALITIES, 8)
    variables = module.init(jax.random.key(0), categories)
    table, bias = (np.asarray(variables['params'][name]) for name in ('embedding', 'bias'))
    expected = np.stack([table[:3][categories[:, 0]] + bias[0], table[3:][categories[:, 1]] + bias[1]], 1)
    np.testing.assert_allclose(module.apply(variables, categories), expected, rtol=1e-6)
    assert np.isnan(module.apply(variables, np.int32([[0, 5]]))[0, 1]).all()  # beyond the table: not another value's vector


def test_filled():
    got = filled(jnp.float32([[1, jnp.nan], [3, 4]]))
    np.testing.assert_array_equal(got, [[1, 0, 0, 1], [3, 4, 0, 0]])
    assert filled(jnp.ones((1, 2), jnp.bfloat16)).dtype == jnp.bfloat16


def layer_norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def reference(p, numeric, categories):
    """One block, in float64 numpy."""
    tokens = [np.broadcast_to(p['class_token'], (len(numeric), 1, 8))]
    n, c = p['numeric'], p['category']
    tokens.append(
        np.where(np.isnan(numeric)[..., None], n['missing'], np.nan_to_num(numeric)[..., None] * n['weight'] + n['bias'])
    )
    tokens.append(c['embedding'][categories + np.array([0, 3])] + c['bias'])
    x = np.concatenate(tokens, 1)
    block = p['stack']['layers_0']
    y, a = layer_norm(x, block['attention_norm']), block['attention']
    q, k, v = (
        np.einsum('btd,dhk->bhtk', y, a[name]['kernel']) + a[name]['bias'][:, None] for name in ('query', 'key', 'value')
    )
    scores = np.einsum('bhtk,bhsk->bhts', q, k) / np.sqrt(4)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    x = x + np.einsum('bhts,bhsk,hkd->btd', weights, v, a['out']['kernel']) + a['out']['bias']
    y, f = layer_norm(x, block['feed_forward_norm']), block['feed_forward']
    up, gate = (y @ f[name]['kernel'] + f[name]['bias'] for name in ('up', 'gate'))
    x = x + (gelu(gate) * up) @ f['down']['kernel'] + f['down']['bias']
    first = np.maximum(layer_norm(x, p['stack']['final_norm'])[:, 0], 0)
    return first @ p['head']['kernel'] + p['head']['bias']


def test_ft_transformer_against_numpy():
    module = model(FTTransformer)
    numeric, categories = draw()
    variables = init(module, numeric, categories)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
    got = jax.jit(module.apply)(variables, numeric, categories=categories)
    np.testing.assert_allclose(got, reference(p, numeric, categories), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('kind', [FTTransformer, MLP])
def test_every_column_and_every_hole_is_seen(kind):
    module = model(kind)
    numeric, categories = draw(missing=False)
    variables = init(module, numeric, categories)
    apply = jax.jit(lambda x, c: module.apply(variables, x, categories=c))
    plain = apply(numeric, categories)
    for column in range(4):
        for value in (5.0, np.nan):
            changed = numeric.copy()
            changed[2, column] = value
            moved = np.abs(apply(changed, categories) - plain).max(1)
            assert np.isfinite(moved).all()
            assert (moved > 1e-6).tolist() == [False, False, True, False, False, False]
        filled_in = numeric.copy()
        filled_in[2, column] = 0  # missing is not zero
        hole = np.where(np.arange(24).reshape(6, 4) == 8 + column, np.nan, numeric).astype(np.float32)
        assert np.abs(apply(filled_in, categories) - apply(hole, categories)).max() > 1e-6
    for column, cardinality in enumerate(CARDINALITIES):
        changed = categories.copy()
        changed[3, column] = (changed[3, column] + 1) % cardinality
        moved = np.abs(apply(numeric, changed) - plain).max(1)
        assert (moved > 1e-6).tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize('kind', [FTTransformer, MLP])
def test_gradients_with_missing_values_are_finite_and_right(kind):
    """Against central differences in float64."""
    with jax.enable_x64(True):
        module = model(kind, activation='gelu')
        numeric, categories = draw()
        params = jax.tree.map(lambda x: x.astype(np.float64), init(module, numeric, categories)['params'])
        weights = np.random.default_rng(1).normal(size=(6, 2))

        @jax.jit
        def total(p):
            return jnp.sum(weights * module.apply({'params': p}, numeric.astype(np.float64), categories=categories))

        gradient = jax.jit(jax.grad(total))(params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        rng = np.random.default_rng(2)
        direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
        ahead, behind = (total(jax.tree.map(lambda x, d, s=s: x + s * 1e-4 * d, params, direction)) for s in (1, -1))
        slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
        np.testing.assert_allclose((ahead - behind) / 2e-4, slope, rtol=1e-4, atol=1e-4)  # the softmax is float32


def test_dropout_is_active_in_training_only():
    module = model(FTTransformer, dropout=0.5)
    numeric, categories = draw()
    variables = init(module, numeric, categories)
    apply = jax.jit(
        lambda key, train: module.apply(variables, numeric, train, categories=categories, rngs={'dropout': key}),
        static_argnums=1,
    )
    one, two, same = apply(jax.random.key(1), True), apply(jax.random.key(2), True), apply(jax.random.key(1), True)
    assert np.abs(one - two).max() > 0
    np.testing.assert_array_equal(one, same)
    np.testing.assert_array_equal(apply(jax.random.key(1), False), apply(jax.random.key(2), False))


@pytest.mark.parametrize('kind', [FTTransformer, MLP])
def test_columns_of_one_kind_only(kind):
    numeric, categories = draw()
    for x, c, cardinalities in ((numeric, None, ()), (numeric[:, :0], categories, CARDINALITIES)):
        module = model(kind, cardinalities=cardinalities)
        variables, outputs = jax.eval_shape(
            lambda x, c, m=module: m.init_with_output(jax.random.key(0), x, categories=c)[::-1], x, c
        )
        assert ('numeric' in variables['params']) == (kind is FTTransformer and c is None)
        assert ('category' in variables['params']) == (c is not None)
        assert outputs.shape == (6, 2)


def test_the_task_hands_over_numbers_categories_and_cardinalities():
    spec = DataSpec(
        {'numeric': ((4,), np.dtype(np.float32)), 'category': ((2,), np.dtype(np.int32)), 'label': ((), np.dtype(np.int32))},
        class_names=('a', 'b'),
        cardinalities=CARDINALITIES,
    )
    numeric, categories = draw(8)
    batch = {'numeric': numeric, 'category': categories, 'label': categories[:, 0] % 2, 'mask': np.float32(np.arange(8) < 5)}
    for name in ('ft_transformer(depth=1, width=8, heads=2, hidden=12)', 'mlp(missing=True)'):
        bound = registry.component('model', name, 'config.model').bound()
        assert make_module(bound, spec, 2).cardinalities == CARDINALITIES
        task = Classify(model=bound, data=spec, dtype=jnp.bfloat16, inputs='numeric')

        def loss(variables, batch, task=task):
            found = task.loss(variables, batch, {'dropout': jax.random.key(0)}, True)[0]
            return found['loss'][0], found

        variables = drawn(jax.eval_shape(task.init, jax.random.key(0), batch))
        gradient, found = jax.jit(jax.grad(loss, has_aux=True))(variables, batch)
        assert found['loss'][1] == 5 and np.isfinite(found['loss'][0])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_partition_rules_cover_the_leaves_and_cut_some():
    module = model(FTTransformer)
    numeric, categories = draw()
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), numeric, categories=categories))
    specs = leaves.match(ft_transformer.PARTITION_RULES, shapes, allow_unused=False)
    block = specs['params']['stack']['layers_0']
    assert block['attention']['query']['kernel'] == (None, 'model', None)
    assert block['feed_forward']['down']['kernel'] == ('model', None)
    assert specs['params']['numeric']['weight'] == ()


@pytest.mark.parametrize('kind', [FTTransformer, MLP])
def test_mistakes(kind):
    numeric, categories = draw()
    cases = [
        ((numeric[..., None], categories), r"reads numbers \(B, F\), not \(6, 4, 1\)\n.*inputs='numeric'"),
        ((numeric, None), 'the batch has 0 columns of categories, and the data set describes 2'),
        ((numeric, categories[:, :1]), 'the batch has 1 columns of categories.*\n.*encode_categories'),
    ]
    for (x, c), message in cases:
        with pytest.raises(UsageError, match=message):
            model(kind).init(jax.random.key(0), x, categories=c)
    with pytest.raises(UsageError, match='describes 0'):
        model(kind, cardinalities=()).init(jax.random.key(0), numeric, categories=categories)
