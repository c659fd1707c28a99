"""Recurrent networks against plain numpy, their masks, padding, directions and caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

from research.core import leaves
from research.core.errors import UsageError
from research.models import recurrent
from research.models.recurrent import Recurrence
from research.models.rnn import PARTITION_RULES, RNN
from research.parallel.rules import shardings

B, T, D, H = 3, 6, 4, 5
LENGTHS = np.array([6, 3, 1])
KEY = jax.random.key(0)


def draw(shape=(B, T, D), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def segments_of(lengths, time=T):
    return (np.arange(time) < np.asarray(lengths)[:, None]).astype(np.int32)


def start(module, *inputs, **arguments):
    """Variables of normal numbers: biases that are not zero show if one is in the wrong place."""
    shapes = jax.eval_shape(lambda: module.init(KEY, *inputs, train=False, **arguments))
    flat, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, [0.4 * draw(leaf.shape, seed) for seed, leaf in enumerate(flat)])


def apply(module, variables, *inputs, train=False, **arguments):
    rngs = {'dropout': KEY} if train else {}
    return jax.jit(lambda variables, inputs: module.apply(variables, *inputs, train=train, rngs=rngs, **arguments))(
        variables, inputs
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def one_direction(params, x):
    """Hidden states (T, H) of one sequence x (T, D) in float64, gate by gate as in PyTorch's documentation."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    kernels, biases, recurrents = p['input']['kernel'], p['input']['bias'], p['recurrent_kernel']
    h = c = np.zeros(kernels.shape[-1])
    found = []
    for step in x:
        inputs = [step @ kernels[:, g] + biases[g] for g in range(kernels.shape[1])]
        own = [h @ recurrents[:, g] for g in range(kernels.shape[1])]
        if len(own) == 4:
            i, f, g, o = (a + b for a, b in zip(inputs, own, strict=True))
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            r, z = sigmoid(inputs[0] + own[0]), sigmoid(inputs[1] + own[1])
            n = np.tanh(inputs[2] + r * (own[2] + p['recurrent_bias']))
            h = (1 - z) * n + z * h
        found.append(h)
    return np.stack(found)


def both_directions(params, x):
    """Outputs (T, W) of a bidirectional stack."""
    for index in range(len(params) // 2):
        ahead = one_direction(params[f'layers_{index}_forward'], x)
        back = one_direction(params[f'layers_{index}_backward'], x[::-1])[::-1]
        x = np.concatenate([ahead, back], axis=1)
    return x


@pytest.fixture(params=['lstm', 'gru'])
def cell(request):
    return request.param


def test_a_layer_has_the_values_of_numpy(cell):
    x, module = draw(), Recurrence(cell, H)
    variables = start(module, x)
    hidden, last = apply(module, variables, x)
    expected = np.stack([one_direction(variables['params'], row) for row in x])
    np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(last[0], hidden[:, -1])


def test_the_worked_example_of_the_docstring():
    gates = jnp.array([0.0, 1.0, 0.5, 0.0])[None, :, None]  # (1, 4, 1)
    hidden, memory = recurrent.lstm((jnp.zeros((1, 1)), jnp.full((1, 1), 2.0)), gates, jnp.zeros_like(gates), None)
    np.testing.assert_allclose([hidden[0, 0], memory[0, 0]], [0.467, 1.693], atol=5e-4)


def test_first_parameters(cell):
    params = jax.jit(lambda: Recurrence(cell, H).init(KEY, draw(), False))()['params']
    for gate in range(params['recurrent_kernel'].shape[1]):
        kernel = np.asarray(params['recurrent_kernel'][:, gate])
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(H), atol=1e-5)
    assert np.abs(params['recurrent_kernel'][:, 0] - params['recurrent_kernel'][:, 1]).max() > 0.1
    bias = params['input']['bias']
    np.testing.assert_array_equal(bias, np.eye(4)[1][:, None] * np.ones(H) if cell == 'lstm' else np.zeros((3, H)))


def test_padding_never_influences_and_the_reverse_direction_begins_at_the_true_end(cell):
    module = RNN(0, cell=cell, hidden=(H, 4), bidirectional=True, pooling='none')
    x, inside = draw(), segments_of(LENGTHS)
    variables = start(module, x)
    found = apply(module, variables, np.where(inside[..., None], x, 1e3), segments=inside)
    for row, length in enumerate(LENGTHS):
        expected = both_directions(variables['params']['stack'], x[row, :length])  # (length, W)
        np.testing.assert_allclose(found[row, :length], expected, rtol=1e-5, atol=1e-6)


