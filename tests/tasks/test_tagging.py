"""Tagging: the loss over labelled tokens, metrics over them, and spans by the rules of conlleval and seqeval."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from sklearn.metrics import accuracy_score, f1_score, log_loss

from research.core import registry
from research.core.errors import UsageError
from research.data.source import DataSpec
from research.parallel.mesh import batch_sharding, replicated
from research.tasks.spans import SpanF1, read_scheme
from research.tasks.tagging import Tag
from research.train import evaluate, step
from tests.tasks.tiny_text import Mixing, close, evaluated, gradient, measured, padded, rows, spec_of

NAMES = ('B-LOC', 'B-PER', 'I-LOC', 'I-PER', 'O')
IOBES = ('O', *(f'{prefix}-{kind}' for prefix in 'BIES' for kind in ('ORG', 'X-Y')))
K = len(NAMES)
KEYS = ('tokens', 'segment', 'tag')
SPEC = spec_of(*KEYS, class_names=NAMES)


def make(model=Mixing, data=SPEC, dtype=jnp.float32, **arguments):
    return Tag(model=model, data=data, dtype=dtype, **arguments)


tag = functools.cache(make)  # equal tasks are one, so that their programs are compiled once


def tagged(seed=0, n=8, length=8):
    """Rows with padding in which a third of the tokens has no tag."""
    generator = np.random.default_rng(seed)
    batch = rows(seed, n, length)
    segment = (np.arange(length) < generator.integers(2, length + 1, n)[:, None]).astype(np.int32)
    labels = generator.integers(0, K, (n, length))
    labelled = (segment > 0) & (generator.random((n, length)) < 2 / 3)
    return {
        **batch,
        'tokens': batch['tokens'] * segment,
        'segment': segment,
        'tag': np.where(labelled, labels, -1).astype(np.int32),
    }


@functools.cache
def variables():
    return jax.jit(tag().init)(jax.random.key(0), tagged())


@functools.partial(jax.jit, static_argnums=0)
def logits_of(task, variables, batch):
    return task.predict(variables, batch)


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_loss_and_metrics_are_those_of_scikit_learn_over_labelled_tokens(smoothing):
    task, batch = tag(label_smoothing=smoothing, metrics=('accuracy', 'f1')), tagged()
    batch['mask'][3] = 0
    logits = np.asarray(logits_of(task, variables(), batch), np.float64)
    counts = (batch['tag'] >= 0) & (batch['mask'][:, None] > 0)
    true, found = batch['tag'][counts], logits.argmax(-1)[counts]
    p = np.exp(logits[counts]) / np.exp(logits[counts]).sum(-1, keepdims=True)
    want = (1 - smoothing) * log_loss(true, p, labels=range(K)) - smoothing * np.log(p).mean()
    terms = evaluated(task, variables(), batch)
    assert [float(x) for x in terms['loss']] == pytest.approx([want * len(true), len(true)], rel=2e-6)
    results = measured(task, variables(), batch)
    assert (
        results['accuracy'] == pytest.approx(accuracy_score(true, found)) == pytest.approx(float(np.divide(*terms['accuracy'])))
    )
    assert results['f1_macro'] == pytest.approx(f1_score(true, found, average='macro', labels=range(K), zero_division=0))


def test_padding_and_masked_rows_change_nothing():
    task, batch = tag(metrics=('accuracy', 'span_f1')), tagged(1)
    found = gradient(task, variables(), batch)
    longer = padded(batch, KEYS, 3, {'tokens': 0, 'segment': 0, 'tag': -1})
    garbage = {key: np.full_like(value[:1], 3 if key in KEYS else 0) for key, value in longer.items()}
    garbage['tag'][:] = 999
    more = {key: np.concatenate([value, garbage[key]]) for key, value in longer.items()}
    close(gradient(task, variables(), more), found, rtol=2e-6)
    close(measured(task, variables(), more), measured(task, variables(), batch))


def test_microbatches_add_up_to_the_whole():
    task, batch = tag(), tagged(2)
    batch['mask'][[1, 3, 5]] = 0  # the two microbatches have 4 and 1 rows
    whole, halves = (jax.jit(step.accumulate(step.gradients_of(task), n))(variables(), batch, {}) for n in (1, 2))
    close(halves[:2], whole[:2], rtol=2e-6)


def test_a_tag_that_is_none_makes_loss_and_metrics_nan():
    task, batch = tag(metrics=('accuracy', 'span_f1')), tagged(3)
    batch['tag'][0, 0] = K
    assert math.isnan(evaluated(task, variables(), batch)['loss'][0])
    assert all(math.isnan(value) for value in np.hstack(list(measured(task, variables(), batch).values())))


# ------------------------------------------------------------------------------------------------------------- spans


def chunks(tags):
    """The spans of a list of tags as (type, first, last), word by word as the script conlleval goes."""
    found, kind, first = [], None, 0
    before = 'O'
    for place, name in enumerate([*tags, 'O']):
        prefix, _, here = name.partition('-')
        ends = kind is not None and (prefix in 'BSO' or before in 'ES' or here != kind)
        if ends:
            found.append((kind, first, place - 1))
            kind = None
        if prefix != 'O' and kind is None:
            kind, first = here, place
        before = prefix
    return found


def one_hot(names, lists, width, seed=0):
    """Logits (B, T, K) that choose these tags, and random ones behind them."""
    logits = np.zeros((len(lists), width, len(names)), np.float32)
    choice = np.random.default_rng(seed).integers(0, len(names), (len(lists), width))
    for row, tags in enumerate(lists):
        choice[row, : len(tags)] = [names.index(name) for name in tags]
    np.put_along_axis(logits, choice[..., None], 1, -1)
    return logits


def labels_of(names, lists, width):
    return np.int32([[*map(names.index, tags), *[-1] * (width - len(tags))] for tags in lists])


@functools.cache
def counting(names):
    metric = SpanF1(read_scheme(names), 'tag')
    return metric, jax.jit(metric.batch)


def spans(true, found, names=NAMES, width=8):
    """(correct, predicted, actual) of one sentence, all types together."""
    _, count = counting(names)
    batch = {'tag': labels_of(names, [true], width), 'mask': np.ones(1, np.float32)}
    state = count(one_hot(names, [found], width), batch)
    return tuple(int(state[name].sum()) for name in ('correct', 'predicted', 'actual'))


HAND_CHECKED = [
    ('B-PER I-PER O B-LOC', 'B-PER I-PER O B-LOC', (2, 2, 2)),
    ('B-PER I-PER O B-LOC', 'O I-PER O B-LOC', (1, 2, 2)),  # the first begins elsewhere
    ('B-PER I-PER O B-LOC', 'B-PER I-PER I-PER B-LOC', (1, 2, 2)),  # it ends elsewhere
    ('B-PER I-PER O B-LOC', 'B-LOC I-LOC O B-LOC', (1, 2, 2)),  # it has another type
    ('B-PER I-PER', 'I-PER I-PER', (1, 1, 1)),  # an I that nothing precedes begins a span
    ('B-PER B-PER', 'B-PER I-PER', (0, 1, 2)),  # a B begins one even behind its own type
    ('B-PER I-LOC', 'B-PER B-LOC', (2, 2, 2)),  # another type begins one too
    ('I-PER O I-PER', 'I-PER I-PER I-PER', (0, 1, 2)),
    ('O O O', 'O O O', (0, 0, 0)),
    ('O O O', 'O B-PER O', (0, 1, 0)),
    ('B-PER I-PER I-PER', 'O O O', (0, 0, 1)),
]


@pytest.mark.parametrize(('true', 'found', 'want'), HAND_CHECKED)
def test_spans_of_hand_checked_sentences(true, found, want):
    assert spans(true.split(), found.split()) == want


# seqeval 1.2.2 over the 40 sentences of `random_sentences`: spans that are correct, predicted, actual; F1; F1 by type.
SEQEVAL = [
    (NAMES, 0, (106, 170, 175), 0.6144927536231884, [0.6171428571428571, 0.6117647058823529]),
    (NAMES, 1, (108, 160, 164), 0.6666666666666667, [0.7044025157232704, 0.6303030303030304]),
    (IOBES, 0, (144, 216, 215), 0.6682134570765661, [0.6634146341463415, 0.672566371681416]),
    (IOBES, 1, (135, 191, 197), 0.6958762886597939, [0.6702127659574468, 0.7200000000000001]),
]


def random_sentences(names, seed, count=40):
    """Pairs of lists of tags, true and found, that follow no rule."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        true = generator.integers(0, len(names), generator.integers(1, 13))
        found = np.where(generator.random(len(true)) < 0.6, true, generator.integers(0, len(names), len(true)))
        yield [names[i] for i in true], [names[i] for i in found]


