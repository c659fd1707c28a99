"""The Transformer against plain numpy, and its properties: causality, padding, packing, scan, remat, cache, partitioning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from research.core import leaves, registry
from research.core.errors import UsageError
from research.models import presets
from research.models.attention import rotate, rotation, sinusoidal
from research.models.encoder_decoder import EncoderDecoder
from research.models.stack import LayerOptions, Stack
from research.models.transformer import PARTITION_RULES, Decoder, Encoder
from research.parallel.rules import shardings

# Tests compile much and compute little: the compiler need not optimise.
OPTIONS = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
jit = functools.partial(jax.jit, compiler_options=OPTIONS)
SMALL = {'depth': 2, 'width': 16, 'heads': 4, 'max_length': 12, 'init_std': 0.3}
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 8)).astype(np.int32)
GPT = {}
LLAMA = {
    'norm': 'rms',
    'positions': 'rotary',
    'kv_heads': 2,
    'activation': 'swiglu',
    'hidden': 24,
    'bias': False,
    'tied': False,
}
MODERN = {'norm': 'rms', 'positions': 'rotary', 'kv_heads': 1, 'activation': 'relu2', 'qk_norm': True, 'head_size': 6}
PAPER = {'norm_position': 'post', 'positions': 'sinusoidal', 'activation': 'relu'}
KINDS = {'gpt': GPT, 'llama': LLAMA, 'modern': MODERN, 'paper': PAPER}


@functools.cache
def decoder(kind='gpt', **options):
    """(module, variables) whose every leaf is random, biases and scales too."""
    module = Decoder(num_outputs=14, **SMALL, **KINDS[kind], **options)
    shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
    generator = np.random.default_rng(1)
    return module, jax.tree.map(lambda x: generator.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def logits(module, variables, tokens=TOKENS, **more):
    return np.asarray(jit(module.apply)(variables, tokens, **more))


def normalised(x, p, kind):
    x = x - x.mean(-1, keepdims=True) if kind == 'layer' else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p['scale'] + p.get('bias', 0)


def dense(x, p):
    """x (B, T, ...) through a kernel whose leading axes are contracted."""
    rank = x.ndim - 2
    return np.tensordot(x, p['kernel'], (range(2, x.ndim), range(rank))) + p.get('bias', 0)


def attended(x, memory, p, module, visible):
    """Attention of x (B, T, D) to a memory (B, S, D) where `visible` (B or 1, T, S), every head on its own."""
    query, key, value = dense(x, p['query']), dense(memory, p['key']), dense(memory, p['value'])
    if module.qk_norm:
        query, key = normalised(query, p['query_norm'], 'rms'), normalised(key, p['key_norm'], 'rms')
    if module.positions == 'rotary' and memory is x:
        by = rotation(jnp.arange(x.shape[1])[None], query.shape[-1])
        query, key = np.asarray(rotate(query, by)), np.asarray(rotate(key, by))
    found = np.zeros_like(query)
    for head in range(module.heads):
        group = head * key.shape[2] // module.heads
        scores = np.einsum('btk,bsk->bts', query[:, :, head], key[:, :, group]) / query.shape[-1] ** 0.5
        weights = np.exp(scores) * visible
        found[:, :, head] = np.einsum('bts,bsk->btk', weights / weights.sum(-1, keepdims=True), value[:, :, group])
    return dense(found, p['out'])


def feed_forward(x, p, activation):
    up = dense(x, p['up'])
    if activation == 'swiglu':
        gate = dense(x, p['gate'])
        return dense(gate / (1 + np.exp(-gate)) * up, p['down'])
    relu = np.maximum(up, 0)
    gelu = 0.5 * up * (1 + np.tanh((2 / np.pi) ** 0.5 * (up + 0.044715 * up**3)))
    return dense({'relu': relu, 'relu2': relu**2, 'gelu': gelu}[activation], p['down'])


def embedded(tokens, p, module, table='position'):
    x = p['embed']['embedding'][tokens]
    if module.positions == 'learned':
        x = x + p[table]['embedding'][: tokens.shape[1]]
    if module.positions == 'sinusoidal':
        x = x * 4 + np.asarray(sinusoidal(jnp.arange(tokens.shape[1]), 16))  # 4 = sqrt(16)
    return x


def through(x, p, module, visible, memory=None, visible_memory=None):
    """x (B, T, D) through the blocks of a stack: it attends to itself, then to the memory if there is one."""
    pre = module.norm_position == 'pre'
    for index in range(sum(name.startswith('layers_') for name in p)):
        block = p[f'layers_{index}']
        branches = {
            'attention': lambda x, block=block: attended(x, x, block['attention'], module, visible),
            'cross': lambda x, block=block: attended(x, memory, block['cross_attention'], module, visible_memory),
            'feed_forward': lambda x, block=block: feed_forward(x, block['feed_forward'], module.activation),
        }
        for name, branch in branches.items():
            if name == 'cross' and memory is None:
                continue
            norm = functools.partial(normalised, p=block[f'{name}_norm'], kind=module.norm)
            x = x + branch(norm(x)) if pre else norm(x + branch(x))
    return normalised(x, p['final_norm'], module.norm) if pre else x


def by_hand(module, variables):
    """The decoder in numpy."""
    p = variables['params']
    x = through(embedded(TOKENS, p, module), p['stack'], module, np.tri(TOKENS.shape[1])[None])
    return x @ (p['embed']['embedding'].T if module.tied else p['head']['kernel'])


def pairs_by_hand(module, variables, source, targets, segments):
    """The encoder-decoder in numpy; the source's `segments` (B, S) are 0 for padding and else 1."""
    p, text = variables['params'], segments[:, None] > 0
    memory = through(embedded(source, p, module), p['encoder'], module, text)
    x = embedded(targets, p, module, 'target_position')
    x = through(x, p['decoder'], module, np.tri(targets.shape[1])[None], memory, text)
    return x @ (p['embed']['embedding'].T if module.tied else p['head']['kernel'])


