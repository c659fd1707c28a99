"""Masked language modelling: what is hidden, how often and as what; the loss at the hidden places alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import linen as nn

from research.core import registry
from research.core.errors import UsageError
from research.parallel.mesh import batch_sharding, replicated
from research.tasks.masked import Masked
from research.train import step
from tests.tasks.tiny_text import LETTERS, Mixing, V, close, evaluated, gradient, measured, padded, rest, spec_of

SPEC = spec_of('tokens', 'segment', length=12)
BOTH_WAYS = functools.partial(Mixing, causal=False)
ROWS = ('tokens', 'segment')


def make(model=BOTH_WAYS, data=SPEC, dtype=jnp.float32, **arguments):
    return Masked(model=model, data=data, dtype=dtype, **arguments)


masked = functools.cache(make)  # equal tasks are one, so that their programs are compiled once


def texts(seed=0, n=8, length=12, shortest=3):
    """Rows that begin with bos and end with eos; padding behind."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(4, V, (n, length)).astype(np.int32)
    sizes = generator.integers(shortest, length + 1, n)
    place = np.arange(length)
    tokens[:, 0] = LETTERS.bos
    tokens[place == sizes[:, None] - 1] = LETTERS.eos
    segment = (place < sizes[:, None]).astype(np.int32)
    return {'tokens': tokens * segment, 'segment': segment, **rest(n)}


@functools.cache
def variables():
    return jax.jit(masked().init)(jax.random.key(0), texts())


@functools.partial(jax.jit, static_argnums=0)
def hide(task, batch):
    return task.hide(batch)


def chosen(found, batch):
    """Which places of each row were chosen, (B, T) bool."""
    result = np.zeros(batch['tokens'].shape, bool)
    for row in range(len(result)):
        result[row, found['masked_places'][row][found['masked_weights'][row] > 0]] = True
    return result


def plain_rows(n, length=40, seed=0):
    generator = np.random.default_rng(seed)
    return {'tokens': generator.integers(4, V, (n, length)).astype(np.int32), **rest(n)}


def test_rates_are_those_of_the_paper():
    batch = plain_rows(3000)
    found = jax.device_get(hide(masked(), batch))
    hidden = chosen(found, batch)
    assert (hidden.sum(1) == 6).all()  # 15 % of 40
    shown, was = found['masked_tokens'][hidden], batch['tokens'][hidden]
    n, masks = len(was), (shown == LETTERS.mask).sum()
    assert scipy.stats.binomtest(int(masks), n, 0.8).pvalue > 1e-3
    # A random word is the old one in 1 of 7 cases: the others tell how many were drawn.
    assert scipy.stats.binomtest(int((shown != was).sum() - masks), n, 0.1 * 6 / 7).pvalue > 1e-3
    words = np.bincount(shown[(shown != was) & (shown != LETTERS.mask)], minlength=V)[4:]
    assert scipy.stats.chisquare(words).pvalue > 1e-3  # of random tokens only, and these evenly
    assert scipy.stats.chisquare(hidden.sum(0)).pvalue > 1e-3  # every place alike
    assert (found['masked_tokens'][~hidden] == batch['tokens'][~hidden]).all()


def test_other_rates_can_be_asked_for():
    batch = plain_rows(500)
    found = jax.device_get(hide(masked(rate=0.5, mask_share=0.0, random_share=1.0), batch))
    hidden = chosen(found, batch)
    assert (hidden.sum(1) == 20).all() and not (found['masked_tokens'] == LETTERS.mask).any()
    assert np.mean(found['masked_tokens'][hidden] == batch['tokens'][hidden]) == pytest.approx(1 / 7, abs=0.02)
    everything = jax.device_get(hide(masked(rate=1.0, mask_share=1.0, random_share=0.0), batch))
    assert (everything['masked_tokens'] == LETTERS.mask).all()