@pytest.mark.parametrize(('names', 'seed', 'counts', 'f1', 'f1_per_type'), SEQEVAL)
def test_spans_are_those_of_seqeval(names, seed, counts, f1, f1_per_type):
    true, found = zip(*random_sentences(names, seed), strict=True)
    metric, count = counting(names)
    batch = {'tag': labels_of(names, true, 13), 'mask': np.ones(40, np.float32)}
    results = metric.compute(jax.device_get(count(one_hot(names, found, 13), batch)))
    correct, predicted, actual = counts
    assert results['span_f1'] == pytest.approx(f1)
    assert results['span_precision'] == pytest.approx(correct / predicted)
    assert results['span_recall'] == pytest.approx(correct / actual)
    assert results['span_f1_per_type'] == pytest.approx(f1_per_type)


@pytest.mark.parametrize('names', [NAMES, IOBES], ids=['IOB', 'IOBES'])
def test_spans_are_those_of_the_script(names):
    """Of lists that follow no rule, among tokens without tags, over several batches."""
    metric, count = counting(names)
    state, want = None, np.zeros(3)
    for seed in range(5):
        pairs = list(random_sentences(names, seed, 20))
        for true, found in pairs:
            a, b = set(chunks(true)), set(chunks(found))
            want += [len(a & b), len(b), len(a)]
        generator = np.random.default_rng(seed)
        labels, logits = np.full((20, 20), -1), generator.normal(size=(20, 20, len(names)))
        for row, (true, found) in enumerate(pairs):
            places = np.sort(generator.choice(20, len(true), replace=False))
            labels[row, places] = labels_of(names, [true], len(true))[0]
            logits[row, places] = one_hot(names, [found], len(found))[0]
        new = jax.device_get(count(logits.astype(np.float32), {'tag': labels, 'mask': np.ones(20)}))
        state = new if state is None else metric.merge(state, new)
    np.testing.assert_array_equal([state[name].sum() for name in ('correct', 'predicted', 'actual')], want)
    assert want[0] > 100


