"""Language modelling: chunked cross-entropy, loss by true tokens, packed rows, and the metrics over tokens."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn
from jax.extend import core as jax_core

from research.core import registry, terms
from research.core.errors import UsageError
from research.data.source import DataSpec
from research.models.rnn import RNN
from research.models.transformer import Decoder, Encoder
from research.parallel.mesh import batch_sharding, replicated
from research.tasks.chunked import in_chunks, score
from research.tasks.language import Language
from research.train import evaluate, step
from tests.tasks.tiny_text import LETTERS, Mixing, V, close, evaluated, gradient, measured, packed, padded, rows, spec_of

SPEC = spec_of('tokens', 'segment', 'position', length=9)
ROWS = ('tokens', 'segment', 'position')


def make(model=Mixing, data=SPEC, dtype=jnp.float32, **arguments):
    return Language(model=model, data=data, dtype=dtype, **arguments)


language = functools.cache(make)  # equal tasks are one, so that their programs are compiled once


@functools.cache
def variables_of(model=Mixing):
    return jax.jit(language(model).init)(jax.random.key(0), packed())


@functools.partial(jax.jit, static_argnums=0)
def logits_of(task, variables, batch):
    return task.apply(variables, batch, None, False)[0]


def costs(task, batch):
    """The cross-entropy of every place by numpy, (B, T) float64, and which places count."""
    outputs = np.asarray(logits_of(task, variables_of(task.model), batch), np.float64)
    log_p = scipy.special.log_softmax(outputs, -1)
    targets = batch['tokens'][:, 1:]
    nats = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    counts = batch['mask'][:, None] > 0
    if 'segment' in batch:
        counts = counts & (batch['segment'][:, 1:] == batch['segment'][:, :-1]) & (batch['segment'][:, 1:] > 0)
    return nats, np.broadcast_to(counts, nats.shape), log_p


@pytest.mark.parametrize('smoothing', [0.0, 0.3])
@pytest.mark.parametrize('z_loss', [0.0, 0.01])
def test_score_is_its_formula(smoothing, z_loss):
    generator = np.random.default_rng(0)
    logits, targets = np.float32(generator.normal(size=(3, 4, 6)) * 3).astype(float), generator.integers(0, 6, (3, 4))
    log_z = scipy.special.logsumexp(logits, -1)
    q = (1 - smoothing) * np.eye(6)[targets] + smoothing / 6
    found = jax.jit(score, static_argnums=(2, 3))(jnp.float32(logits), targets, smoothing, z_loss)
    want = -(q * (logits - log_z[..., None])).sum(-1) + z_loss * log_z**2
    np.testing.assert_allclose(found['loss'], want, rtol=5e-6, atol=5e-7)
    np.testing.assert_allclose(
        found['nats'], log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0], rtol=5e-6, atol=5e-7
    )
    np.testing.assert_array_equal(found['correct'], logits.argmax(-1) == targets)


@pytest.mark.parametrize('smoothing', [0.0, 0.3])
def test_the_gradient_of_score_is_the_finite_difference(smoothing):
    logits, targets = np.random.default_rng(1).normal(size=(2, 5)), np.array([3, 0])
    got = jax.jit(jax.grad(lambda x: score(x, targets, smoothing, 0.1)['loss'].sum()))(jnp.float32(logits))

    def cost(x):
        log_z = scipy.special.logsumexp(x, -1)
        q = (1 - smoothing) * np.eye(5)[targets] + smoothing / 5
        return np.sum(log_z - (q * x).sum(-1) + 0.1 * log_z**2)

    steps = np.eye(10).reshape(10, 2, 5) * 1e-6
    want = np.array([cost(logits + s) - cost(logits - s) for s in steps]).reshape(2, 5) / 2e-6
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_score_hides_no_failure():
    logits = jnp.zeros((4, 3)).at[1].set(jnp.nan)
    found = jax.jit(score)(logits, jnp.array([0, 0, 3, -1]))
    for values in found.values():
        np.testing.assert_array_equal(np.isnan(values), [False, True, True, True])


@pytest.mark.parametrize('chunk', [1, 3, 7, 100])
def test_in_chunks_is_the_function_of_the_whole(chunk):
    x, y = np.random.default_rng(0).normal(size=(2, 3, 7, 2)).astype(np.float32)
    seen = []

    def both(a, b):
        seen.append(a.shape)
        return {'sum': jnp.sin(a).sum(-1), 'pair': a * b}

    found = in_chunks(both, chunk, x, y)
    close(found, {'sum': np.sin(x).sum(-1), 'pair': x * y})
    assert set(seen) == {(3, chunk, 2)}


@pytest.mark.parametrize('batch', [packed(1), rows(1, length=9)], ids=['packed', 'windows'])
def test_the_loss_is_that_of_numpy_over_true_tokens(batch):
    task = language()
    nats, counts, log_p = costs(task, batch)
    found = evaluated(task, variables_of(), batch)
    assert counts.sum() > 0 and float(found['loss'][1]) == counts.sum()
    assert float(found['loss'][0]) == pytest.approx(nats[counts].sum(), rel=1e-6)
    right = log_p.argmax(-1) == batch['tokens'][:, 1:]
    assert [float(x) for x in found['accuracy']] == [right[counts].sum(), counts.sum()]


@pytest.mark.parametrize(
    ('chunk', 'arguments'), [(3, {}), (8, {}), (50, {}), (1, {'label_smoothing': 0.1, 'z_loss': 1e-3})], ids=str
)
def test_chunks_change_neither_value_nor_gradient(chunk, arguments):
    batch = packed(2)
    batch['mask'][3] = 0
    whole = gradient(language(**arguments), variables_of(), batch)
    close(gradient(language(chunk=chunk, **arguments), variables_of(), batch), whole)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole[0])) > 0.1
    one, other = (measured(language(chunk=c, **arguments), variables_of(), batch) for c in (0, chunk))
    assert one == pytest.approx(other, rel=1e-6)


def test_chunks_drop_out_what_the_whole_drops_out():
    model = functools.partial(Mixing, dropout=0.5)
    whole, chunked = (gradient(language(model, chunk=chunk), variables_of(), packed()) for chunk in (0, 3))
    close(chunked, whole)
    assert float(whole[1]['loss'][0]) != pytest.approx(float(evaluated(language(), variables_of(), packed())['loss'][0]))


def large(vocabulary, length):
    """Data with a vocabulary of that size."""
    tokenizer = type('Large', (), {**vars(type(LETTERS)), 'vocabulary_size': vocabulary, 'byte_lengths': np.ones(vocabulary)})
    return spec_of('tokens', tokenizer=tokenizer(), length=length + 1)


def sizes(jaxpr):
    """The number of elements of every array in a jaxpr, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield from (math.prod(variable.aval.shape) for variable in equation.outvars)
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda p: isinstance(p, jax_core.ClosedJaxpr | jax_core.Jaxpr)
        ):
            inner = getattr(parameter, 'jaxpr', parameter)
            if isinstance(inner, jax_core.Jaxpr):
                yield from sizes(inner)


