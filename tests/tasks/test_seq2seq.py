"""Sequence to sequence: loss by true target tokens, generation by beam search, and BLEU as sacrebleu computes it."""

import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from research.core import registry
from research.core.errors import UsageError
from research.models.encoder_decoder import EncoderDecoder
from research.parallel.mesh import batch_sharding, replicated
from research.tasks.bleu import BROKEN, NOTHING, Bleu
from research.tasks.seq2seq import Seq2Seq
from research.train import evaluate, step
from tests.tasks.tiny_text import LETTERS, Aligned, Mixing, V, close, evaluated, gradient, measured, padded, rest, spec_of

KEYS = ('source', 'source_segment', 'target', 'target_segment')
SPEC = spec_of(*KEYS)


def make(model=Aligned, data=SPEC, dtype=jnp.float32, **arguments):
    return Seq2Seq(model=model, data=data, dtype=dtype, **arguments)


seq2seq = functools.cache(make)  # equal tasks are one, so that their programs are compiled once


def texts(generator, n, length, before, after):
    """Rows of random letters between special tokens, and where they are no padding."""
    tokens, sizes = generator.integers(4, V, (n, length)), generator.integers(3, length + 1, n)[:, None]
    place = np.arange(length)
    tokens = np.where(place == sizes - 1, after, tokens)
    tokens[:, 0] = np.where(before is None, tokens[:, 0], before)
    return np.where(place < sizes, tokens, 0).astype(np.int32), (place < sizes).astype(np.int32)


def pairs(seed=0, n=8):
    generator = np.random.default_rng(seed)
    source = texts(generator, n, 6, None, LETTERS.eos)
    target = texts(generator, n, 8, LETTERS.bos, LETTERS.eos)
    return {**dict(zip(KEYS, (*source, *target), strict=True)), **rest(n)}


@functools.cache
def variables():
    return jax.jit(seq2seq().init)(jax.random.key(0), pairs())


def successors(seed=9, n=32):
    """Pairs whose target is the source with each letter replaced by the next."""
    batch = pairs(seed, n)
    letters, real = batch['source'], batch['source_segment']
    body = np.where(letters >= 4, (letters - 3) % 7 + 4, LETTERS.eos) * real
    batch['target'] = np.pad(body, ((0, 0), (1, 1)))
    batch['target'][:, 0] = LETTERS.bos
    batch['target_segment'] = np.int32(batch['target'] > 0)
    return batch


@functools.cache
def learnt():
    """Parameters after some steps on `successors`: 80 learn them, 4 leave doubts that a beam search has a use for."""
    task, batch = seq2seq(label_smoothing=0.0), successors()

    @jax.jit
    def descend(params):
        grads, terms = gradient(task, {'params': params}, batch)
        return jax.tree.map(lambda p, g: p - 2.0 * g / terms['loss'][1], params, grads)

    params, kept = variables()['params'], {}
    for count in range(81):
        kept[count] = {'params': params}
        params = descend(params)
    return kept[4], kept[80]


@functools.partial(jax.jit, static_argnums=0)
def logits_of(task, variables, batch):
    return task.apply(variables, batch, None, False)[0]


def test_the_loss_is_that_of_numpy_over_true_target_tokens():
    task, batch = seq2seq(), pairs()
    batch['mask'][2] = 0
    logits = np.asarray(logits_of(task, variables(), batch), np.float64)
    log_p = scipy.special.log_softmax(logits, -1)
    targets = batch['target'][:, 1:]
    counts = (batch['target_segment'][:, 1:] > 0) & (batch['mask'][:, None] > 0)
    nats = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    smoothed = 0.9 * nats - 0.1 * log_p.mean(-1)  # Vaswani et al. 2017, section 5.4
    found = evaluated(task, variables(), batch)
    assert [float(x) for x in found['loss']] == pytest.approx([smoothed[counts].sum(), counts.sum()], rel=2e-6)
    assert counts.sum() == (targets[counts] > 0).sum()
    want = {'perplexity': math.exp(nats[counts].mean()), 'accuracy': (log_p.argmax(-1) == targets)[counts].mean()}
    assert measured(task, variables(), batch) == pytest.approx(want, rel=2e-6)


