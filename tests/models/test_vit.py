"""The Vision Transformer against numpy: patches, positions, both heads; sizes; resizing positions; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import leaves, registry
from research.core.errors import UsageError
from research.models import vit
from research.models.vit import PARTITION_RULES, ViT, resize_positions, sincos2d

TINY = {'patch': 4, 'width': 16, 'depth': 2, 'heads': 2, 'hidden': 24}


def shapes(module, shape):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.ones(shape))


def drawn(module, shape, seed=0):
    """Variables of the module, all random: a head that starts at zero would hide everything."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0.1, 0.4, leaf.shape).astype(np.float32), shapes(module, shape))


@pytest.mark.parametrize(
    ('name', 'classes', 'shape', 'expected', 'without_token'),
    [
        ('vit_ti16', 1000, (224, 224, 3), 5_717_416, 5_679_400),
        ('vit_s16', 1000, (224, 224, 3), 22_050_664, 21_974_632),
        ('vit_b16', 1000, (224, 224, 3), 86_567_656, 86_415_592),
        ('vit_tiny_28', 10, (28, 28, 1), 678_730, 677_002),
    ],
)
def test_the_size_table_is_true(name, classes, shape, expected, without_token):
    for fields, parameters in (('', expected), ("positions='sincos2d', head='gap', ", without_token)):
        module = registry.component('model', f'{name}({fields}scan=True)', 'model').build(num_outputs=classes)  # traced faster
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes(module, (1, *shape)))) == parameters


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def normalised(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']


def dense(x, p):
    return x @ p['kernel'] + p['bias']


def attended(x, p):
    """Self-attention of one example (P, D), head by head."""
    result = p['out']['bias'].copy()
    for head in range(p['query']['bias'].shape[0]):
        query, key, value = (x @ p[n]['kernel'][:, head] + p[n]['bias'][head] for n in ('query', 'key', 'value'))
        scores = query @ key.T / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        result = result + weights / weights.sum(-1, keepdims=True) @ value @ p['out']['kernel'][head]
    return result


def positions_by_hand(height, width, channels):
    """The sine and cosine table place by place."""
    table = np.zeros((height * width, channels))
    quarter = channels // 4
    for y in range(height):
        for x in range(width):
            for i in range(quarter):
                frequency = 10000 ** (-i / (quarter - 1))
                four = np.sin(x * frequency), np.cos(x * frequency), np.sin(y * frequency), np.cos(y * frequency)
                table[y * width + x, i::quarter] = four
    return table


@pytest.mark.parametrize('head', ['token', 'gap'])
@pytest.mark.parametrize('positions', ['learned', 'sincos2d'])
def test_the_network_is_that_of_numpy(head, positions):
    module = ViT(3, head=head, positions=positions, **TINY)
    x = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    variables = drawn(module, x.shape)
    p = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables['params'])
    assert ('class_token' in p, 'position' in p) == (head == 'token', positions == 'learned')
    rows = np.stack([x[:, r : r + 4, c : c + 4].reshape(2, -1) for r in (0, 4) for c in (0, 4, 8)], 1)  # (2, 6, 48)
    rows = dense(rows, {'kernel': p['patch']['kernel'].reshape(48, 16), 'bias': p['patch']['bias']})
    rows = rows + positions_by_hand(2, 3, 16) if positions == 'sincos2d' else rows
    rows = np.concatenate([np.repeat(p['class_token'], 2, 0), rows], 1) if head == 'token' else rows
    rows = rows + p['position']['embedding'] if positions == 'learned' else rows
    for i in range(2):
        q = p['stack'][f'layers_{i}']
        rows = rows + np.stack([attended(row, q['attention']) for row in normalised(rows, q['attention_norm'])])
        up = gelu(dense(normalised(rows, q['feed_forward_norm']), q['feed_forward']['up']))
        rows = rows + dense(up, q['feed_forward']['down'])
    rows = normalised(rows, p['stack']['final_norm'])
    want = dense(rows[:, 0] if head == 'token' else rows.mean(1), p['head'])
    got = jax.jit(module.apply)(variables, x)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4 * np.abs(want).max())


def test_without_outputs_it_gives_what_the_head_would_read():
    fields = TINY | {'depth': 1, 'head': 'gap'}
    module, bare, images = ViT(3, **fields), ViT(0, **fields), np.ones((2, 8, 8, 1), np.float32)
    variables = drawn(module, images.shape)
    params = variables['params']
    without = {'params': {name: leaf for name, leaf in params.items() if name != 'head'}}
    assert jax.tree.structure(shapes(bare, images.shape)) == jax.tree.structure(without)
    features, outputs = jax.jit(lambda v, x: (bare.apply(without, x), module.apply(v, x)))(variables, images)
    assert features.shape == (2, 16)
    np.testing.assert_allclose(dense(np.asarray(features), params['head']), outputs, rtol=1e-5, atol=1e-5)