def test_pooling():
    module = RNN(0, cell='gru', hidden=(H,), bidirectional=True)
    x, inside = draw(), segments_of(LENGTHS)
    variables = start(module, x)
    last, mean = (apply(module.clone(pooling=pooling), variables, x, segments=inside) for pooling in ('last', 'mean'))
    for row, length in enumerate(LENGTHS):
        expected = both_directions(variables['params']['stack'], x[row, :length])  # (length, W)
        np.testing.assert_allclose(last[row], np.concatenate([expected[-1, :H], expected[0, H:]]), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mean[row], expected.mean(0), rtol=1e-5, atol=1e-6)


def test_without_segments_nothing_is_padding():
    module = RNN(0, cell='gru', hidden=(H,), bidirectional=True, pooling='mean')
    x = draw()
    variables = start(module, x)
    expected = np.stack([both_directions(variables['params']['stack'], row).mean(0) for row in x])
    np.testing.assert_allclose(apply(module, variables, x), expected, rtol=1e-5, atol=1e-6)


def test_documents_packed_in_a_row_are_as_if_alone(cell):
    module = RNN(0, cell=cell, hidden=(H, 4), bidirectional=True, pooling='none')
    x = draw((1, 9, D))
    variables = start(module, x)
    segments = np.array([[1, 1, 1, 2, 2, 0, 3, 3, 0]], np.int32)
    packed = apply(module, variables, x, segments=segments)
    for number in (1, 2, 3):
        inside = segments[0] == number
        expected = both_directions(variables['params']['stack'], x[0, inside])
        np.testing.assert_allclose(packed[0, inside], expected, rtol=1e-5, atol=1e-6)


def test_a_row_of_nothing_but_padding_has_finite_gradients():
    module = RNN(3, hidden=(H,), pooling='mean')
    x = draw()
    empty = jnp.zeros((B, T), jnp.int32)
    gradient = jax.jit(jax.grad(lambda v: module.apply(v, x, segments=empty).sum()))(start(module, x))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_gradients_are_finite_differences(cell):
    with jax.enable_x64(True):
        module = RNN(2, cell=cell, hidden=(3,), bidirectional=True, zoneout=0.2)
        x = jnp.asarray(draw((2, 4, 2)), jnp.float64)
        segments = jnp.array([[1, 1, 1, 1], [1, 1, 2, 0]])
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), start(module, x))
        flat, restore = ravel_pytree(variables)

        def loss(flat):
            return jnp.sum(jnp.sin(module.apply(restore(flat), x, segments=segments)))

        both = jax.jit(jax.value_and_grad(loss))
        gradient = both(flat)[1]
        for index in np.random.default_rng(0).choice(flat.size, 12, replace=False):
            step = 1e-6 * np.eye(1, flat.size, index)[0]
            numeric = (both(flat + step)[0] - both(flat - step)[0]) / 2e-6
            np.testing.assert_allclose(gradient[index], numeric, rtol=1e-6, atol=1e-9)


# Dropout


def test_a_mask_is_one_for_all_steps_or_new_at_every_step():
    x = jnp.ones((4, 50, 30))
    variational = np.asarray(recurrent.dropout(x, 0.4, KEY, True))
    assert set(np.unique(variational)) == {0, np.float32(1) / np.float32(0.6)}
    assert (variational == variational[:, :1]).all()
    assert len(np.unique(variational[:, 0], axis=0)) == 4  # every sequence has its own
    plain = np.asarray(recurrent.dropout(x, 0.4, KEY, False))
    assert all(len(np.unique(row, axis=0)) == 50 for row in plain)
    assert abs(plain.mean() - 1) < 0.03


@pytest.mark.parametrize('variational', [True, False])
def test_input_masks(variational):
    """An input that is dropped has no gradient."""
    module = RNN(1, hidden=(16,), input_dropout=0.5, variational=variational, pooling='mean')
    x = draw((2, 12, 10))
    variables = start(module, x)
    gradient = jax.jit(jax.grad(lambda x: module.apply(variables, x, train=True, rngs={'dropout': KEY}).sum()))(x)
    dropped = np.asarray(gradient) == 0  # (B, T, D)
    assert 0.3 < dropped.mean() < 0.7
    assert (dropped == dropped[:, :1]).all() == variational
    assert (dropped[0] != dropped[1]).any()


@pytest.mark.parametrize('variational', [True, False])
def test_output_masks(variational):
    module = RNN(0, hidden=(7, 16), output_dropout=0.5, variational=variational, pooling='none')
    x = draw((2, 12, 10))
    outputs = apply(module, start(module, x), x, train=True)
    dropped = np.asarray(outputs) == 0  # (B, T, W)
    assert 0.3 < dropped.mean() < 0.7
    assert (dropped == dropped[:, :1]).all() == variational
    assert (dropped[0] != dropped[1]).any()


