"""CTC against an enumeration of all paths, error rates against brute force, and the task as the program runs it."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from research.core.errors import UsageError
from research.data.source import DataSpec
from research.models.audio import AudioEncoder
from research.tasks import edit_distance
from research.tasks.classify import Classify
from research.tasks.edit_distance import BROKEN, NOTHING, ErrorRate
from research.tasks.metrics import summarise
from research.tasks.speech import CTC, best_path, steps_needed

KEY = jax.random.key(0)
B, T, U, N = 4, 6, 4, 1600


class Letters:
    """A tokenizer: 'ab ' are the ids 1, 2 and 3; 0 is padding."""

    vocabulary_size = 4
    pad = 0

    def encode(self, texts):
        return [np.array([' ab'.index(c) or 3 for c in text], np.int32) for text in texts]

    def decode(self, ids):
        return ''.join('?ab '[i] for i in ids)


V = Letters.vocabulary_size
SPEC = DataSpec(
    examples={
        'audio': ((N,), np.dtype(np.int16)),
        'audio_length': ((), np.dtype(np.int32)),
        'tokens': ((U,), np.dtype(np.int32)),
        'segment': ((U,), np.dtype(np.int32)),
    },
    tokenizer=Letters(),
)


class Steps(nn.Module):
    """Outputs are a table of parameters, whatever is heard; every 100 samples are a step."""

    num_outputs: int
    steps: int = T

    @nn.compact
    def __call__(self, inputs, train=False, *, lengths=None):
        table = self.param('table', nn.initializers.normal(1.0), (inputs.shape[0], self.steps, self.num_outputs))
        return table + 0 * inputs[:, :1, None].astype(jnp.float32)

    @nn.nowrap
    def output_lengths(self, lengths):
        return lengths // 100


TRANSCRIPTS = np.array([[1, 2, 0, 0], [1, 1, 3, 0], [2, 2, 2, 2], [3, 0, 0, 0]], np.int32)
SEGMENTS = (TRANSCRIPTS > 0).astype(np.int32)
LENGTHS = np.array([600, 450, 599, 300], np.int32)  # 6, 4, 5 and 3 steps: the third transcript needs 7


def batch_of(rows=slice(None), mask=None):
    found = {
        'audio': np.random.default_rng(0).integers(-99, 99, (B, N)).astype(np.int16),
        'audio_length': LENGTHS,
        'tokens': TRANSCRIPTS,
        'segment': SEGMENTS,
        'mask': np.ones(B, np.float32) if mask is None else np.asarray(mask, np.float32),
        'id': np.arange(B, dtype=np.int32),
        'epoch': np.zeros(B, np.int32),
    }
    return {name: value[rows] for name, value in found.items()}


def task_of(model=Steps, **fields):
    return CTC(model=model, data=SPEC, **fields)


@pytest.fixture(scope='module')
def variables():
    table = np.random.default_rng(1).normal(size=(B, T, V + 1)).astype(np.float32)
    return {'params': {'table': table}}


@functools.partial(jax.jit, static_argnums=0)
def terms_of(task, variables, batch):
    return task.loss(variables, batch, {}, train=False)[0]


def stands_for(path, blank):
    """The transcript that is left of a path: first repetitions merged, then blanks dropped."""
    return tuple(token for token, _ in itertools.groupby(path) if token != blank)


def path_cost(logits, transcript, blank):
    """-log of the summed probability of all paths, one by one."""
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    total = 0.0
    for path in itertools.product(range(p.shape[1]), repeat=len(p)):
        if stands_for(path, blank) == transcript:
            total += np.prod(p[np.arange(len(p)), path])
    return -np.log(total)


# The loss


def test_the_loss_is_that_of_all_paths_by_true_token(variables):
    found = terms_of(task_of(), variables, batch_of())
    costs = []
    for row in (0, 1, 3):  # the third has no path
        transcript = tuple(TRANSCRIPTS[row][SEGMENTS[row] > 0].tolist())
        costs.append(path_cost(variables['params']['table'][row, : LENGTHS[row] // 100], transcript, blank=V))
    np.testing.assert_allclose(found['loss'][0], sum(costs), rtol=1e-5)
    assert found['loss'][1] == 2 + 3 + 1
    np.testing.assert_array_equal(found['alignable'], (3, 4))


def test_masked_rows_and_those_without_a_path_have_no_gradient(variables):
    batch = batch_of(mask=[1, 0, 1, 1])
    batch['tokens'] = np.where(batch['mask'][:, None] > 0, batch['tokens'], 999)

    def loss(variables):
        return task_of().loss(variables, batch, {}, train=True)[0]['loss'][0]

    gradient = np.asarray(jax.jit(jax.grad(loss))(variables)['params']['table'])
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient.any((1, 2)), [True, False, False, True])
    assert not gradient[3, 3:].any()  # nor has what lies beyond an utterance's steps


def test_parts_of_a_batch_add_up(variables):
    whole = terms_of(task_of(), variables, batch_of())
    parts = [terms_of(task_of(), variables, batch_of(mask=mask)) for mask in ([1, 1, 0, 0], [0, 0, 1, 1])]
    for name, term in whole.items():
        np.testing.assert_allclose(term, np.sum([part[name] for part in parts], axis=0), rtol=1e-6)


def test_steps_needed():
    np.testing.assert_array_equal(steps_needed(jnp.asarray(TRANSCRIPTS), jnp.asarray(SEGMENTS) > 0), [2, 4, 7, 1])


# Decoding


def test_the_best_path_merges_repetitions_and_drops_blanks():
    paths = np.array([[0, 0, 4, 0, 1, 1, 4], [4, 4, 4, 4, 4, 4, 4], [2, 1, 2, 2, 4, 2, 3], [3, 3, 3, 1, 1, 1, 1]])
    logits = np.eye(5, dtype=np.float32)[paths]
    steps = np.array([7, 7, 6, 2])
    found = np.asarray(jax.jit(best_path, static_argnums=2)(logits, steps, 4))
    for row, path, count in zip(found, paths, steps, strict=True):
        expected = stands_for(path[:count].tolist(), 4)
        np.testing.assert_array_equal(row, [*expected, *[NOTHING] * (7 - len(expected))])


def test_outputs_that_are_not_numbers_break_a_row_where_they_are_heard():
    logits = np.zeros((3, 3, 2), np.float32)
    logits[0, 1, 0] = logits[1, 2, 1] = np.nan
    found = np.asarray(jax.jit(best_path, static_argnums=2)(logits, jnp.array([3, 2, 3]), 1))
    assert (found[0] == BROKEN).all()
    assert (found[1:] != BROKEN).all()


# Error rates


def brute_force(a, b):
    """The edit distance by its definition, without a table."""
    if not a or not b:
        return len(a) + len(b)
    return min(brute_force(a[1:], b) + 1, brute_force(a, b[1:]) + 1, brute_force(a[1:], b[1:]) + (a[0] != b[0]))


def test_edit_distance_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(150):
        a, b = (rng.integers(0, 3, rng.integers(0, 6)).tolist() for _ in range(2))
        assert edit_distance.edit_distance(a, b) == brute_force(a, b)
    assert edit_distance.edit_distance(['de', 'vis', 'zwemt'], ['de', 'vissen']) == 2
    assert edit_distance.edit_distance('kitten', 'sitting') == 3


def states(name, hypotheses, references, mask):
    metric = ErrorRate(name, Letters())
    batch = {'tokens': references, 'segment': (references > 0).astype(np.int32), 'mask': np.asarray(mask, np.float32)}
    return metric, metric.batch(hypotheses, batch)


def rows(*texts, width=8):
    found = np.full((len(texts), width), NOTHING, np.int32)
    for row, ids in zip(found, Letters().encode(texts), strict=True):
        row[: len(ids)] = ids
    return found


def test_error_rates_of_a_set_are_edits_over_its_length():
    references = np.maximum(rows('ab ab a', 'a', 'b'), 0)
    for name, expected in (('wer', (1 + 1) / (3 + 1)), ('cer', (3 + 2) / (7 + 1))):  # 'ab ' less, ' b' more
        metric, state = states(name, rows('ab a', 'a b', 'a a'), references, [1, 1, 0])
        assert metric.compute(state) == {name: pytest.approx(expected)}


def test_merging_takes_all_examples_and_different_widths():
    metric, a = states('cer', rows('ab', width=9), np.maximum(rows('ab', width=3), 0), [1])
    _, b = states('cer', rows('a', '', width=4), np.maximum(rows('ab', 'a', width=5), 0), [1, 1])
    merged = metric.merge(metric.merge(a, b), a)
    assert metric.compute(merged) == {'cer': 2 / 7}
    assert merged['hypothesis'].shape == (4, 9)


def test_error_rates_hide_no_failure():
    broken = np.full((1, 8), BROKEN, np.int32)
    for hypotheses, references, mask, is_nan in (
        (broken, rows('ab'), [1], True),
        (broken, rows('ab'), [0], True),  # nothing counts
        (rows('ab'), rows(''), [1], True),  # nothing to compare with
        (rows(''), rows('ab'), [1], False),
    ):
        metric, state = states('wer', hypotheses, np.maximum(references, 0), mask)
        assert np.isnan(metric.compute(state)['wer']) == is_nan


# The task


def test_predictions_through_the_metrics(variables):
    task, batch = task_of(), batch_of(mask=[1, 1, 1, 0])
    predicted = jax.jit(task.predict)(variables, batch)
    assert predicted.dtype == jnp.int32
    found = summarise(task.metrics, {name: metric.batch(predicted, batch) for name, metric in task.metrics.items()})
    edits = length = 0
    for row in range(3):
        path = variables['params']['table'][row, : LENGTHS[row] // 100].argmax(-1).tolist()
        true = Letters().decode(TRANSCRIPTS[row][SEGMENTS[row] > 0])
        edits += brute_force(true, Letters().decode(stands_for(path, V)))
        length += len(true)
    assert found['cer'] == pytest.approx(edits / length)
    assert found['wer'] > 0


def test_an_encoder_learns_to_write_down_tones():
    """Three tones of a second each in one of six orders are 'a', 'b' and ' '."""
    rng = np.random.default_rng(0)
    orders = np.array(list(itertools.permutations([1, 2, 3])))
    time = np.arange(800) / 8000
    tones = {1: 500, 2: 1100, 3: 2300}
    audio = [np.concatenate([np.sin(2 * np.pi * tones[token] * time) for token in order]) for order in orders]
    audio = np.round(8000 * np.array(audio) + 50 * rng.normal(size=(6, 2400))).astype(np.int16)
    batch = batch_of(np.zeros(6, int)) | {
        'audio': audio,
        'audio_length': np.full(6, 2400, np.int32),
        'tokens': orders.astype(np.int32),
        'segment': np.ones((6, 3), np.int32),
    }
    fields = {'sample_rate': 8000, 'mels': 16, 'body': 'rnn', 'width': 32, 'depth': 1, 'dropout': 0.0, 'time_masks': 0}
    task = task_of(functools.partial(AudioEncoder, frequency_masks=0, **fields))

    @jax.jit
    def train():
        def step(params, _):
            def loss(params):
                return task.loss({'params': params}, batch, {}, train=True)[0]['loss'][0]

            gradient = jax.grad(loss)(params)
            size = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
            return jax.tree.map(lambda p, g: p - 0.3 * g / (1e-6 + size), params, gradient), None

        params, _ = jax.lax.scan(step, task.init(KEY, batch)['params'], length=150)
        return task.predict({'params': params}, batch)

    np.testing.assert_array_equal(train()[:, :4], np.pad(orders, ((0, 0), (0, 1)), constant_values=NOTHING))


def test_audio_is_not_rounded_to_the_type_of_the_computation():
    batch = batch_of() | {'audio': np.full((B, N), 0.123456, np.float32)}
    assert task_of(dtype=jnp.bfloat16).arguments(batch)['inputs'].dtype == jnp.float32


def test_classes_of_audio():
    """The task `classify` gives the encoder its lengths: what follows them does not matter."""
    data = DataSpec({**SPEC.examples, 'label': ((), np.dtype(np.int32))}, ('a', 'b'), (2, 2))
    fields = {'sample_rate': 8000, 'mels': 8, 'width': 16, 'depth': 1, 'body': 'rnn', 'pooling': 'mean'}
    task = Classify(model=functools.partial(AudioEncoder, **fields), data=data, inputs='audio')
    batch = {**batch_of(), 'label': np.array([0, 1, 1, 0])}
    del batch['segment'], batch['tokens']
    batch['audio'] = (batch['audio'] * 99).astype(np.int16)
    flat, structure = jax.tree.flatten(jax.eval_shape(task.init, KEY, batch))
    rng = np.random.default_rng(0)
    variables = jax.tree.unflatten(structure, [rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in flat])
    predict = jax.jit(task.predict)
    heard = predict(variables, batch)
    silent = batch | {'audio': np.where(np.arange(N) < batch['audio_length'][:, None], batch['audio'], 0)}
    np.testing.assert_allclose(heard, predict(variables, silent), rtol=1e-4, atol=1e-5)
    assert heard.shape == (B, 2)
    shorter = batch | {'audio_length': batch['audio_length'] // 2}
    assert np.abs(heard - predict(variables, shorter)).max() > 1e-3


class Deaf(nn.Module):
    num_outputs: int


def test_mistakes():
    with pytest.raises(UsageError, match='task ctc needs a tokenizer'):
        CTC(model=Steps, data=dataclasses.replace(SPEC, tokenizer=None))
    with pytest.raises(UsageError, match=r'task ctc needs a model with output_lengths.*Deaf has none'):
        task_of(Deaf)
    with pytest.raises(UsageError, match="metric 'bleu' does not exist"):
        task_of(metrics=('bleu',))
    without = {key: value for key, value in SPEC.examples.items() if key != 'segment'}
    with pytest.raises(UsageError, match="have no 'segment'"):
        CTC(model=Steps, data=dataclasses.replace(SPEC, examples=without))
    pooled = functools.partial(AudioEncoder, sample_rate=8000, pooling='mean', body='rnn', width=8, depth=1)
    task = task_of(pooled)
    with pytest.raises(UsageError, match=r"outputs of shape \(4, 5\), not \(batch, time, 5\)\n.*model.pooling='none'"):
        jax.eval_shape(lambda: task.loss(task.init(KEY, batch_of()), batch_of(), {}, train=False))