def test_neither_special_tokens_nor_padding_are_hidden():
    task, batch = masked(rate=0.4), texts(0, 400)
    found = jax.device_get(hide(task, batch))
    hidden = chosen(found, batch)
    ordinary = (batch['tokens'] >= 4) & (batch['segment'] > 0)
    assert not hidden[~ordinary].any()
    np.testing.assert_array_equal(found['masked_tokens'][~ordinary], batch['tokens'][~ordinary])
    counts = ordinary.sum(1)
    np.testing.assert_array_equal(hidden.sum(1), np.where(counts, np.maximum(1, np.round(0.4 * counts)), 0))
    assert set(counts) >= {1, 2, 10}


def test_a_row_without_ordinary_tokens_has_nothing_to_predict():
    batch = texts(0, 2)
    batch['tokens'][0] = np.where(batch['segment'][0], LETTERS.eos, 0)
    found = jax.device_get(hide(masked(), batch))
    assert not found['masked_weights'][0].any() and found['masked_weights'][1].sum() > 0


def test_what_is_hidden_follows_the_example_and_its_epoch_alone():
    task, batch = masked(rate=0.3), texts(1, 16)
    found = jax.device_get(hide(task, batch))
    order = np.random.default_rng(0).permutation(16)[:10]
    moved = jax.device_get(hide(task, {key: value[order] for key, value in batch.items()}))
    for key, values in found.items():
        np.testing.assert_array_equal(moved[key], values[order])
    longer = jax.device_get(hide(task, padded(batch, ROWS, 7)))
    np.testing.assert_array_equal(longer['masked_tokens'][:, :12], found['masked_tokens'])
    np.testing.assert_array_equal(longer['masked_weights'].sum(1), found['masked_weights'].sum(1))
    for key in ('id', 'epoch'):
        other = jax.device_get(hide(task, {**batch, key: batch[key] + 100}))
        assert np.mean(chosen(other, batch) != chosen(found, batch)) > 0.1


def test_the_loss_is_that_of_numpy_at_the_hidden_places():
    task, batch = masked(rate=0.4), texts(2, 16)
    batch['mask'][5] = 0
    found = jax.device_get(hide(task, batch))
    hidden = chosen(found, batch)
    assert not hidden[5].any()
    logits = jax.jit(lambda v, x, s: task.module.apply(v, x, segments=s))(variables(), found['masked_tokens'], batch['segment'])
    log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), -1)
    nats = -np.take_along_axis(log_p, batch['tokens'][..., None], -1)[..., 0][hidden]
    right = (log_p.argmax(-1) == batch['tokens'])[hidden]
    terms = evaluated(task, variables(), batch)
    assert [float(x) for x in terms['loss']] == pytest.approx([nats.sum(), len(nats)], rel=1e-6)
    assert [float(x) for x in terms['accuracy']] == [right.sum(), len(right)]
    want = {'accuracy': right.mean(), 'perplexity': np.exp(nats.mean())}
    assert measured(task, variables(), batch) == pytest.approx(want, rel=1e-6)


def test_only_hidden_places_have_logits():
    task, batch = masked(), texts(0, 4)
    shape = jax.eval_shape(lambda v, b: task.apply(v, b, None, False)[0], variables(), batch).shape
    assert shape == (4, 2, V)  # 15 % of 12
    assert jax.eval_shape(task.predict, variables(), batch)['nats'].shape == (4, 2)


@pytest.mark.parametrize(
    'change',
    [lambda b: padded(b, ROWS, 7), lambda b: {k: v[[3, 1, 2, 0, 7, 6, 5, 4]] for k, v in b.items()}],
    ids=['padding', 'order'],
)
def test_padding_and_order_change_nothing(change):
    task, batch = masked(rate=0.4), texts(3)
    found, other = gradient(task, variables(), batch), gradient(task, variables(), change(batch))
    close(other, found, rtol=2e-6)
    assert float(found[1]['loss'][1]) > 8