@pytest.mark.parametrize('kind', KINDS)
def test_the_decoder_is_the_formula(kind):
    module, variables = decoder(kind)
    np.testing.assert_allclose(logits(module, variables), by_hand(module, variables), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_reading_token_by_token_into_a_cache_is_the_forward_pass(kind):
    module, variables = decoder(kind)
    lengths = np.array([3, 2])  # the prompts; the second is padded on the right
    decode = jit(functools.partial(module.apply, method='decode'))
    first, cache = decode(variables, TOKENS[:, :3], module.init_cache(2, 8), lengths)
    whole = logits(module, variables)
    np.testing.assert_allclose(first[0], whole[0, :3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first[1, :2], whole[1, :2], rtol=1e-4, atol=1e-5)
    for index in range(5):
        tokens = np.take_along_axis(TOKENS, lengths[:, None] + index, axis=1)
        found, cache = decode(variables, tokens, cache)
        np.testing.assert_allclose(found[:, 0], whole[[0, 1], lengths + index], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache['length'], lengths + 5)


def stacked(variables, depth=2):
    """The variables of a scanned model that are those of an unscanned one."""
    stack = dict(variables['params']['stack'])
    stack['layers'] = jax.tree.map(lambda *x: np.stack(x), *(stack.pop(f'layers_{i}') for i in range(depth)))
    return {'params': {**variables['params'], 'stack': stack}}


@pytest.mark.parametrize('kind', ['gpt', 'llama'])
def test_scan_is_the_same_model_with_stacked_leaves_and_so_is_its_cache(kind):
    module, variables = decoder(kind)
    scanned, whole = module.clone(scan=True), logits(module, variables)
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), TOKENS)
    assert jax.tree.map(np.shape, stacked(variables)) == jax.tree.map(lambda x: x.shape, shapes)
    np.testing.assert_allclose(logits(scanned, stacked(variables)), whole, rtol=1e-4, atol=1e-5)
    decode = jit(functools.partial(scanned.apply, method='decode'))
    first, cache = decode(stacked(variables), TOKENS[:, :5], scanned.init_cache(2, 8))
    rest, _ = decode(stacked(variables), TOKENS[:, 5:], cache)
    np.testing.assert_allclose(np.concatenate([first, rest], axis=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('scan', [False, True])
def test_rematerialisation_changes_no_gradient_but_what_is_computed_again(scan):
    options, x = LayerOptions(width=8, heads=2, causal=True, dropout=0.2), np.random.default_rng(0).normal(size=(2, 4, 8))
    variables = jit(Stack(options, 2, scan).init)(jax.random.key(0), x)

    def loss(variables, remat):
        found = Stack(options, 2, scan, remat).apply(variables, x, train=True, rngs={'dropout': jax.random.key(0)})
        return (found**3).sum()

    gradient = {remat: jax.grad(functools.partial(loss, remat=remat)) for remat in ('none', 'dots', 'full')}
    results = {remat: jit(call)(variables) for remat, call in gradient.items()}
    for remat in ('full', 'dots'):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), results[remat], results['none'])
    products = {remat: str(jax.make_jaxpr(call)(variables)).count('dot_general') for remat, call in gradient.items()}
    assert products['none'] < products['dots'] < products['full']