@pytest.mark.parametrize('variational', [True, False])
def test_recurrent_masks(variational):
    """The kernel's row of a hidden unit has no gradient if and only if the unit is dropped at every step."""
    module = RNN(1, hidden=(40,), recurrent_dropout=0.5, variational=variational, pooling='mean')
    x = draw((1, 20, D))

    def loss(variables):
        return module.apply(variables, x, train=True, rngs={'dropout': KEY}).sum()

    rows = jax.jit(jax.grad(loss))(start(module, x))['params']['stack']['layers_0_forward']['recurrent_kernel']  # (H, G, H)
    never = (np.asarray(rows) == 0).all((1, 2))
    assert 0.25 < never.mean() < 0.75 if variational else not never.any()


def test_dropout_is_silent_in_evaluation_and_follows_the_key():
    rates = {'input_dropout': 0.3, 'recurrent_dropout': 0.3, 'output_dropout': 0.3, 'variational': False}
    x, plain = draw(), RNN(3, cell='gru', hidden=(H,))
    variables, module = start(plain, x), plain.clone(**rates)
    np.testing.assert_array_equal(apply(module, variables, x), apply(plain, variables, x))
    run = jax.jit(lambda key: module.apply(variables, x, train=True, rngs={'dropout': key}))
    one, same, other = (run(jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3


def test_zoneout_keeps_old_values_at_its_rate(cell):
    module = Recurrence(cell, 64, zoneout=(0.3, 0.0))
    x = draw((4, 30, D))
    hidden, _ = apply(module, start(module, x), x, train=True)
    kept = np.asarray(hidden[:, 1:] == hidden[:, :-1])
    assert abs(kept.mean() - 0.3) < 0.02
    assert (kept != kept[:, :1]).any()  # a new draw at every step


def test_zoneout_of_the_memory_leaves_the_hidden_state_free():
    module = Recurrence('lstm', 64, zoneout=(0.0, 0.9))
    x = draw((4, 30, D))
    hidden, _ = apply(module, start(module, x), x, train=True)
    assert not (hidden[:, 1:] == hidden[:, :-1]).any()


def test_zoneout_in_evaluation_is_the_expectation_of_one_step(cell):
    """From the same state, the mean over many draws of the next state."""
    module = Recurrence(cell, H, zoneout=(0.4, 0.2))
    x = np.broadcast_to(draw((1, 1, D)), (20_000, 1, D))
    parts = len(recurrent.zero_state(cell, 1, H, jnp.float32))
    state = tuple(jnp.broadcast_to(draw((1, H), seed), (20_000, H)) for seed in range(parts))
    variables = start(module, x[:1])
    _, drawn = apply(module, variables, x, state=state, train=True)
    _, expected = apply(module, variables, x, state=state)
    for one, other in zip(drawn, expected, strict=True):
        np.testing.assert_allclose(one.mean(0), other[0], atol=0.02)
        assert one.std(0).min() > 0.01


# As a language model


def test_a_cache_gives_the_logits_of_the_whole_text(cell):
    module = RNN(11, cell=cell, hidden=(H, 4), pooling='none', vocabulary_size=11, embedding=6)
    tokens = np.random.default_rng(0).integers(0, 11, (B, T)).astype(np.int32)
    variables = start(module, tokens)
    whole = apply(module, variables, tokens)
    features = apply(module, variables, tokens, method='features')
    np.testing.assert_allclose(module.apply(variables, features, method='head'), whole, rtol=1e-6, atol=1e-6)
    prompt = np.array([3, 2, 1])
    decode = jax.jit(functools.partial(module.apply, variables, method='decode'))
    logits, cache = decode(tokens[:, :3], module.init_cache(B, T), lengths=prompt)
    for row, length in enumerate(prompt):
        np.testing.assert_allclose(logits[row, :length], whole[row, :length], rtol=1e-5, atol=1e-6)
    for step in range(3):
        following = np.stack([tokens[row, length + step] for row, length in enumerate(prompt)])[:, None]
        logits, cache = decode(following, cache)
        expected = np.stack([whole[row, length + step] for row, length in enumerate(prompt)])
        np.testing.assert_allclose(logits[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_a_later_token_does_not_change_earlier_logits():
    module = RNN(11, hidden=(H,), pooling='none', vocabulary_size=11)
    tokens = np.zeros((1, T), np.int32)
    variables = start(module, tokens)
    changed = tokens.copy()
    changed[0, 4] = 7
    one, other = apply(module, variables, tokens), apply(module, variables, changed)
    np.testing.assert_array_equal(one[0, :4], other[0, :4])
    assert np.abs(one[0, 4] - other[0, 4]).max() > 1e-4


def test_bfloat16_keeps_the_memory_in_float32():
    module = Recurrence('lstm', H)
    x = draw((1, 200, D)).astype(jnp.bfloat16)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), start(module, x))
    hidden, last = apply(module, variables, x)
    assert hidden.dtype == jnp.bfloat16
    assert [part.dtype for part in last] == [jnp.bfloat16, jnp.float32]
    exact, _ = apply(module, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables), x.astype(np.float32))
    np.testing.assert_allclose(hidden.astype(jnp.float32), exact, atol=0.03)


# The rest


def size(module, *inputs):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(module.init, KEY, *inputs)['params']))