def test_chunked_logits_of_the_whole_never_exist():
    """Neither in the program as traced, nor in the memory that the compiler sets aside: forward, backward and evaluation."""
    length, vocabulary, chunk = 128, 5000, 4
    data, batch = large(vocabulary, length), rows(0, 4, length + 1)
    model = functools.partial(Mixing, vocabulary_size=vocabulary)
    variables = jax.eval_shape(make(model, data).init, jax.random.key(0), batch)
    largest, bytes_used = {}, {}
    for c in (0, chunk):
        task = make(model, data, chunk=c)
        for function in (lambda v, b, t=task: gradient(t, v, b), task.predict):
            largest.setdefault(c, []).append(max(sizes(jax.make_jaxpr(function)(variables, batch).jaxpr)))
            used = jax.jit(function).lower(variables, batch).compile().memory_analysis().temp_size_in_bytes
            bytes_used.setdefault(c, []).append(used)
    all_logits = 4 * length * vocabulary
    assert min(largest[0]) >= all_logits and min(bytes_used[0]) >= 4 * all_logits
    assert max(largest[chunk]) == max(vocabulary * 16, all_logits * chunk // length)
    assert max(bytes_used[chunk]) < min(bytes_used[0]) / 6


def test_the_gradients_of_chunks_are_added_in_float32():
    """300 chunks that each give 1 to a gradient of 1000 would be lost in bfloat16, which has 8 bits."""
    batch = rows(0, 1, 301)
    task = make(data=spec_of('tokens', length=301), dtype=jnp.bfloat16, chunk=1)
    exact, _ = gradient(make(data=task.data), variables_of(), batch)
    found, _ = gradient(task, variables_of(), batch)
    assert found['head']['bias'].dtype == jnp.float32
    close(found['head']['bias'], exact['head']['bias'], rtol=0.02, atol=0.2)


def test_chunks_keep_the_batch_where_it_is(mesh):
    """On eight devices no activation is sent: only sums over the batch (losses, gradients) are."""
    batch = jax.device_put(packed(3, 16), batch_sharding(mesh))
    task, variables = language(chunk=3), jax.device_put(variables_of(), replicated(mesh))
    compiled = gradient.lower(task, variables, batch).compile()
    text = compiled.as_text()
    assert 'all-reduce' in text
    for moved in ('all-gather', 'all-to-all', 'collective-permute'):
        assert moved not in text
    close(compiled(variables, batch), gradient(task, variables_of(), packed(3, 16)), rtol=2e-6)


def test_a_vocabulary_that_is_laid_out_over_devices_stays_there():
    """Each device scores its own tokens: what is sent for a place is a number or two, never its logits."""
    length, vocabulary, chunk = 16, 64, 4
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ('data', 'model'))
    task = make(functools.partial(Mixing, vocabulary_size=vocabulary), large(vocabulary, length), chunk=chunk)
    batch = rows(0, 8, length + 1)

    def placed(x, *axes):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    variables = jax.tree.map(placed, jax.eval_shape(task.init, jax.random.key(0), batch))
    head = variables['params']['head']
    head |= {'kernel': placed(head['kernel'], None, 'model'), 'bias': placed(head['bias'], 'model')}
    text = gradient.lower(task, variables, jax.tree.map(lambda x: placed(x, 'data'), batch)).compile().as_text()
    for moved in ('all-gather', 'all-to-all', 'collective-permute'):
        assert moved not in text
    found = re.findall(r'= s32\[([0-9,]+)\]\S* all-reduce', text)  # the places of the largest logits, of 4 rows a device
    assert found and {math.prod(map(int, shape.split(','))) for shape in found} == {4 * chunk}