@pytest.mark.parametrize('kind', KINDS)
def test_a_token_changes_nothing_before_it(kind):
    module, variables = decoder(kind)
    apply = jit(module.apply)
    before = np.asarray(apply(variables, TOKENS))
    for place in (1, 4, 7):
        changed = TOKENS.copy()
        changed[:, place] = (changed[:, place] + 1) % 13
        after = np.asarray(apply(variables, changed))
        np.testing.assert_array_equal(after[:, :place], before[:, :place])
        assert np.all(np.abs(after[:, place:] - before[:, place:]).max(-1) > 0)


@pytest.mark.parametrize('kind', ['gpt', 'llama'])
def test_a_packed_row_is_its_documents_alone_whatever_stands_in_the_padding(kind):
    module, variables = decoder(kind)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 2, 2, 2, 3, 0, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 0, 1, 2, 0, 0, 0]])
    apply = jit(module.apply)
    packed = np.asarray(apply(variables, TOKENS, segments=segments, positions=positions))
    assert np.all(np.isfinite(packed))
    documents = np.zeros((5, 8), np.int32)
    places = [
        np.argwhere((segments == n) & (np.arange(2)[:, None] == row)) for row, n in [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]
    ]
    for row, where in enumerate(places):
        documents[row, : len(where)] = TOKENS[tuple(where.T)]
    alone = logits(module, variables, documents)  # what follows a document cannot change it
    for row, where in enumerate(places):
        np.testing.assert_allclose(packed[tuple(where.T)], alone[row, : len(where)], rtol=1e-4, atol=1e-5)
    garbage = np.where(segments == 0, 12 - TOKENS, TOKENS)
    again = np.asarray(apply(variables, garbage, segments=segments, positions=positions))
    np.testing.assert_array_equal(again[segments > 0], packed[segments > 0])


def test_gradients_are_finite_differences():
    with jax.enable_x64(True):
        options = LayerOptions(
            width=8, heads=2, kv_heads=1, causal=True, cross=True, rotary=True, qk_norm=True, activation='swiglu'
        )
        module = Stack(options, depth=1)
        generator = np.random.default_rng(0)
        x, memory = generator.normal(size=(2, 3, 8)), generator.normal(size=(2, 4, 8))
        segments, memory_segments = np.array([[1, 1, 1], [1, 1, 0]]), np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
        weights = generator.normal(size=(2, 3, 8)) * segments[..., None]
        call = {'segments': segments, 'memory_segments': memory_segments}
        shapes = jax.eval_shape(module.init, jax.random.key(0), x, memory=memory)
        variables = jax.tree.map(lambda leaf: generator.normal(0, 0.5, leaf.shape), shapes)

        def loss(variables, x, memory):
            return jnp.sum(module.apply(variables, x, memory=memory, **call) * weights)

        point = (variables, x, memory)
        gradients, value = jit(jax.grad(loss, (0, 1, 2)))(*point), jit(loss)
        for number, name in enumerate(leaves.names(point)):
            flat, structure = jax.tree.flatten(point)
            direction = generator.normal(size=flat[number].shape)
            moved = [
                value(*jax.tree.unflatten(structure, [x + step * direction if i == number else x for i, x in enumerate(flat)]))
                for step in (1e-6, -1e-6)
            ]
            slope = np.sum(jax.tree.leaves(gradients)[number] * direction)
            np.testing.assert_allclose((moved[0] - moved[1]) / 2e-6, slope, rtol=1e-6, atol=1e-6, err_msg=name)