def test_the_size_table_is_true():
    assert size(RNN(10), jnp.ones((1, 8, 8, 1))) == 71_434
    tokens = jnp.ones((1, 4), jnp.int32)
    assert size(RNN(256, cell='gru', pooling='none', vocabulary_size=256, embedding=64), tokens) == 123_648


@pytest.mark.parametrize('vocabulary', [0, 16])
def test_partition_rules_split_every_leaf_over_its_units(vocabulary):
    module = RNN(4, cell='gru', hidden=(8, 8), bidirectional=True, vocabulary_size=vocabulary)
    inputs = jnp.ones((1, 2), jnp.int32) if vocabulary else jnp.ones((1, 2, 4))
    abstract = jax.eval_shape(module.init, KEY, inputs)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ('data', 'model'))
    rules = [rule for rule in PARTITION_RULES if vocabulary or rule[0] != '.*embed/embedding']
    placed = shardings(mesh, rules, abstract)
    for name, leaf, sharding in zip(leaves.names(abstract), *map(jax.tree.leaves, (abstract, placed)), strict=True):
        axis = 0 if name.endswith('embedding') else leaf.ndim - 1
        assert sharding.shard_shape(leaf.shape) == tuple(n // 4 if i == axis else n for i, n in enumerate(leaf.shape)), name


def test_an_lstm_learns_which_digit_it_reads_row_by_row():
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    module, optimizer = RNN(10, hidden=(32,)), optax.adam(1e-2)

    @jax.jit
    def train(images, labels):
        def loss(variables, x, y):
            return optax.softmax_cross_entropy_with_integer_labels(module.apply(variables, x), y).mean()

        def step(carry, rows):
            variables, state = carry
            updates, state = optimizer.update(jax.grad(loss)(variables, images[rows], labels[rows]), state)
            return (optax.apply_updates(variables, updates), state), None

        variables = module.init(KEY, images[:1])
        (variables, _), _ = jax.lax.scan(
            step, (variables, optimizer.init(variables)), np.arange(1400 * 8).reshape(-1, 70) % 1400
        )
        return module.apply(variables, images)

    accuracy = (train(images, labels).argmax(-1) == labels)[1400:].mean()
    assert accuracy > 0.8


@pytest.mark.parametrize(
    ('fields', 'shape', 'message'),
    [
        ({'cell': 'ltsm'}, (1, 2, 3), "model.cell is 'ltsm'\n.*lstm"),
        ({'pooling': 'first'}, (1, 2, 3), "model.pooling is 'first'"),
        ({'recurrent_dropout': 1.0}, (1, 2, 3), r'model.recurrent_dropout is 1.0, outside \[0, 1\)'),
        ({'zoneout': -0.1}, (1, 2, 3), r'model.zoneout is -0.1, outside \[0, 1\)'),
        ({'hidden': ()}, (1, 2, 3), r'model.hidden is \(\)\n.*width of each layer'),
        ({}, (1, 2), r"not float32 \(1, 2\)\n.*model='mlp' for tables"),
    ],
)
def test_mistakes(fields, shape, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(RNN(3, **fields).init, KEY, jnp.ones(shape))


@pytest.mark.parametrize('fields', [{'bidirectional': True, 'pooling': 'none'}, {'pooling': 'last'}])
def test_only_a_causal_network_writes_token_by_token(fields):
    module = RNN(4, hidden=(H,), vocabulary_size=4, **fields)
    tokens = jnp.ones((1, 2), jnp.int32)
    with pytest.raises(UsageError, match='cannot write one token at a time'):
        module.apply({}, tokens, module.init_cache(1, 2), method='decode')