def test_the_evaluator_scores_once(mesh):
    """Loss and predictions of one batch come from one pass over the chunks."""
    task = language(chunk=3)
    evaluator = evaluate.Evaluator(task, lambda keys, batch: batch, mesh)
    batch = jax.device_put(packed(3, 16), batch_sharding(mesh))
    variables = jax.device_put(variables_of(), replicated(mesh))
    text = evaluator._batch_states.lower(variables, batch).compile().as_text()
    assert text.count(' while(') == 1
    found = evaluator(variables, lambda _: batch, 1)
    assert found['perplexity'] == pytest.approx(math.exp(found['loss']), rel=1e-6)
    assert evaluator.names(variables, batch) == ['loss', 'perplexity', 'bits_per_byte']


def test_models_that_see_what_they_are_to_predict_are_refused():
    both = functools.partial(RNN, hidden=(4,), pooling='none', bidirectional=True)
    for model in (both, functools.partial(Encoder, depth=1, width=8, heads=2)):
        with pytest.raises(UsageError, match=r"sees the tokens that task language has it predict\n  fix: .*'masked'"):
            make(model, SPEC)
    for model in (functools.partial(both, bidirectional=False), functools.partial(Decoder, depth=1, width=8, heads=2)):
        task = make(model, SPEC)
        variables = jax.jit(task.init)(jax.random.key(0), rows(0, 2, 6))
        batch = rows(1, 2, 6)
        later = {**batch, 'tokens': np.where(np.arange(6) >= 4, 5, batch['tokens'])}
        before, after = (jax.jit(task.predict)(variables, given)['nats'][:, :3] for given in (batch, later))
        np.testing.assert_array_equal(before, after)


def test_padding_changes_nothing():
    task, batch = language(chunk=3), packed(4)
    longer = padded(batch, ROWS, 5)
    close(gradient(task, variables_of(), longer), gradient(task, variables_of(), batch), rtol=2e-6)
    assert measured(task, variables_of(), longer) == pytest.approx(measured(task, variables_of(), batch), rel=1e-6)