def test_dropout_is_active_in_training_only():
    module = decoder('gpt')[0].clone(dropout=0.5)
    variables, keys = decoder('gpt')[1], [{'dropout': jax.random.key(i)} for i in (0, 0, 1)]
    still = logits(module, variables)
    np.testing.assert_array_equal(still, logits(decoder('gpt')[0], variables))
    apply = jit(lambda rngs: module.apply(variables, TOKENS, train=True, rngs=rngs))
    first, again, other = (np.asarray(apply(key)) for key in keys)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - still).max() > 0.1 and np.abs(first - other).max() > 0.1


def test_a_tied_embedding_is_one_leaf_with_the_gradient_of_both_uses():
    module, variables = decoder('gpt')
    untied = {'params': {**variables['params'], 'head': {'kernel': variables['params']['embed']['embedding'].T}}}

    def loss(module):
        return lambda variables: (module.apply(variables, TOKENS) ** 2).mean()

    tied_gradient = jit(jax.grad(loss(module)))(variables)['params']
    gradient = jit(jax.grad(loss(module.clone(tied=False))))(untied)['params']
    assert 'head' not in tied_gradient
    both = gradient['embed']['embedding'] + gradient['head']['kernel'].T
    np.testing.assert_allclose(tied_gradient['embed']['embedding'], both, rtol=1e-3, atol=1e-4)


def test_fresh_kernels_have_the_standard_deviations_of_gpt2():
    module = Decoder(num_outputs=50, depth=8, width=64, heads=4)
    params = jit(module.init)(jax.random.key(0), TOKENS)['params']
    block = params['stack']['layers_3']
    for kernel in (block['attention']['query'], block['feed_forward']['up'], block['attention']['value']):
        np.testing.assert_allclose(np.std(kernel['kernel']), 0.02, rtol=0.1)
    for kernel in (block['attention']['out'], block['feed_forward']['down']):
        np.testing.assert_allclose(np.std(kernel['kernel']), 0.02 / 4, rtol=0.1)  # sqrt(2 * 8) = 4
    np.testing.assert_allclose(np.std(params['embed']['embedding']), 0.02, rtol=0.1)


def test_bfloat16_in_gives_bfloat16_out_near_float32():
    module, variables = decoder('llama')
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), variables)
    shape = jax.eval_shape(module.apply, half, TOKENS)
    assert shape.dtype == jnp.bfloat16
    whole = logits(module, variables)
    assert np.abs(logits(module, half).astype(np.float32) - whole).max() < 0.05 * np.abs(whole).max()


def encoder(**options):
    module = Encoder(**{'num_outputs': 3, 'vocabulary_size': 13, **SMALL, **options})
    shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
    generator = np.random.default_rng(1)
    return module, jax.tree.map(lambda x: generator.normal(0, 0.3, x.shape).astype(np.float32), shapes)


SEGMENTS = np.array([[1] * 8, [1] * 5 + [0] * 3])


