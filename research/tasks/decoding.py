"""Generating token by token: greedy, sampling, beam search, over any model that reads tokens into a cache.

Shape letters: B batch, k beams, T generated length, V vocabulary, L depth.

All three work on `step(tokens (B, 1), cache) -> (logits (B, 1, V), cache)`, a `first` token of each row that the cache does
not hold yet (the token that begins every target, or the last of a prompt), and the cache. For a flax model:

    cache = module.init_cache(batch=2, length=20)
    _, cache = module.apply(variables, prompt, cache, lengths - 1, method='decode')            # all but the last token
    tokens, scores = greedy(lambda t, c: module.apply(variables, t, c, method='decode'), last, cache, length=8, eos=2)

    tokens (2, 8): [[17, 4, 2, 0, 0, 0, 0, 0], ...]    up to and with `eos`, then `pad`

A cache is any tree of arrays. Its leaves have the batch first, except those under the key 'layers', which have L first; leaves
whose name begins with 'memory' are the same for all hypotheses of a row. Everything is pure and can be jitted; a row's result
does not depend on the other rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.core import leaves
from research.core.errors import UsageError

Cache = Any
Step = Callable[[jax.Array, Cache], tuple[jax.Array, Cache]]
Choose = Callable[[jax.Array, jax.Array], jax.Array]
NEVER = -1e9  # the log-probability of what is impossible; finite, so that differences are


def greedy(
    step: Step, first: jax.Array, cache: Cache, *, length: int, eos: int | None, pad: int = 0
) -> tuple[jax.Array, jax.Array]:
    """The likeliest token after each token.

    Args:
      step: reads one token of each row.
      first: (B,) int32.
      cache: what `step` has read before `first`.
      length: T, the most tokens to generate; the cache must have room for them.
      eos: the token that ends a text; None: none does.
      pad: what follows it.

    Returns:
      Tokens (B, T) int32, and the sum of their log-probabilities (B,) float32.
    """
    return _generate(step, lambda logits, _: jnp.argmax(logits, -1), first, cache, length, eos, pad)


def sample(
    step: Step,
    first: jax.Array,
    cache: Cache,
    keys: jax.Array,
    *,
    length: int,
    eos: int | None,
    pad: int = 0,
    temperature: float | jax.Array = 1.0,
    top_k: int | jax.Array = 0,
    top_p: float | jax.Array = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """A token drawn after each token; see `greedy`.

    Args:
      step: see `greedy`.
      first: see `greedy`.
      cache: see `greedy`.
      keys: (B,) random keys; token t of row b is drawn with `fold_in(keys[b], t)`.
      length: see `greedy`.
      eos: see `greedy`.
      pad: see `greedy`.
      temperature: see `draw`; a number, or one for each row, (B,).
      top_k: likewise.
      top_p: likewise.

    Returns:
      Tokens (B, T) int32, and the sum of their log-probabilities (B,) under the model itself, whatever was drawn from.
    """

    def choose(logits: jax.Array, index: jax.Array) -> jax.Array:
        return draw(jax.vmap(jax.random.fold_in, (0, None))(keys, index), logits, temperature, top_k, top_p)

    return _generate(step, choose, first, cache, length, eos, pad)


def draw(
    keys: jax.Array,
    logits: jax.Array,
    temperature: float | jax.Array = 1.0,
    top_k: int | jax.Array = 0,
    top_p: float | jax.Array = 1.0,
) -> jax.Array:
    """One token for each row of logits (B, V), (B,) int32.

    Args:
      keys: (B,) random keys.
      logits: (B, V).
      temperature: what divides the logits; 0 takes the largest.
      top_k: only the k largest logits can be drawn; 0: all.
      top_p: of these, only the smallest set of at least this probability (Holtzman et al., 2020); 1: all.
    """
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), logits.shape[:1])
    scaled = logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1)[:, None]
    drawn = jax.vmap(jax.random.categorical)(keys, restrict(scaled, top_k, top_p))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, -1)).astype(jnp.int32)


def restrict(logits: jax.Array, top_k: int | jax.Array = 0, top_p: float | jax.Array = 1.0) -> jax.Array:
    """Logits (B, V) with -inf where `draw` never draws; of equal logits at the border all stay."""
    if isinstance(top_k, int) and isinstance(top_p, (int, float)) and not top_k and top_p >= 1:
        return logits
    size = logits.shape[-1]
    k, p = (jnp.broadcast_to(jnp.asarray(x), logits.shape[:1])[:, None] for x in (top_k, top_p))  # (B, 1)
    ordered = -jnp.sort(-logits, axis=-1)
    ordered = jnp.where(jnp.arange(size) < jnp.where(k > 0, k, size), ordered, -jnp.inf)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
    kept = jnp.maximum(jnp.sum((before < p) & (ordered > -jnp.inf), axis=-1, keepdims=True), 1)  # (B, 1)
    return jnp.where(logits >= jnp.take_along_axis(ordered, kept - 1, axis=-1), logits, -jnp.inf)


def _generate(
    step: Step, choose: Choose, first: jax.Array, cache: Cache, length: int, eos: int | None, pad: int
) -> tuple[jax.Array, jax.Array]:
    """Reads and chooses in turn until every row has ended or has T tokens."""
    batch = first.shape[0]

    def unfinished(state: tuple) -> jax.Array:
        index, _, _, ended, *_ = state
        return (index < length) & ~jnp.all(ended)

    def body(state: tuple) -> tuple:
        index, last, cache, ended, tokens, scores = state
        logits, cache = step(last[:, None], cache)
        log_probabilities = jax.nn.log_softmax(logits[:, -1].astype(jnp.float32))  # (B, V)
        chosen = choose(log_probabilities, index).astype(jnp.int32)
        gained = jnp.take_along_axis(log_probabilities, chosen[:, None], axis=-1)[:, 0]  # (B,)
        tokens = tokens.at[:, index].set(jnp.where(ended, pad, chosen))
        scores = scores + jnp.where(ended, 0.0, gained)
        return index + 1, chosen, cache, ended | _ends(chosen, eos), tokens, scores

    tokens, zeros = jnp.full((batch, length), pad, jnp.int32), jnp.zeros(batch, jnp.float32)
    start = (jnp.int32(0), first.astype(jnp.int32), cache, jnp.zeros(batch, bool), tokens, zeros)
    return jax.lax.while_loop(unfinished, body, start)[4:]


def _ends(tokens: jax.Array, eos: int | None) -> jax.Array:
    """Whether each token ends a text."""
    return jnp.zeros(tokens.shape, bool) if eos is None else tokens == eos


class _Beams(NamedTuple):
    """The state of a beam search."""

    index: jax.Array  # () int32, how many tokens the open hypotheses have
    cache: Cache  # of B * k rows
    tokens: jax.Array  # (B, k, T) int32, open
    scores: jax.Array  # (B, k) float32, their log-probabilities
    ended_tokens: jax.Array  # (B, k, T) int32, ended, the best first
    ended_scores: jax.Array  # (B, k) float32, normalised by length; -inf where there is none
    count: jax.Array  # (B,) int32, how many have ended


def beam_search(
    step: Step,
    first: jax.Array,
    cache: Cache,
    *,
    beams: int,
    length: int,
    eos: int,
    pad: int = 0,
    length_penalty: float = 0.6,
) -> tuple[jax.Array, jax.Array]:
    """The k hypotheses that beam search finds, the best first; with k = 1 the same as `greedy`.

    A hypothesis ends with `eos`, or is cut at T tokens. Its score is its log-probability over ((5 + n) / 6)^length_penalty for
    n tokens (Wu et al., 2016, section 7, without coverage). In each round those of the k likeliest extensions that end are
    put aside, and the k likeliest of those that do not end go on; a row is done when k have ended. For k as large as the number
    of all hypotheses the search is exhaustive.

    Args:
      step: reads one token of each row, here of B * k rows.
      first: (B,) int32, see `greedy`.
      cache: of B rows.
      beams: k.
      length: T.
      eos: the token that ends a hypothesis.
      pad: what follows it.
      length_penalty: 0 ranks by log-probability, which favours short hypotheses.

    Returns:
      Tokens (B, k, T) int32 and scores (B, k) float32; a hypothesis that does not exist is all `pad` with the score -inf.

    Raises:
      UsageError: `beams` or `length` is below 1.
    """
    if beams < 1 or length < 1:
        raise UsageError(f'beam search with beams={beams} and length={length}', 'give both at least 1')
    batch = first.shape[0]
    start = _Beams(
        index=jnp.int32(0),
        cache=_over_rows(cache, lambda leaf, axis, _: jnp.repeat(leaf, beams, axis)),
        tokens=jnp.full((batch, beams, length), pad, jnp.int32),
        scores=jnp.full((batch, beams), NEVER, jnp.float32).at[:, 0].set(0.0),  # k times the same: only one counts
        ended_tokens=jnp.full((batch, beams, length), pad, jnp.int32),
        ended_scores=jnp.full((batch, beams), -jnp.inf, jnp.float32),
        count=jnp.zeros(batch, jnp.int32),
    )

    def unfinished(state: _Beams) -> jax.Array:
        return (state.index < length) & jnp.any(state.count < beams)

    def body(state: _Beams) -> _Beams:
        return _extend(step, state, first, eos, length_penalty)

    state = jax.lax.while_loop(unfinished, body, start)
    cut = jnp.where((state.count < beams)[:, None] & (state.scores > NEVER / 2), state.scores, -jnp.inf)
    return _best(state, state.tokens, cut / _penalty(length, length_penalty))


def _extend(step: Step, state: _Beams, first: jax.Array, eos: int, length_penalty: float) -> _Beams:
    """One round: reads the last tokens, puts aside what ends, and goes on with the k best of the rest."""
    batch, beams, _ = state.tokens.shape
    last = jnp.where(state.index == 0, first[:, None], state.tokens[:, :, state.index - 1])  # (B, k)
    logits, cache = step(last.reshape(-1, 1), state.cache)
    gains = jax.nn.log_softmax(logits[:, -1].astype(jnp.float32)).reshape(batch, beams, -1)  # (B, k, V)
    size = gains.shape[-1]
    totals = (state.scores[:, :, None] + gains).reshape(batch, -1)  # (B, k*V)
    scores, places = jax.lax.top_k(totals, min(2 * beams, beams * size))  # (B, 2k): k of them cannot end
    parents, chosen = places // size, (places % size).astype(jnp.int32)
    tokens = jnp.take_along_axis(state.tokens, parents[:, :, None], axis=1).at[:, :, state.index].set(chosen)  # (B, 2k, T)
    ends = chosen == eos
    counts = ends & (scores > NEVER / 2) & (jnp.arange(ends.shape[1]) < beams) & (state.count < beams)[:, None]
    normalised = jnp.where(counts, scores / _penalty(state.index + 1, length_penalty), -jnp.inf)
    ended_tokens, ended_scores = _best(state, tokens, normalised)
    scores, kept = jax.lax.top_k(jnp.where(ends, 2 * NEVER, scores), beams)  # (B, k)
    rows = (jnp.arange(batch)[:, None] * beams + jnp.take_along_axis(parents, kept, axis=1)).reshape(-1)  # (B*k,)
    return _Beams(
        index=state.index + 1,
        cache=_over_rows(cache, lambda leaf, axis, name: leaf if 'memory' in name else jnp.take(leaf, rows, axis)),
        tokens=jnp.take_along_axis(tokens, kept[:, :, None], axis=1),
        scores=scores,
        ended_tokens=ended_tokens,
        ended_scores=ended_scores,
        count=state.count + counts.sum(1),
    )


def _best(state: _Beams, tokens: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The k best of the ended hypotheses and others, (B, k, T) and (B, k).

    Where there are fewer than k, places that are still free stay as they are: `top_k` takes the first of equal scores.
    """
    best, places = jax.lax.top_k(jnp.concatenate([state.ended_scores, scores], axis=1), state.ended_scores.shape[1])
    return jnp.take_along_axis(jnp.concatenate([state.ended_tokens, tokens], axis=1), places[:, :, None], axis=1), best


def _penalty(count: int | jax.Array, exponent: float) -> jax.Array:
    """((5 + count) / 6)^exponent."""
    return ((5.0 + jnp.asarray(count, jnp.float32)) / 6.0) ** exponent


def _over_rows(cache: Cache, change: Callable[[jax.Array, int, str], jax.Array]) -> Cache:
    """The cache with every leaf as `change(leaf, axis of its rows, last part of its name)`."""

    def changed(path: tuple, leaf: jax.Array) -> jax.Array:
        *above, name = leaves.name(path).split('/')
        return change(leaf, int('layers' in above), name)

    return jax.tree_util.tree_map_with_path(changed, cache)
