"""ResNets against numpy: blocks, stems, sizes, normalisation, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import leaves, registry
from research.core.errors import UsageError
from research.models import resnet
from research.models.resnet import PARTITION_RULES, PostActivation, PreActivation, ResNet
from research.parallel.rules import shardings

BASIC, BOTTLENECK = resnet.basic(8, 2), resnet.bottleneck(4, 2)
PLAIN = ((6, 3, 1), (6, 3, 1))  # keeps the shape of (B, 5, 5, 6): the shortcut is the input itself


def shapes(module, shape):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.ones(shape))


@pytest.mark.parametrize(
    ('name', 'classes', 'side', 'expected'),
    [
        ('resnet18', 1000, 64, 11_689_512),
        ('resnet34', 1000, 64, 21_797_672),
        ('resnet50', 1000, 64, 25_557_032),
        ('resnet101', 1000, 64, 44_549_160),
        ('resnet20', 10, 32, 272_474),
        ('resnet56', 10, 32, 855_770),
        ('wrn_28_2', 10, 32, 1_467_610),
        ('wrn_16_4', 10, 32, 2_748_890),
        ('wrn_28_10', 10, 32, 36_479_194),
    ],
)
def test_the_size_table_is_true(name, classes, side, expected):
    module = registry.component('model', name, 'model').build(num_outputs=classes)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(module, (1, side, side, 3))['params'])) == expected


def convolved(x, kernel, stride=1):
    """A convolution with symmetric padding in float64, tap by tap."""
    side = kernel.shape[0]
    pad = (side - 1) // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = ((n + 2 * pad - side) // stride + 1 for n in x.shape[1:3])
    taps = [
        padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride][:, :rows, :columns] @ kernel[i, j]
        for i in range(side)
        for j in range(side)
    ]
    return sum(taps)


def normalised(x, p, groups=None):
    """Batch normalisation by the batch's own statistics, or group normalisation with `groups`."""
    if groups is None:
        mean, variance, epsilon = x.mean((0, 1, 2)), x.var((0, 1, 2)), 1e-5
    else:
        grouped = x.reshape(*x.shape[:3], groups, -1)
        mean, variance = (np.repeat(f(grouped, (1, 2, 4)), x.shape[-1] // groups, -1) for f in (np.mean, np.var))
        mean, variance, epsilon = mean[:, None, None], variance[:, None, None], 1e-6
    return (x - mean) / np.sqrt(variance + epsilon) * p['scale'] + p['bias']


def relu(x):
    return np.maximum(x, 0)


def post_activation(x, p, convolutions, norm):
    y = x
    for i, (_, _, stride) in enumerate(convolutions, 1):
        y = norm(convolved(y, p[f'conv_{i}']['kernel'], stride), p[f'norm_{i}'])
        y = relu(y) if i < len(convolutions) else y
    if 'projection' in p:
        x = norm(convolved(x, p['projection']['kernel'], 2), p['projection_norm'])
    return relu(x + y)


def pre_activation(x, p, convolutions, norm):
    y = first = relu(norm(x, p['norm_1']))
    for i, (_, _, stride) in enumerate(convolutions, 1):
        y = relu(norm(y, p[f'norm_{i}'])) if i > 1 else y
        y = convolved(y, p[f'conv_{i}']['kernel'], stride)
    return (convolved(first, p['projection']['kernel'], 2) if 'projection' in p else x) + y


def drawn(variables, seed=0):
    """Variables like these, all random: scales that start at 0 or 1 would hide mistakes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0.5, 0.5, leaf.shape).astype(np.float32), variables)


@pytest.mark.parametrize('convolutions', [BASIC, BOTTLENECK, PLAIN], ids=['basic', 'bottleneck', 'plain'])
@pytest.mark.parametrize('norm', ['batch', 'group'])
@pytest.mark.parametrize(('block', 'reference'), [(PostActivation, post_activation), (PreActivation, pre_activation)])
def test_a_block_is_that_of_numpy(block, reference, norm, convolutions):
    module = block(convolutions, norm)
    x = np.random.default_rng(1).normal(size=(3, 5, 5, 6)).astype(np.float32)  # odd: 5 halves to 3
    variables = shapes(module, x.shape)
    variables = {**variables, 'params': drawn(variables['params'])}
    variables['batch_stats'] = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), variables.get('batch_stats', {}))
    got, _ = jax.jit(functools.partial(module.apply, train=True, mutable=['batch_stats']))(variables, x)
    p = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables['params'])

    def normal(y, leaf):
        return normalised(y, leaf, groups=None if norm == 'batch' else y.shape[-1])  # up to 32 channels: one a group

    want = reference(x.astype(np.float64), p, convolutions, normal)
    assert got.shape == (3, *want.shape[1:]) and ('projection' in p) == (convolutions != PLAIN)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4 * np.abs(want).max())


@functools.cache
def tiny(**fields):
    return ResNet(5, stages=(1, 1), width=16, **fields)


def test_groups_of_more_than_one_channel():
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 64)).astype(np.float32)
    module = PostActivation(((64, 1, 1),), 'group', zero_init=False)
    variables = {'params': drawn(shapes(module, x.shape)['params'])}
    p = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables['params'])
    want = post_activation(x, p, module.convolutions, functools.partial(normalised, groups=32))
    np.testing.assert_allclose(module.apply(variables, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('stem', ['imagenet', 'cifar'])
@pytest.mark.parametrize('version', ['1.5', '2'])
def test_a_whole_network_is_that_of_numpy(stem, version):
    """Stem, pooling, stages, the last normalisation of version 2, mean and head; with running statistics 0 and 1."""
    module = tiny(version=version, stem=stem)
    x = np.random.default_rng(2).normal(size=(2, 14, 14, 3)).astype(np.float32)
    abstract = shapes(module, x.shape)
    stats = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full(leaf.shape, float(path[-1].key == 'var'), np.float32), abstract['batch_stats']
    )
    variables = {'params': drawn(abstract['params'], 3), 'batch_stats': stats}
    p = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables['params'])

    def norm(y, leaf):
        return y / np.sqrt(1 + 1e-5) * leaf['scale'] + leaf['bias']

    y = convolved(x.astype(np.float64), p['stem']['kernel'], 2 if stem == 'imagenet' else 1)
    y = relu(norm(y, p['stem_norm'])) if version == '1.5' else y
    if stem == 'imagenet':
        padded = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        y = np.max([padded[:, i : i + 7 : 2, j : j + 7 : 2] for i in range(3) for j in range(3)], axis=0)
    reference = post_activation if version == '1.5' else pre_activation
    for stage in range(2):
        y = reference(y, p[f'stage_{stage}_block_0'], resnet.basic(16 * 2**stage, 2 if stage else 1), norm)
    y = relu(norm(y, p['final_norm'])) if version == '2' else y
    want = y.mean((1, 2)) @ p['head']['kernel'] + p['head']['bias']
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), want, rtol=2e-4, atol=2e-4 * np.abs(want).max())


@pytest.mark.parametrize('version', ['1.5', '2'])
def test_zero_init_starts_as_the_shortcut_and_still_learns(version):
    module = {'1.5': PostActivation, '2': PreActivation}[version](PLAIN)
    x = jax.random.normal(jax.random.key(0), (4, 5, 5, 6))
    variables = module.init(jax.random.key(1), x)
    want = np.maximum(x, 0) if version == '1.5' else x
    np.testing.assert_array_equal(module.apply(variables, x), want)

    def total(params):
        y, _ = module.apply({**variables, 'params': params}, x, train=True, mutable=['batch_stats'])
        return jnp.sum(jnp.square(y - 1))

    gradient = jax.jit(jax.grad(total))(variables['params'])
    started = gradient['norm_2']['scale'] if version == '1.5' else gradient['conv_2']['kernel']
    assert np.abs(started).max() > 1e-3


def test_the_stride_of_a_bottleneck_is_in_its_3x3_convolution():
    """That is what makes version 1.5 of version 1."""
    module = ResNet(10, stages=(1, 1), block='bottleneck', stem='cifar', width=4)
    capture = functools.partial(module.apply, capture_intermediates=True, mutable=['intermediates'])
    _, seen = jax.eval_shape(capture, shapes(module, (1, 8, 8, 3)), jnp.ones((1, 8, 8, 3)))
    block = seen['intermediates']['stage_1_block_0']
    assert [block[f'conv_{i}']['__call__'][0].shape for i in (1, 2, 3)] == [(1, 8, 8, 8), (1, 4, 4, 8), (1, 4, 4, 32)]


def test_wide_networks_widen_their_stages_but_not_their_stem():
    params = shapes(resnet.WideResNet16x4(10), (1, 32, 32, 3))['params']
    assert params['stem']['kernel'].shape == (3, 3, 3, 16)
    assert [params[f'stage_{s}_block_1']['conv_2']['kernel'].shape[-1] for s in range(3)] == [64, 128, 256]
    assert 'stem_norm' not in params and 'final_norm' in params


@pytest.mark.parametrize('block', [PostActivation, PreActivation])
def test_dropout_and_running_statistics_change_in_training_only(block):
    module = block(PLAIN, dropout=0.5, zero_init=False)
    x = np.random.default_rng(0).normal(size=(4, 5, 5, 6)).astype(np.float32)
    variables = shapes(module, x.shape)
    variables = {'params': drawn(variables['params']), 'batch_stats': jax.tree.map(np.abs, drawn(variables['batch_stats']))}
    apply = functools.partial(module.apply, variables, x, mutable=['batch_stats'])
    trained = jax.jit(lambda key: apply(train=True, rngs={'dropout': key}))
    (a, stats), (b, _) = (trained(jax.random.key(i)) for i in range(2))
    assert np.abs(a - b).max() > 1e-3
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), stats['batch_stats'], variables['batch_stats'])
    assert min(jax.tree.leaves(moved)) > 0
    still, kept = jax.jit(apply)()  # without a key: nothing is drawn
    assert np.isfinite(still).all()
    jax.tree.map(np.testing.assert_array_equal, kept['batch_stats'], variables['batch_stats'])


def test_group_normalisation_looks_at_each_example_alone():
    module = PostActivation(PLAIN, 'group')
    x = np.random.default_rng(0).normal(size=(4, 5, 5, 6)).astype(np.float32)
    variables = shapes(module, x.shape)
    assert set(variables) == {'params'}
    apply = jax.jit(functools.partial(module.apply, drawn(variables), train=True))
    other = np.concatenate([x[:2], np.full_like(x[2:], 9)])
    np.testing.assert_allclose(apply(x)[:2], apply(other)[:2], rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_bfloat16():
    module = tiny(stem='cifar')
    variables = shapes(module, (2, 8, 8, 1))
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), variables['params'])
    text = (
        jax.jit(module.apply).lower({**variables, 'params': half}, jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.bfloat16)).as_text()
    )
    products = [line for line in text.splitlines() if 'stablehlo.convolution' in line or 'dot_general' in line]
    assert len(products) == 7 and all('bf16' in line and 'f32' not in line.split('->')[-1] for line in products)


@pytest.mark.parametrize('block', ['basic', 'bottleneck'])
def test_partition_rules_split_every_convolution(block):
    abstract = {'params': shapes(ResNet(10, stages=(1, 1), width=16, block=block), (1, 32, 32, 3))['params']}
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ('data', 'model'))
    placed = shardings(mesh, PARTITION_RULES, abstract)
    for name, sharding in zip(leaves.names(abstract), jax.tree.leaves(placed), strict=True):
        assert ('model' in sharding.spec) == name.endswith('kernel'), name


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'block': 'botleneck'}, "block 'botleneck' does not exist\n  fix: did you mean 'bottleneck'"),
        ({'version': '1'}, "version '1' does not exist\n.*known: 1.5, 2"),
        ({'stem': 'cifr'}, "stem 'cifr' does not exist\n.*'cifar'"),
        ({'norm': 'none'}, "norm 'none' does not exist\n.*batch, group"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(UsageError, match=message):
        shapes(ResNet(3, **fields), (1, 32, 32, 3))


def test_tables_are_refused():
    with pytest.raises(UsageError, match=r"model 'resnet' reads images \(B, H, W, C\), not \(2, 9\)"):
        shapes(ResNet(3), (2, 9))