def test_masked_rows_influence_nothing():
    task, batch = language(chunk=3), packed(5)
    keep = np.arange(8) < 5
    few = {key: value[:5] for key, value in batch.items()}
    garbage = {'tokens': 9999, 'segment': -3, 'position': 77, 'mask': 0, 'id': -1, 'epoch': 9}
    spoilt = {k: np.where(keep.reshape(-1, *[1] * (v.ndim - 1)), v, garbage[k]).astype(v.dtype) for k, v in batch.items()}
    close(gradient(task, variables_of(), spoilt), gradient(task, variables_of(), few), rtol=2e-6)
    assert measured(task, variables_of(), spoilt) == pytest.approx(measured(task, variables_of(), few), rel=1e-6)


@pytest.mark.parametrize('chunk', [0, 3])
def test_nan_features_of_padding_influence_nothing(chunk):
    """A model may make NaN of padding."""

    class Breaking(Mixing):
        def features(self, inputs, train=False, *, segments=None, positions=None):
            clean = super().features(inputs, train, segments=segments, positions=positions)
            return clean if chunk == 0 else jnp.where(segments[..., None] > 0, clean, jnp.nan)

        def __call__(self, inputs, train=False, *, segments=None, positions=None):
            clean = self.head(self.features(inputs, train, segments=segments, positions=positions))
            return jnp.where(segments[..., None] > 0, clean, jnp.nan)

    batch = packed(6)
    assert (batch['segment'][:, :-1] == 0).any()
    close(
        gradient(language(Breaking, chunk=chunk), variables_of(), batch), gradient(language(chunk=chunk), variables_of(), batch)
    )


def test_a_packed_batch_is_its_documents_alone():
    task, batch = language(), packed(7)
    total = np.zeros(2)
    for row in range(8):
        for number in range(1, batch['segment'][row].max() + 1):
            place = batch['segment'][row] == number
            document = {key: batch[key][row][place][None] for key in ROWS}
            if place.sum() > 1:
                total += np.array(
                    evaluated(
                        task, variables_of(), {**document, **{k: batch[k][row : row + 1] for k in ('mask', 'id', 'epoch')}}
                    )['loss']
                )
    np.testing.assert_allclose(total, np.array(evaluated(task, variables_of(), batch)['loss']), rtol=1e-6)
    assert total[1] > 20


def test_microbatches_add_up_to_the_whole():
    task, batch = language(chunk=3), packed(8)
    batch['mask'][[1, 3, 5]] = 0  # the two microbatches have 4 and 1 rows
    plain = step.gradients_of(task)
    whole, halves = (jax.jit(step.accumulate(plain, count))(variables_of(), batch, {}) for count in (1, 2))
    close(halves[:2], whole[:2], rtol=2e-6)


def test_metrics_are_those_of_numpy_over_batches_of_any_size():
    task = language(metrics=('perplexity', 'bits_per_byte', 'accuracy'))
    batches = [packed(seed, n) for seed, n in ((0, 8), (1, 8), (2, 3))]
    nats = tokens = size = right = 0.0
    for batch in batches:
        cost, counts, log_p = costs(task, batch)
        nats, tokens = nats + cost[counts].sum(), tokens + counts.sum()
        size += SPEC.tokenizer.byte_lengths[batch['tokens'][:, 1:]][counts].sum()
        right += (log_p.argmax(-1) == batch['tokens'][:, 1:])[counts].sum()
    want = {'perplexity': math.exp(nats / tokens), 'bits_per_byte': nats / math.log(2) / size, 'accuracy': right / tokens}
    assert measured(task, variables_of(), *batches) == pytest.approx(want, rel=1e-6)