def test_masked_rows_influence_nothing():
    task, batch = masked(rate=0.4), texts(4)
    garbage = {'tokens': 9999, 'segment': -3, 'mask': 0, 'id': -1, 'epoch': 9}
    keep = np.arange(8) < 5
    spoilt = {k: np.where(keep.reshape(-1, *[1] * (v.ndim - 1)), v, garbage[k]).astype(v.dtype) for k, v in batch.items()}
    few = {key: value[:5] for key, value in batch.items()}
    close(gradient(task, variables(), spoilt), gradient(task, variables(), few), rtol=2e-6)


def test_chunks_and_microbatches_add_up_to_the_whole():
    task, batch = masked(rate=0.4), texts(5)
    batch['mask'][[1, 3, 5]] = 0  # the two microbatches have 4 and 1 rows
    whole = gradient(task, variables(), batch)
    close(gradient(masked(rate=0.4, chunk=2), variables(), batch), whole)
    halves = jax.jit(step.accumulate(step.gradients_of(task), 2))(variables(), batch, {})
    close(halves[:2], whole, rtol=2e-6)


def test_on_eight_devices_no_activation_is_sent(mesh):
    task, batch = masked(rate=0.4), texts(6, 16)
    there = jax.device_put(variables(), replicated(mesh)), jax.device_put(batch, batch_sharding(mesh))
    compiled = gradient.lower(task, *there).compile()
    for moved in ('all-gather', 'all-to-all', 'collective-permute'):
        assert moved not in compiled.as_text()
    loss = compiled(*there)[1]['loss']
    close(loss, evaluated(task, variables(), batch)['loss'], rtol=2e-6)


def test_hidden_tokens_that_follow_from_the_others_are_learnt():
    """All ordinary tokens of a row are one letter."""
    letters = np.arange(28) % 7 + 4
    batch = {**texts(0, 28, shortest=9), **rest(28)}
    batch['tokens'] = np.where(batch['tokens'] >= 4, letters[:, None], batch['tokens']).astype(np.int32)
    task = masked(rate=0.3)

    @jax.jit
    def descend(params, epoch):
        grads, terms = gradient(task, {'params': params}, {**batch, 'epoch': batch['epoch'] + epoch})
        return jax.tree.map(lambda p, g: p - 0.5 * g / terms['loss'][1], params, grads), terms['loss'][0] / terms['loss'][1]

    params, losses = variables()['params'], []
    for epoch in range(60):
        params, loss = descend(params, epoch)
        losses.append(float(loss))
    assert losses[0] > 2 and losses[-1] < 0.5
    assert measured(task, {'params': params}, batch)['accuracy'] > 0.8


def test_the_registry_sees_every_config_field():
    names = {field.name for field in dataclasses.fields(Masked)} - registry.SUPPLIED['task']
    assert set(registry.signature('task', 'masked')) == names


class Flat(nn.Module):
    num_outputs: int

    @nn.compact
    def __call__(self, inputs, train=False, *, segments=None):
        return nn.Embed(V, self.num_outputs)(inputs)


class Maskless(type(LETTERS)):
    mask = None


REFUSED = [
    ({'data': spec_of('tokens', tokenizer=Maskless())}, "no[^\n]*\n  fix: take tokenizer='wordpiece'"),
    ({'data': spec_of('tokens', tokenizer=None)}, 'needs a tokenizer'),
    ({'rate': 0.0}, r'rate is 0.0, outside \(0, 1\]'),
    ({'rate': 1.5}, 'rate is 1.5'),
    ({'mask_share': 0.8, 'random_share': 0.3}, 'no shares of one whole'),
    ({'random_share': -0.1}, 'no shares of one whole'),
]


@pytest.mark.parametrize(('arguments', 'message'), REFUSED)
def test_mistakes_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        make(**arguments)


def test_a_model_without_a_head_of_its_own_is_refused():
    task = make(Flat)
    with pytest.raises(UsageError, match=r'task masked needs a model with features\(\) and head\(\), and Flat'):
        jax.eval_shape(lambda b: task.loss(task.init(jax.random.key(0), b), b, None, False), texts())
