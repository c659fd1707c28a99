"""Cross-entropy of tokens, and how to take it without the logits of the whole vocabulary ever existing at once.

Shape letters: B batch, T length, D features, V vocabulary, c length of a chunk, n chunks of a row.

A row is cut along its length, so that the batch axis stays laid out over the devices; each chunk's logits (B, c, V) are made,
scored and dropped, and the backward pass makes them again: less memory for one more matrix product of the head. With B = 8,
T = 1024, V = 50,257 and D = 768 in float32 all logits are 1.65 GB, those of c = 64 are 103 MB; the compiled gradient sets aside
4.97 GB and 0.70 GB, the evaluation 3.29 GB and 0.23 GB (XLA's memory analysis on CPU).

    scores = score(logits, targets)                                      # {'nats': (B, T), 'loss': (B, T), 'correct': (B, T)}
    scores = in_chunks(lambda x, y: score(head(x), y), 64, features, targets)          # the same, 64 places of a row at a time

Of two tokens, logits (0, 0) cost log 2 = 0.693 nats; with label smoothing 0.1, logits (2, 0) cost 0.127 for the first, 0.227 in
the loss.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.tasks.losses import in_range

Scores = dict[str, jax.Array]


def score(logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Scores:
    """What each prediction costs; logits (..., V), targets (...) int -> three arrays (...) float32.

    Args:
      logits: of any floating type; computed with in float32.
      targets: a target outside [0, V) gives NaN: nothing can be raised inside jit.
      label_smoothing: the share s of the target that is spread evenly over all V tokens, see `losses.cross_entropy`.
      z_loss: factor of log(Z)^2, which keeps the logits from drifting (Chowdhery et al. 2022, "PaLM", section 5: 1e-4).

    Returns:
      'nats': the cross-entropy with the target itself. 'loss': the cross-entropy with the smoothed target, and the z-loss.
      'correct': 1 where the target has the largest logit (of equal ones the first), else 0.
    """
    logits = logits.astype(jnp.float32)
    largest = jax.lax.stop_gradient(logits.max(-1))  # (...)
    logits = logits - largest[..., None]  # so that the cost of a sure prediction keeps its digits
    log_sum = jnp.log(jnp.exp(logits).sum(-1))
    # A comparison and a sum instead of a gather: they fuse, and stay local where the vocabulary is laid out over devices.
    at_target = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0.0), axis=-1)  # (...)
    nats = log_sum - at_target
    loss = nats
    if label_smoothing:
        loss = (1 - label_smoothing) * nats + label_smoothing * (log_sum - logits.mean(-1))
    if z_loss:
        loss = loss + z_loss * jnp.square(log_sum + largest)
    # A minimum of places, not argmax, which XLA on CPU takes number by number.
    best = jnp.min(jnp.where(logits == 0, jnp.arange(logits.shape[-1]), logits.shape[-1]), axis=-1)  # (...)
    correct = (best == targets).astype(jnp.float32)
    sound = in_range(targets, logits.shape[-1]) & ~jnp.isnan(log_sum)
    return {name: jnp.where(sound, x, jnp.nan) for name, x in (('nats', nats), ('loss', loss), ('correct', correct))}


def in_chunks(function: Callable[..., Any], chunk: int, *arrays: jax.Array) -> Any:
    """`function(*arrays)` of arrays (B, T, ...), `chunk` places of T at a time; results (B, T, ...).

    Each place's result must depend on that place alone. Nothing inside `function` is kept for the backward pass. The last chunk
    is filled up with zeros, whose results are cut off.
    """
    batch, length = arrays[0].shape[:2]
    count = -(-length // chunk)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * chunk - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)  # (n, B, c, ...)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, count * chunk, *x.shape[3:])[:, :length]  # (B, T, ...)

    run = jax.checkpoint(lambda parts: function(*parts), prevent_cse=False)  # a loop's body cannot be merged with another
    _, found = jax.lax.scan(lambda carry, parts: (carry, run(parts)), None, tuple(cut(x) for x in arrays))
    return jax.tree.map(join, found)