def test_the_decoder_sees_the_targets_before_and_the_whole_source():
    task, batch = seq2seq(), pairs(1)
    before = logits_of(task, variables(), batch)
    later, other = (dict(batch, **{key: batch[key].copy()}) for key in ('target', 'source'))
    later['target'][:, 2] = 4 + (batch['target'][:, 2] - 3) % 7
    other['source'][:, 0] = 4 + (batch['source'][:, 0] - 3) % 7
    after, moved = logits_of(task, variables(), later), logits_of(task, variables(), other)
    np.testing.assert_array_equal(after[:, :2], before[:, :2])
    assert np.abs(after[:, 2] - before[:, 2]).max() > 1e-3 and np.abs(moved[:, 0] - before[:, 0]).max() > 1e-3


def test_padding_and_masked_rows_change_nothing():
    task, batch = seq2seq(), pairs(2)
    found = gradient(task, variables(), batch)
    longer = padded(padded(batch, KEYS[:2], 3), KEYS[2:], 2)
    garbage = {key: np.full_like(value[:1], 9 if key in KEYS else 0) for key, value in longer.items()}
    more = {key: np.concatenate([value, garbage[key]]) for key, value in longer.items()}
    close(gradient(task, variables(), more), found, rtol=1e-5, atol=1e-5)
    assert measured(task, variables(), more) == pytest.approx(measured(task, variables(), batch), rel=1e-5)


def test_chunks_and_microbatches_add_up_to_the_whole():
    task, batch = seq2seq(), pairs(3)
    batch['mask'][[1, 3, 5]] = 0  # the two microbatches have 4 and 1 rows
    whole = gradient(task, variables(), batch)
    close(gradient(seq2seq(chunk=3), variables(), batch), whole, rtol=1e-5, atol=1e-5)
    halves = jax.jit(step.accumulate(step.gradients_of(task), 2))(variables(), batch, {})
    close(halves[:2], whole, rtol=1e-5, atol=1e-5)


def test_one_beam_is_the_likeliest_next_token_of_the_whole_model():
    """Without a cache: the model reads all of the source and all that was written, and writes one token."""
    task, batch = seq2seq(beams=1, max_length=5), pairs(4)
    written = np.zeros((8, 8), np.int32)
    written[:, 0] = LETTERS.bos
    real = np.zeros_like(written)
    for place in range(5):
        real[:, place] = 1
        logits = logits_of(task, learnt()[0], {**batch, 'target': written, 'target_segment': real})
        written[:, place + 1] = np.asarray(logits)[:, place].argmax(-1)
    want = np.where(np.cumsum(written[:, 1:6] == LETTERS.eos, 1) > 0, NOTHING, written[:, 1:6])
    np.testing.assert_array_equal(jax.jit(task.generate)(learnt()[0], batch), want)
    assert (want == NOTHING).any() and (want != NOTHING).all(1).any() and len(np.unique(want, axis=0)) > 3


def test_more_beams_find_likelier_texts():
    batch = pairs(5, 32)
    logs = []
    for beams in (1, 4):
        task = seq2seq(beams=beams, length_penalty=0.0)
        best = np.asarray(jax.jit(task.generate)(learnt()[0], batch))  # (32, 7)
        ended = np.where(best >= 0, best, LETTERS.eos)
        real = np.pad((best >= 0).astype(np.int32), ((0, 0), (1, 0)), constant_values=1)  # bos and the tokens
        target = np.pad(ended, ((0, 0), (1, 0)), constant_values=LETTERS.bos)
        log_p = jax.nn.log_softmax(logits_of(task, learnt()[0], {**batch, 'target': target, 'target_segment': real}))
        gained = np.take_along_axis(np.asarray(log_p), ended[..., None], -1)[..., 0]
        logs.append((gained * real[:, :-1]).sum(1))  # the tokens and eos
    assert (logs[1] >= logs[0] - 1e-5).mean() > 0.9 and logs[1].mean() > logs[0].mean() + 0.01


def test_what_is_generated_depends_on_neither_padding_nor_neighbours(mesh):
    task, batch = seq2seq(max_length=6), pairs(6)
    alone = jax.jit(task.generate)(learnt()[1], batch)
    wider = padded(padded(batch, KEYS[:2], 3), KEYS[2:], 2)
    doubled = {key: np.concatenate([value[::-1], value]) for key, value in wider.items()}
    placed = jax.device_put(doubled, batch_sharding(mesh))
    together = jax.jit(task.generate)(jax.device_put(learnt()[1], replicated(mesh)), placed)
    np.testing.assert_array_equal(together[8:], alone)
    np.testing.assert_array_equal(together[:8], alone[::-1])