def test_scan_gives_the_same():
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    module, scanned = ViT(3, **TINY), ViT(3, scan=True, remat='dots', **TINY)
    variables = drawn(module, images.shape)
    stack = dict(variables['params']['stack'])
    stacked = {'layers': jax.tree.map(lambda *x: np.stack(x), stack.pop('layers_0'), stack.pop('layers_1')), **stack}
    others = {'params': {**variables['params'], 'stack': stacked}}
    want, got = jax.jit(lambda: (module.apply(variables, images), scanned.apply(others, images)))()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_dropout_in_training_only():
    module, images = ViT(3, dropout=0.5, **TINY | {'depth': 1}), np.ones((2, 8, 8, 1), np.float32)
    variables = drawn(module, images.shape)
    keys = jax.random.split(jax.random.key(0))
    trained = jax.jit(lambda key: module.apply(variables, images, train=True, rngs={'dropout': key}))
    assert np.abs(trained(keys[0]) - trained(keys[1])).max() > 1e-3
    assert jax.eval_shape(module.apply, variables, images).shape == (2, 3)  # without a key: nothing is drawn


@pytest.mark.parametrize('fields', [{}, {'head': 'gap', 'positions': 'sincos2d'}])
def test_bfloat16_stays_bfloat16(fields):
    module = ViT(4, **TINY, **fields)
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), shapes(module, (2, 8, 8, 1)))
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.bfloat16)
    assert jax.eval_shape(module.apply, half, images).dtype == jnp.bfloat16
    text = jax.jit(module.apply).lower(half, images).as_text()
    products = [line for line in text.splitlines() if 'dot_general' in line and '-> tensor' in line]
    dense_products = [line for line in products if 'batching_dims' not in line]  # attention sums in float32
    assert len(dense_products) >= 13 and all('f32' not in line for line in dense_products)


def test_positions_of_another_grid_are_interpolated():
    line = np.array([[0.0, 10.0], [4.0, 30.0]], np.float32)  # (P, D): a grid of 1 x 2, two channels
    resized = resize_positions(line, (1, 2), (1, 4))
    np.testing.assert_allclose(resized, [[0, 10], [1, 15], [3, 25], [4, 30]], atol=1e-6)  # half-pixel centres
    halved = resize_positions(np.arange(16, dtype=np.float32).reshape(1, 16, 1), (4, 4), (2, 2))
    triangle = np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7  # a tent of twice the width, cut at the border
    want = triangle @ np.arange(16).reshape(4, 4) @ triangle.T
    np.testing.assert_allclose(halved[0, :, 0].reshape(2, 2), want, rtol=1e-6)


@pytest.mark.parametrize('leading', [(), (1,)])
def test_the_class_token_keeps_its_position(leading):
    old = np.random.default_rng(0).normal(size=(*leading, 7, 8)).astype(np.float32)
    new = resize_positions(old, (2, 3), (4, 3))
    assert new.shape == (*leading, 13, 8)
    np.testing.assert_array_equal(new[..., 0, :], old[..., 0, :])
    np.testing.assert_allclose(new[..., 1:, :], resize_positions(old[..., 1:, :], (2, 3), (4, 3)))
    assert resize_positions(old, (2, 3), (2, 3)) is old


def test_resized_positions_serve_images_of_the_new_size():
    module = ViT(3, **TINY)
    variables = drawn(module, (1, 8, 8, 1))
    params = dict(variables['params'])
    params['position'] = {'embedding': resize_positions(params['position']['embedding'], (2, 2), (3, 4))}
    assert jax.eval_shape(module.apply, {'params': params}, jnp.ones((2, 12, 16, 1))).shape == (2, 3)


def test_partition_rules_split_heads_hidden_units_and_the_classes_inputs():
    abstract = {'params': shapes(ViT(10, **TINY | {'heads': 4}), (1, 8, 8, 3))['params']}
    specs = leaves.match(PARTITION_RULES, abstract, 'rules', allow_unused=True)  # some are for `scan`, or for text
    split = {n: s for n, s in zip(leaves.names(abstract), leaves_of(specs), strict=True) if 'model' in s}
    assert {n.removeprefix('params/stack/layers_1/'): s for n, s in split.items() if 'layers_1' in n} == {
        **{f'attention/{name}/kernel': (None, 'model', None) for name in ('query', 'key', 'value')},
        **{f'attention/{name}/bias': ('model', None) for name in ('query', 'key', 'value')},
        'attention/out/kernel': ('model', None, None),
        'feed_forward/up/kernel': (None, 'model'),
        'feed_forward/up/bias': ('model',),
        'feed_forward/down/kernel': ('model', None),
    }
    assert {n for n in split if 'layers' not in n} == {'params/head/kernel'}


def leaves_of(specs):
    return jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'positions': 'rotary'}, "positions 'rotary' does not exist\n.*learned, sincos2d"),
        ({'head': 'gab'}, "head 'gab' does not exist\n.*'gap'"),
        ({'patch': 5}, 'an image of 8 x 8 is no whole number of patches of 5 x 5\n.*model.patch'),
        ({'positions': 'sincos2d', 'width': 18}, 'multiple of 4, not 18'),
        ({'positions': 'sincos2d', 'width': 4}, 'multiple of 4, not 4'),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(UsageError, match=message):
        shapes(ViT(3, **TINY | fields), (1, 8, 8, 1))


def test_positions_that_are_no_such_grid_are_refused():
    with pytest.raises(UsageError, match='197 positions are no grid of 16 x 16 patches'):
        resize_positions(jnp.zeros((197, 8)), (16, 16), (14, 14))


def test_sincos_is_the_table_by_hand():
    np.testing.assert_allclose(sincos2d((3, 5), 32), positions_by_hand(3, 5, 32), atol=1e-6)
    assert vit.sincos2d((1, 1), 8).dtype == jnp.float32
