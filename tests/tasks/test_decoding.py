"""Decoding against brute force on small Markov chains, and against the forward pass of real models."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UsageError
from research.models.encoder_decoder import EncoderDecoder
from research.models.transformer import Decoder
from research.tasks import decoding

# Tests compile much and compute little: the compiler need not optimise.
OPTIONS = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
jit = functools.partial(jax.jit, compiler_options=OPTIONS)
EOS = 1


def markov(size, seed=0, rows=3):
    """A step whose logits depend on the two last tokens and on the row: (step, cache, numpy log-probabilities by history)."""
    table = np.random.default_rng(seed).normal(0, 1.5, (rows, size, size, size)).astype(np.float32)
    log_probabilities = np.asarray(jax.nn.log_softmax(table))

    def step(tokens, cache):
        logits = jnp.asarray(table)[cache['row'], cache['layers']['previous'][0], tokens[:, 0]]  # (rows, V)
        return logits[:, None], {'row': cache['row'], 'layers': {'previous': tokens[:, 0][None]}}

    return step, {'row': jnp.arange(rows), 'layers': {'previous': jnp.zeros((1, rows), jnp.int32)}}, log_probabilities


def log_probability(table, first, tokens):
    """The log-probability of `tokens` after `first`, before which stood 0."""
    history = [0, first, *tokens]
    return sum(table[a, b, c] for a, b, c in zip(history, history[1:], history[2:], strict=False))


def all_hypotheses(size, length):
    """Every sequence that ends with EOS within `length` tokens, and every sequence of `length` tokens without it."""
    others = [token for token in range(size) if token != EOS]
    for n in range(length):
        yield from ((*head, EOS) for head in itertools.product(others, repeat=n))
    yield from itertools.product(others, repeat=length)


def stripped(row, pad=-1):
    return tuple(int(token) for token in row if token != pad)


@pytest.mark.parametrize('length_penalty', [0.0, 0.6, 2.0])
def test_beam_search_that_is_wide_enough_is_brute_force(length_penalty):
    size, length, rows = 4, 3, 3
    step, cache, table = markov(size)
    first = jnp.array([2, 0, 3])
    hypotheses = list(all_hypotheses(size, length))
    tokens, scores = decoding.beam_search(
        step, first, cache, beams=len(hypotheses) + 2, length=length, eos=EOS, pad=-1, length_penalty=length_penalty
    )
    for row in range(rows):
        scored = [
            (log_probability(table[row], int(first[row]), h) / ((5 + len(h)) / 6) ** length_penalty, h) for h in hypotheses
        ]
        expected = sorted(scored, reverse=True)
        assert [stripped(h) for h in tokens[row][: len(expected)]] == [h for _, h in expected]
        np.testing.assert_allclose(scores[row][: len(expected)], [s for s, _ in expected], rtol=1e-5)
        assert np.all(np.isneginf(scores[row][len(expected) :])) and np.all(tokens[row][len(expected) :] == -1)


def reference_beam(table, first, beams, length, length_penalty):
    """The rule of `beam_search` in plain Python: [(score, tokens)] of one row, the best first."""
    alive, ended = [(0.0, ())], []
    for n in range(1, length + 1):
        grown = [(s + table[([0, first, *h])[-2], ([first, *h])[-1], v], (*h, v)) for s, h in alive for v in range(len(table))]
        grown.sort(reverse=True)
        ended += [(s / ((5 + n) / 6) ** length_penalty, h) for s, h in grown[:beams] if h[-1] == EOS]
        alive = [(s, h) for s, h in grown if h[-1] != EOS][:beams]
        if len(ended) >= beams:
            return sorted(ended, reverse=True)[:beams]
    return sorted(ended + [(s / ((5 + length) / 6) ** length_penalty, h) for s, h in alive], reverse=True)[:beams]


@pytest.mark.parametrize('beams', [1, 2, 3, 5])
@pytest.mark.parametrize('seed', range(4))
def test_beam_search_is_the_rule_in_plain_python(beams, seed):
    step, cache, table = markov(6, seed)
    first = jnp.array([2, 0, 3])
    tokens, scores = decoding.beam_search(step, first, cache, beams=beams, length=7, eos=EOS, pad=-1)
    for row in range(3):
        expected = reference_beam(table[row], int(first[row]), beams, 7, 0.6)
        assert [stripped(h) for h in tokens[row]] == [h for _, h in expected]
        np.testing.assert_allclose(scores[row], [s for s, _ in expected], rtol=1e-5)


@pytest.mark.parametrize('seed', range(6))
def test_beam_search_with_one_beam_is_greedy_and_greedy_is_the_loop(seed):
    step, cache, table = markov(5, seed)
    first = jnp.array([2, 0, 3])
    tokens, scores = decoding.greedy(step, first, cache, length=6, eos=EOS, pad=-1)
    beam_tokens, _ = decoding.beam_search(step, first, cache, beams=1, length=6, eos=EOS, pad=-1)
    np.testing.assert_array_equal(beam_tokens[:, 0], tokens)
    for row in range(3):
        history = [0, int(first[row])]
        while len(history) < 8 and EOS not in history[2:]:
            history.append(int(np.argmax(table[row][history[-2], history[-1]])))
        assert stripped(tokens[row]) == tuple(history[2:])
        np.testing.assert_allclose(scores[row], log_probability(table[row], history[1], history[2:]), rtol=1e-5)


def test_a_row_does_not_depend_on_the_other_rows():
    step, cache, _ = markov(6, 3)
    first, keys = jnp.array([2, 0, 3]), jax.random.split(jax.random.key(0), 3)

    def alone(tree):
        return {'row': tree['row'][1:2], 'layers': {'previous': tree['layers']['previous'][:, 1:2]}}

    options = {'length': 9, 'eos': EOS, 'pad': -1}
    for together, single in [
        (
            decoding.sample(step, first, cache, keys, **options),
            decoding.sample(step, first[1:2], alone(cache), keys[1:2], **options),
        ),
        (
            decoding.beam_search(step, first, cache, beams=3, **options),
            decoding.beam_search(step, first[1:2], alone(cache), beams=3, **options),
        ),
    ]:
        for a, b in zip(together, single, strict=True):
            np.testing.assert_array_equal(a[1:2], b)


def drawn_frequencies(logits, count=4000, **options):
    keys = jax.random.split(jax.random.key(1), count)
    tokens = decoding.draw(keys, jnp.tile(jnp.asarray(logits), (count, 1)), **options)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


def test_draws_have_the_probabilities_that_were_asked_for():
    probabilities = np.array([0.5, 0.05, 0.25, 0.2])
    logits = np.log(probabilities)
    for options, expected in [
        ({}, probabilities),
        ({'temperature': 0.5}, probabilities**2 / np.sum(probabilities**2)),
        ({'top_k': 2}, np.array([0.5, 0, 0.25, 0]) / 0.75),
        ({'top_p': 0.7}, np.array([0.5, 0, 0.25, 0]) / 0.75),
        ({'top_p': 0.76}, np.array([0.5, 0, 0.25, 0.2]) / 0.95),
        ({'top_k': 3, 'top_p': 0.5}, np.array([1.0, 0, 0, 0])),  # 0.5 / 0.95 >= 0.5
        ({'top_k': 3, 'top_p': 0.55}, np.array([0.5, 0, 0.25, 0]) / 0.75),
        ({'temperature': 0.0}, np.array([1.0, 0, 0, 0])),
        ({'top_p': 0.0}, np.array([1.0, 0, 0, 0])),
    ]:
        frequencies = drawn_frequencies(logits, **options)
        assert np.all(frequencies[expected == 0] == 0), options
        np.testing.assert_allclose(frequencies, expected, atol=4 * 0.5 / 4000**0.5, err_msg=str(options))


def test_every_row_may_have_its_own_settings_and_ties_stay():
    logits = jnp.log(jnp.array([[0.5, 0.05, 0.25, 0.2]] * 3 + [[0.3, 0.3, 0.3, 0.1]]))
    kept = decoding.restrict(logits, jnp.array([0, 1, 3, 2]), jnp.array([1.0, 1.0, 0.55, 1.0])) > -jnp.inf
    expected = [[True, True, True, True], [True, False, False, False], [True, False, True, False], [True, True, True, False]]
    np.testing.assert_array_equal(kept, expected)
    tokens = decoding.draw(
        jax.random.split(jax.random.key(0), 4), logits, jnp.array([0.0, 1.0, 0.0, 0.0]), jnp.array([0, 1, 0, 0])
    )
    np.testing.assert_array_equal(tokens, 0)


def test_sampling_is_addressed_by_key_and_place_and_scores_are_the_models():
    step, cache, table = markov(5, 2)
    first, keys = jnp.array([2, 0, 3]), jax.random.split(jax.random.key(5), 3)
    tokens, scores = decoding.sample(step, first, cache, keys, length=6, eos=None, temperature=2.0, top_k=3)
    for row in range(3):
        np.testing.assert_allclose(scores[row], log_probability(table[row], int(first[row]), map(int, tokens[row])), rtol=1e-5)
    shorter, _ = decoding.sample(step, first, cache, keys, length=4, eos=None, temperature=2.0, top_k=3)
    np.testing.assert_array_equal(shorter, tokens[:, :4])
    others, _ = decoding.sample(step, first, cache, jax.random.split(jax.random.key(6), 3), length=6, eos=None, temperature=2.0)
    assert np.any(others != tokens)


@pytest.mark.parametrize('options', [{}, {'positions': 'rotary', 'kv_heads': 1, 'scan': True}], ids=str)
def test_greedy_on_a_language_model_is_the_argmax_of_the_forward_pass(options):
    module = Decoder(num_outputs=11, depth=2, width=16, heads=2, tied=False, init_std=0.5, max_length=16, **options)
    prompts, lengths = jnp.array([[3, 4, 5, 6], [7, 8, 0, 0], [9, 0, 0, 0]]), jnp.array([4, 2, 1])
    variables = jit(module.init)(jax.random.key(0), prompts)

    @jit
    def generate(variables):
        step = functools.partial(module.apply, variables, method='decode')
        _, cache = step(prompts, module.init_cache(3, 12), lengths - 1)
        last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
        return decoding.greedy(step, last, cache, length=8, eos=None)

    tokens, scores = generate(variables)
    texts = np.zeros((3, 12), np.int32)
    for row, n in enumerate(lengths):
        texts[row, : n + 8] = [*prompts[row, :n], *tokens[row]]
    logits = np.asarray(jax.nn.log_softmax(jit(module.apply)(variables, texts)))
    for row, n in enumerate(lengths):
        np.testing.assert_array_equal(np.argmax(logits[row, n - 1 : n + 7], axis=-1), tokens[row])
        np.testing.assert_allclose(np.max(logits[row, n - 1 : n + 7], axis=-1).sum(), scores[row], rtol=1e-4)
    assert len(set(np.asarray(tokens).ravel())) > 2  # it says more than one thing


def test_beam_search_on_an_encoder_decoder_scores_as_the_forward_pass_and_beats_greedy():
    module = EncoderDecoder(num_outputs=11, depth=1, width=16, heads=2, init_std=0.6, positions='sinusoidal')
    source, segments = jnp.array([[3, 4, 5, 6], [7, 8, 0, 0]]), jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    variables = jit(lambda key: module.init(key, source, targets=source))(jax.random.key(1))

    @jit
    def generate(variables):
        cache = module.apply(variables, source, module.init_cache(2, 6), segments=segments, method='encode')
        step, first = functools.partial(module.apply, variables, method='decode'), jnp.zeros(2, jnp.int32)
        found = decoding.beam_search(step, first, cache, beams=4, length=6, eos=EOS, pad=-1, length_penalty=0.0)
        return *found, decoding.greedy(step, first, cache, length=6, eos=EOS)[1]

    tokens, scores, greedy_scores = (np.asarray(x) for x in generate(variables))
    targets = np.concatenate([np.zeros((8, 1), int), np.maximum(tokens.reshape(8, 6), 0)], axis=1)
    logits = jit(module.apply)(variables, source.repeat(4, 0), targets=targets[:, :-1], segments=segments.repeat(4, 0))
    gained = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[:, 1:, None], axis=-1)[..., 0]
    expected = np.sum(gained * (tokens.reshape(8, 6) >= 0), axis=1).reshape(2, 4)
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    assert np.all(scores[:, 0] >= greedy_scores - 1e-5)
    assert np.all(np.diff(scores, axis=1) <= 0)


@pytest.mark.parametrize('mistake', [{'beams': 0}, {'length': 0}])
def test_mistakes(mistake):
    step, cache, _ = markov(4)
    with pytest.raises(UsageError, match='give both at least 1'):
        decoding.beam_search(step, jnp.zeros(3, jnp.int32), cache, **{'beams': 2, 'length': 3, 'eos': EOS, **mistake})