def test_a_mapping_that_is_learnt_is_generated():
    batch = successors(10)  # other texts than those that were learnt
    best = np.asarray(jax.jit(seq2seq(beams=2).generate)(learnt()[1], batch))
    want = np.where(batch['target'][:, 1:] >= 4, batch['target'][:, 1:], NOTHING)
    assert (best == want).all(1).mean() > 0.9


def test_the_transformer_has_all_that_the_task_needs():
    small = functools.partial(EncoderDecoder, depth=1, width=8, heads=2)
    task, batch = seq2seq(small, chunk=3, metrics=('bleu',)), pairs()
    params = jax.eval_shape(task.init, jax.random.key(0), batch)
    assert jax.eval_shape(lambda p, b: task.loss(p, b, None, True)[0], params, batch)['loss'][0].shape == ()
    assert jax.eval_shape(task.predict, params, batch)['hypothesis'].shape == (8, 7)


# ---------------------------------------------------------------------------------------------------------------- BLEU


class Words:
    """Between words and ids, for BLEU over real text."""

    def __init__(self, texts):
        self.words = sorted({word for text in texts for word in text.split(' ')})

    def encode(self, texts):
        return [np.int32([self.words.index(word) + 4 for word in text.split()]) for text in texts]

    def decode(self, ids):
        return ' '.join(self.words[i - 4] for i in ids if i >= 4)


TRUTH = [
    'the cat sat on a mat .',
    'it is 3,000 metres from here -- or so they say',
    'a run is a pure function of its configuration',
    'the end .',
]
FOUND = [
    'the cat sat on the mat .',
    'it is 3,000 metres from there -- or so',
    'a run is a pure function of the step and its seed',
    '',
]


def ragged(rows, width, extra=()):
    return np.int32([[*row, *extra, *[NOTHING] * (width - len(row) - len(extra))] for row in rows])


def state_of(metric, tokenizer, found, truth, width):
    """The state of one batch whose references end with eos, and with one masked row behind."""
    hypothesis, target = ragged(tokenizer.encode(found), width), ragged(tokenizer.encode(truth), width, extra=(LETTERS.eos,))
    outputs = {
        'hypothesis': np.concatenate([hypothesis, np.full((1, width), 5)]),
        'target': np.concatenate([np.maximum(target, 0), np.full((1, width), 6)]),
        'weight': np.concatenate([target >= 0, np.zeros((1, width))]).astype(np.float32),
    }
    mask = np.float32([1] * len(found) + [0])
    return jax.device_get(jax.jit(metric.batch)(outputs, {'mask': mask}))


@pytest.mark.parametrize('words', ['13a', 'char', 'none'])
def test_bleu_is_that_of_sacrebleu_over_batches_of_any_width(words):
    sacrebleu = pytest.importorskip('sacrebleu')
    tokenizer = Words(TRUTH + FOUND)
    metric = Bleu(tokenizer, words)
    first = state_of(metric, tokenizer, FOUND[:1], TRUTH[:1], 9)
    second = state_of(metric, tokenizer, FOUND[1:], TRUTH[1:], 14)
    want = sacrebleu.corpus_bleu(FOUND, [TRUTH], tokenize=words).score
    assert 20 < want < 90
    assert metric.compute(metric.merge(first, second)) == {'bleu': want}
    assert metric.compute(metric.merge(second, first))['bleu'] == pytest.approx(want)
    perfect = state_of(metric, tokenizer, TRUTH, TRUTH, 14)
    assert metric.compute(perfect)['bleu'] == pytest.approx(100)


def test_bleu_of_the_docstring():
    pytest.importorskip('sacrebleu')
    truth, found = ['the cat sat on a mat'], ['the cat sat on the mat']
    tokenizer = Words(truth + found)
    score = Bleu(tokenizer).compute(state_of(Bleu(tokenizer), tokenizer, found, truth, 8))['bleu']
    assert score == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25) == pytest.approx(53.73, abs=0.01)