@pytest.mark.parametrize('pooling', ['none', 'first', 'mean'])
def test_an_encoder_pools_what_is_text(pooling):
    module, variables = encoder(
        pooling=pooling, norm_position='post', embed_norm=True, segment_types=2, activation='gelu_exact'
    )
    apply = jit(module.apply)
    outputs = np.asarray(apply(variables, TOKENS, segments=SEGMENTS))
    short = np.asarray(apply(variables, TOKENS[1:, :5]))
    changed = np.asarray(apply(variables, np.where(SEGMENTS == 0, 12 - TOKENS, TOKENS), segments=SEGMENTS))
    text = SEGMENTS > 0 if pooling == 'none' else ...
    np.testing.assert_array_equal(changed[text], outputs[text])
    np.testing.assert_allclose(outputs[1, :5] if pooling == 'none' else outputs[1], short[0], rtol=1e-4, atol=1e-5)
    features = np.asarray(jit(functools.partial(module.apply, method='features'))(variables, TOKENS, segments=SEGMENTS))
    p = variables['params']
    pooled = {
        'none': features,
        'first': np.tanh(features[:, 0] @ p['pooler']['kernel'] + p['pooler']['bias']) if pooling == 'first' else None,
        'mean': np.stack([features[0].mean(0), features[1, :5].mean(0)]),
    }[pooling]
    expected = pooled @ p['head']['kernel'] + p['head']['bias']
    np.testing.assert_allclose(outputs[text], expected[text], rtol=1e-3, atol=1e-4)
    types = np.asarray(apply(variables, TOKENS, segments=SEGMENTS, types=np.ones_like(TOKENS)))
    assert np.abs(types - outputs).max() > 1e-3
    later = TOKENS.copy()
    later[:, 4] = (later[:, 4] + 1) % 13
    assert np.abs(apply(variables, later, segments=SEGMENTS) - outputs)[:, 0].max() > 1e-4  # it reads in both directions


def test_the_masked_head_is_berts_and_without_outputs_there_is_no_head():
    module, variables = encoder(num_outputs=13, mask_head=True, activation='gelu_exact', norm_eps=1e-5)
    p = variables['params']
    features = np.asarray(jit(functools.partial(module.apply, method='features'))(variables, TOKENS))
    x = dense(features, p['head']['transform'])
    x = normalised(np.asarray(jax.nn.gelu(x, approximate=False)), p['head']['norm'], 'layer')
    np.testing.assert_allclose(
        logits(module, variables), x @ p['embed']['embedding'].T + p['head']['bias'], rtol=1e-3, atol=1e-4
    )
    assert 'kernel' not in p['head']
    assert encoder(num_outputs=5, mask_head=True, tied=False)[1]['params']['head']['kernel'].shape == (16, 5)
    module, variables = encoder(num_outputs=0, pooling='mean')
    assert 'head' not in variables['params'] and logits(module, variables).shape == (2, 16)