def test_span_metrics_without_spans_are_zero_and_without_tokens_nan():
    metric, count = counting(NAMES)
    outside = {'tag': labels_of(NAMES, [['O', 'O']], 8), 'mask': np.ones(1, np.float32)}
    state = count(one_hot(NAMES, [['O'] * 8], 8), outside)
    assert metric.compute(state) == {'span_f1': 0, 'span_precision': 0, 'span_recall': 0, 'span_f1_per_type': [0, 0]}
    state = count(one_hot(NAMES, [['O'] * 8], 8), {**outside, 'mask': np.zeros(1, np.float32)})
    assert all(math.isnan(value) for value in np.hstack(list(metric.compute(state).values())))
    broken = count(one_hot(NAMES, [['O'] * 8], 8) * np.nan, outside)
    assert all(math.isnan(value) for value in np.hstack(list(metric.compute(broken).values())))


def test_the_evaluator_reports_spans(mesh):
    task = tag(metrics=('accuracy', 'span_f1'))
    evaluator = evaluate.Evaluator(task, lambda keys, batch: batch, mesh)
    batches = [tagged(seed, 16) for seed in (5, 6)]
    placed = [jax.device_put(batch, batch_sharding(mesh)) for batch in batches]
    found = evaluator(jax.device_put(variables(), replicated(mesh)), lambda index: placed[index], 2)
    want = np.zeros(3)
    for batch in batches:
        choice = np.asarray(logits_of(task, variables(), batch)).argmax(-1)
        for labels, chosen in zip(batch['tag'], choice, strict=True):
            a, b = ({*chunks([NAMES[i] for i in tags[labels >= 0]])} for tags in (labels, chosen))
            want += [len(a & b), len(b), len(a)]
    assert found['span_f1'] == pytest.approx(2 * want[0] / (want[1] + want[2])) and want[0] > 0
    names = ['loss', 'accuracy', 'span_f1', 'span_precision', 'span_recall']
    assert evaluator.names(variables(), batches[0]) == names


def test_the_registry_sees_every_config_field():
    names = {field.name for field in dataclasses.fields(Tag)} - registry.SUPPLIED['task']
    assert set(registry.signature('task', 'tag')) == names


class Pooled(nn.Module):
    num_outputs: int

    @nn.compact
    def __call__(self, inputs, train=False, *, segments=None):
        return nn.Dense(self.num_outputs)(jnp.ones((len(inputs), 3)))


REFUSED = [
    ({'data': spec_of(*KEYS)}, 'needs classes'),
    ({'labels': 'tags'}, "no 'tags'\n  fix: did you mean 'tag'"),
    ({'data': DataSpec({'tokens': ((8,), np.dtype(np.int32)), 'tag': ((), np.dtype(np.int32))}, NAMES)}, 'not a row of tokens'),
    ({'label_smoothing': 1.0}, 'label_smoothing is 1.0'),
    ({'metrics': ('span_f',)}, "did you mean 'span_f1'"),
    ({'metrics': ('span_f1',), 'data': spec_of(*KEYS, class_names=('NOUN', 'VERB'))}, "not 'NOUN', 'VERB'"),
    ({'metrics': ('span_f1',), 'data': spec_of(*KEYS, class_names=('O',))}, "not 'O'"),
]


@pytest.mark.parametrize(('arguments', 'message'), REFUSED)
def test_mistakes_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        make(**arguments)


def test_a_model_that_pools_is_refused():
    task = make(Pooled)
    with pytest.raises(UsageError, match=r'shape \(8, 5\), not \(batch, length, 5\)\n.*pooling'):
        jax.eval_shape(lambda b: task.loss(task.init(jax.random.key(0), b), b, None, False), tagged())