def test_bleu_hides_no_failure():
    pytest.importorskip('sacrebleu')
    tokenizer = Words(TRUTH)
    state = state_of(Bleu(tokenizer), tokenizer, TRUTH, TRUTH, 14)
    state['hypothesis'] = state['hypothesis'].copy()
    state['hypothesis'][1] = BROKEN
    assert math.isnan(Bleu(tokenizer).compute(state)['bleu'])
    assert math.isnan(Bleu(tokenizer).compute({**state, 'mask': np.zeros(5)})['bleu'])
    batch = pairs()
    task = seq2seq(metrics=('bleu',), max_length=3)
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), variables())
    assert (jax.jit(task.predict)(broken, batch)['hypothesis'] == BROKEN).all()


def test_the_evaluator_reports_bleu_of_the_generated_texts(mesh):
    sacrebleu = pytest.importorskip('sacrebleu')
    task = seq2seq(metrics=('bleu', 'perplexity'), bleu_words='char')
    evaluator = evaluate.Evaluator(task, lambda keys, batch: batch, mesh)
    there = jax.device_put(learnt()[1], replicated(mesh))
    batches = [successors(seed, 16) for seed in (11, 12)]
    for batch in batches:  # a fifth of the sources is exchanged, so that not all is right
        batch['source'][:3] = batch['source'][3:6]
    placed = [jax.device_put(batch, batch_sharding(mesh)) for batch in batches]
    assert evaluator.names(there, placed[0]) == ['loss', 'bleu', 'perplexity']
    found = evaluator(there, lambda index: placed[index], 2)['bleu']
    generate = jax.jit(task.generate)
    generated = [row for batch in batches for row in np.asarray(generate(learnt()[1], batch))]
    hypotheses = [LETTERS.decode(row[row != NOTHING]) for row in generated]
    references = [LETTERS.decode(row) for batch in batches for row in batch['target']]
    want = sacrebleu.corpus_bleu(hypotheses, [references], tokenize='char').score
    assert found == pytest.approx(want) and 30 < want < 95


def test_what_is_generated_does_not_depend_on_the_bucket():
    """A batch as short as its references must not end a hypothesis there: BLEU's brevity penalty would never apply."""
    task, batch = seq2seq(metrics=('bleu',)), successors(12, 16)
    first = {'target': 3, 'target_segment': 3}  # bos and two tokens
    narrow = {key: column[:, : first[key]] if key in first else column for key, column in batch.items()}
    wide, short = (np.asarray(jax.jit(task.generate)(learnt()[0], given)) for given in (batch, narrow))
    np.testing.assert_array_equal(short, wide)
    assert (wide != NOTHING).sum(1).max() > 2


def test_without_sacrebleu_a_run_is_refused_at_its_start(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sacrebleu', None)
    metric = seq2seq(metrics=('bleu',)).metrics['bleu']
    empty = {'hypothesis': np.zeros((8, 7)), 'reference': np.zeros((8, 7)), 'mask': np.zeros(8)}
    with pytest.raises(UsageError, match=r'needs sacrebleu\n  fix: pip install -r requirements/extras.txt'):
        metric.compute(empty)


def test_the_registry_sees_every_config_field():
    names = {field.name for field in dataclasses.fields(Seq2Seq)} - registry.SUPPLIED['task']
    assert set(registry.signature('task', 'seq2seq')) == names


class Endless(type(LETTERS)):
    eos = None


REFUSED = [
    ({'data': spec_of(*KEYS[:3])}, "no 'target_segment'"),
    ({'data': spec_of(*KEYS, tokenizer=None)}, 'task seq2seq needs a tokenizer'),
    ({'beams': 0}, 'beams is 0, below 1'),
    ({'max_length': 0}, 'max_length is 0, below 1'),
    ({'label_smoothing': 1.0}, 'label_smoothing is 1.0'),
    ({'metrics': ('blue',)}, "did you mean 'bleu'"),
    ({'metrics': ('bleu',), 'bleu_words': '13'}, "bleu_words '13' does not exist"),
    ({'metrics': ('bleu',), 'model': Mixing}, 'Mixing has no init_cache, encode, decode'),
    ({'metrics': ('bleu',), 'data': spec_of(*KEYS, tokenizer=Endless())}, 'needs a token that ends a text'),
]


@pytest.mark.parametrize(('arguments', 'message'), REFUSED)
def test_mistakes_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        make(**arguments)