@pytest.mark.parametrize('kind', ['gpt', 'modern', 'paper'])
def test_an_encoder_decoder_is_the_formula(kind):
    module = EncoderDecoder(num_outputs=13, **{**SMALL, 'depth': 1}, **KINDS[kind], decoder_depth=2)
    source, segments = TOKENS[:, :5], np.array([[1] * 5, [1] * 3 + [0] * 2])
    shapes = jax.eval_shape(functools.partial(module.init, targets=TOKENS), jax.random.key(0), source)
    generator = np.random.default_rng(1)
    variables = jax.tree.map(lambda x: generator.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    found = logits(module, variables, source, targets=TOKENS, segments=segments)
    np.testing.assert_allclose(found, pairs_by_hand(module, variables, source, TOKENS, segments), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize('options', [{'decoder_depth': 1}, {**LLAMA, 'scan': True}, PAPER], ids=['gpt', 'llama', 'paper'])
def test_an_encoder_decoder_never_sees_padding_and_reads_into_its_cache(options):
    module = EncoderDecoder(num_outputs=13, **SMALL, **options)
    source, targets, target_segments = TOKENS, TOKENS[:, ::-1], np.array([[1] * 8, [1] * 6 + [0] * 2])
    variables = jit(lambda key: module.init(key, source, targets=targets))(jax.random.key(0))
    apply = jit(module.apply)
    call = {'segments': SEGMENTS, 'target_segments': target_segments}
    whole = np.asarray(apply(variables, source, targets=targets, **call))
    garbage = np.where(SEGMENTS == 0, 12 - source, source), np.where(target_segments == 0, 12 - targets, targets)
    text = target_segments > 0
    np.testing.assert_array_equal(np.asarray(apply(variables, garbage[0], targets=garbage[1], **call))[text], whole[text])
    other = np.asarray(apply(variables, (source + 1) % 13, targets=targets, **call))
    assert np.abs(other - whole)[text].max() > 1e-2  # the source is read
    cache = jit(functools.partial(module.apply, method='encode'))(variables, source, module.init_cache(2, 8), segments=SEGMENTS)
    decode = jit(functools.partial(module.apply, method='decode'))
    found, cache = decode(variables, targets[:, :3], cache)
    np.testing.assert_allclose(found, whole[:, :3], rtol=1e-4, atol=1e-5)
    for index in range(3, 6):
        found, cache = decode(variables, targets[:, index : index + 1], cache)
        np.testing.assert_allclose(found[:, 0], whole[:, index], rtol=1e-4, atol=1e-5)


def everything():
    """The abstract variables of models that together have every kind of leaf."""
    yield Decoder(num_outputs=16, **SMALL), {}
    yield Decoder(num_outputs=16, **SMALL, **LLAMA, scan=True), {}
    yield Decoder(num_outputs=16, **SMALL, scan=True), {}
    yield Encoder(num_outputs=4, vocabulary_size=16, **SMALL, pooling='first', segment_types=2, embed_norm=True), {}
    yield EncoderDecoder(num_outputs=16, **SMALL, tied=False), {'targets': TOKENS}


def placed(variables):
    """(shardings on a mesh of 4 x 2 devices, the numbers of the rules that decide); raises where a spec does not fit."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
    numbered = [(rule, number) for number, (rule, _) in enumerate(PARTITION_RULES)]
    used = sorted(set(jax.tree.leaves(leaves.match(numbered, variables, allow_unused=True))))
    return shardings(mesh, [PARTITION_RULES[number] for number in used], variables), used


def test_partition_rules_cover_every_leaf_and_all_decide_something():
    used = set()
    for module, more in everything():
        variables = jax.eval_shape(functools.partial(module.init, **more), jax.random.key(0), TOKENS)
        found, decided = placed(variables)
        used |= set(decided)
        for name, leaf, sharding in zip(leaves.names(variables), *map(jax.tree.leaves, (variables, found)), strict=True):
            parts = np.prod(leaf.shape) / np.prod(sharding.shard_shape(leaf.shape))
            whole = any(word in name for word in ('norm', 'position', 'pooler', 'segment_type', 'out/bias', 'down/bias'))
            assert parts == (1 if whole else 2), name
    assert used == set(range(len(PARTITION_RULES)))


def test_a_partitioned_model_computes_the_same():
    module, variables = decoder('llama')
    shared = jax.device_put(variables, placed(variables)[0])
    query = shared['params']['stack']['layers_0']['attention']['query']['kernel']
    assert query.addressable_shards[0].data.shape == (16, 2, 4)  # two of four heads
    np.testing.assert_allclose(logits(module, shared), logits(module, variables), rtol=1e-4, atol=1e-5)


def parameters(module, **more):
    shapes = jax.eval_shape(functools.partial(module.init, **more), jax.random.key(0), jax.ShapeDtypeStruct((1, 4), jnp.int32))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


COUNTS = {  # name: (vocabulary, parameters); published unless the model is ours
    'gpt2_124m': (50257, 124_439_808),
    'gpt2_355m': (50257, 354_823_168),
    'gpt2_774m': (50257, 774_030_080),
    'gpt2_1558m': (50257, 1_557_611_200),
    'llama_7b': (32000, 6_738_415_616),
    'llama_1b': (128256, 1_235_814_400),
    'llama_3b': (128256, 3_212_749_824),
    'llama_8b': (128256, 8_030_261_248),
    'bert_tiny': (30522, 4_385_920),
    'bert_mini': (30522, 11_170_560),
    'bert_small': (30522, 28_763_648),
    'bert_base': (30522, 109_482_240),
    'bert_large': (30522, 335_141_888),
    'vaswani_base': (37000, 63_082_496),
    't5_like_small': (32128, 60_506_624 - 2 * 32 * 8),
    't5_like_base': (32128, 222_903_552 - 2 * 32 * 12),
    'tiny_decoder': (256, 116_480),
    'tiny_encoder_decoder': (256, 250_112),
}


@pytest.mark.parametrize('name', COUNTS)
def test_presets_have_the_published_numbers_of_parameters(name):
    vocabulary, count = COUNTS[name]
    made = registry.component('model', f'{name}(scan=True)', 'config.model').load()
    supplied = {'num_outputs': 0, 'vocabulary_size': vocabulary} if issubclass(made, Encoder) else {'num_outputs': vocabulary}
    more = {'targets': np.zeros((1, 4), int)} if issubclass(made, EncoderDecoder) else {}
    assert parameters(made(scan=True, **supplied), **more) == count
    assert f'{count:,}' in presets.__doc__


def test_the_tiny_encoder_of_the_table_and_arguments_from_a_config():
    assert parameters(presets.TinyEncoder(4, vocabulary_size=256)) == 116_740
    assert '116,740' in presets.__doc__
    built = registry.component('model', 'llama_1b(depth=1, rotary_theta=1e4)', 'config.model').build(num_outputs=7)
    assert (built.depth, built.width, built.rotary_theta, built.rotary_scaling[0]) == (1, 2048, 1e4, 32.0)
    with pytest.raises(UsageError, match=r"'gpt2_124m' has no argument 'dropuot'\n.*did you mean 'dropout'"):
        registry.component('model', 'gpt2_124m(dropuot=0.1)', 'config.model')


@pytest.mark.parametrize(
    ('module', 'message'),
    [
        (Decoder(13, width=15, heads=4), 'width=15 is not a multiple of heads=4\n.*give head_size'),
        (Decoder(13, width=16, heads=4, kv_heads=3), 'kv_heads=3 does not divide heads=4'),
        (Decoder(13, width=12, heads=4, positions='rotary'), 'rotary positions turn pairs, and the head size is 3'),
        (Decoder(13, width=15, heads=5, positions='sinusoidal'), 'sinusoidal positions come in pairs, and width=15'),
        (Decoder(13, width=16, heads=4, rotary_scaling=(8.0,)), 'has not four numbers\n.*original length'),
        (Decoder(13, width=16, heads=4, activation='swigul'), "activation 'swigul' does not exist\n.*did you mean 'swiglu'"),
        (Decoder(13, width=16, heads=4, norm='batch'), "norm 'batch' does not exist"),
        (Decoder(13, width=16, heads=4, norm_position='pst'), "norm_position 'pst' does not exist"),
        (Decoder(13, width=16, heads=4, positions='rotray'), "positions 'rotray' does not exist"),
        (Decoder(13, width=16, heads=4, remat='dot'), "remat 'dot' does not exist"),
        (Decoder(13, width=16, heads=4, attention='fash'), "attention 'fash' does not exist"),
        (Decoder(13, width=16, heads=4, max_length=7), 'max_length=7\n.*raise model.max_length'),
        (Encoder(3, width=16, heads=4), 'vocabulary_size=0\n.*tokenizer'),
        (Encoder(3, vocabulary_size=13, pooling='cls'), "pooling 'cls' does not exist"),
        (Encoder(3, vocabulary_size=13, mask_head=True), 'cannot give 3 outputs for a vocabulary of 13'),
        (EncoderDecoder(13, width=16, heads=4), "needs targets\n.*task.name='seq2seq'"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_mistakes(module, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), TOKENS)


def test_mistakes_of_calls():
    module, variables = decoder('gpt')
    with pytest.raises(UsageError, match=r'reads integers \(B, T\), not float32 \(2, 8\)\n.*set data.tokenizer'):
        module.apply(variables, TOKENS.astype(np.float32))
    with pytest.raises(UsageError, match='13 tokens are more than the model has positions, max_length=12'):
        module.init_cache(2, 13)
    pairs = EncoderDecoder(13, **SMALL)
    with pytest.raises(UsageError, match=r'the cache holds no source\n.*call encode'):
        pairs.apply(variables, TOKENS, pairs.init_cache(2, 8), method='decode')