def test_special_tokens_cost_nats_and_stand_for_no_bytes():
    task, batch = language(), rows(0, 2, 9)
    batch['tokens'][:, 4] = SPEC.tokenizer.eos
    nats = float(evaluated(task, variables_of(), batch)['loss'][0])
    size = SPEC.tokenizer.byte_lengths[np.delete(batch['tokens'][:, 1:], 3, 1)].sum()
    assert measured(task, variables_of(), batch)['bits_per_byte'] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_without_any_token_metrics_are_nan_and_an_absurd_perplexity_is_infinite():
    task, batch = language(), packed()
    batch['mask'][:] = 0
    assert all(math.isnan(value) for value in measured(task, variables_of(), batch).values())
    assert task.metrics['perplexity'].compute((8e5, 1e3)) == {'perplexity': math.inf}
    assert math.isnan(task.metrics['perplexity'].compute((math.nan, 3.0))['perplexity'])


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_outside():
    task = language(dtype=jnp.bfloat16, chunk=3)
    grads, found = gradient(task, variables_of(), packed())
    lowered = jax.jit(task.predict).lower(variables_of(), packed())
    outputs = lowered.compile()(variables_of(), packed())
    kept = (grads, found, outputs['nats'], outputs['weight'])
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(jnp.float32)}
    products = [line for line in lowered.as_text().splitlines() if 'dot_general' in line]
    assert products and all('bf16' in line for line in products)
    exact = evaluated(language(), variables_of(), packed())
    assert 0 < abs(float(found['loss'][0] - exact['loss'][0])) < 0.05 * float(exact['loss'][0])


def test_a_sequence_that_can_be_known_is_learnt():
    """Each token is its predecessor's successor; 60 steps bring the loss near zero."""
    tokens = (np.arange(9) + np.arange(8)[:, None]) % 7 + 4
    batch = {**rows(0, 8, 9), 'tokens': tokens.astype(np.int32)}
    task = language(chunk=4)
    params = variables_of()['params']

    @jax.jit
    def descend(params):
        grads, found = gradient(task, {'params': params}, batch)
        return jax.tree.map(lambda p, g: p - 0.5 * g / found['loss'][1], params, grads), terms.mean(found['loss'])

    losses = []
    for _ in range(60):
        params, loss = descend(params)
        losses.append(float(loss))
    assert losses[0] > 2 and losses[-1] < 0.3


def test_the_registry_sees_every_config_field():
    names = {field.name for field in dataclasses.fields(Language)} - registry.SUPPLIED['task']
    assert set(registry.signature('task', 'language')) == names
    built = registry.component('task', 'language(chunk=64, metrics=("accuracy",))', 'task').build(
        model=Mixing, data=SPEC, dtype=jnp.float32
    )
    assert built.chunk == 64 and list(built.metrics) == ['accuracy'] and built.num_outputs == V


class Pooled(nn.Module):
    num_outputs: int

    @nn.compact
    def __call__(self, inputs, train=False, *, segments=None, positions=None):
        return nn.Dense(self.num_outputs)(jnp.ones((len(inputs), 3)))


REFUSED = [
    ({'data': spec_of('tokens', tokenizer=None)}, r'needs a tokenizer[^\n]*\n  fix: set config.data.tokenizer'),
    ({'inputs': 'tokenz'}, r"no 'tokenz'\n  fix: did you mean 'tokens'"),
    ({'data': DataSpec({'tokens': ((), np.dtype(np.int32))}, tokenizer=SPEC.tokenizer)}, 'not a row of tokens'),
    ({'data': DataSpec({'tokens': ((9,), np.dtype(np.float32))}, tokenizer=SPEC.tokenizer)}, 'not a row of tokens'),
    ({'chunk': -1}, 'chunk is -1, below 0'),
    ({'label_smoothing': 1.0}, r'label_smoothing is 1.0, outside \[0, 1\)'),
    ({'z_loss': float('nan')}, 'z_loss is nan'),
    ({'metrics': ('f1',)}, "'f1' is not for this task"),
    ({'metrics': ('perplexty',)}, "did you mean 'perplexity'"),
]


@pytest.mark.parametrize(('arguments', 'message'), REFUSED)
def test_mistakes_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        make(**arguments)


@pytest.mark.parametrize(('chunk', 'message'), [(0, r'shape \(8, 11\), not \(batch, length, 11\)'), (3, 'Pooled has none')])
def test_a_model_that_gives_no_token_logits_is_refused(chunk, message):
    task = language(Pooled, chunk=chunk)
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(lambda b: task.loss(task.init(jax.random.key(0), b), b, None, False), packed())
