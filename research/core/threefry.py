"""Threefry 2x32, the hash behind jax' random keys, as straight code: the same numbers without a loop.

    jax.random.uniform(straight(key), (2,))        # what jax.random.uniform(key, (2,)) is

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", with 20 rounds, keyed and counted as jax does it
(`jax_threefry_partitionable`). On a CPU jax gives XLA each hash as a loop, whose turns cost more than the numbers of a batch;
an augmentation that draws three numbers an example had nine of them (`python -m bench.input`).

A straight key is for a draw on the spot: its kind is one that jax does not know, so that `jax.random.poisson` refuses it and it
cannot stand in one array with other keys. No function of Fulcrum but `straight` returns one.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random as extension

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)
settings: Any = jax.config  # whose attributes a type checker does not see
STANDARD = 'threefry2x32'  # jax' name of its implementation
WIDTHS = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}


def hashed(key: tuple[Any, Any], counts: tuple[Any, Any]) -> tuple[Any, Any]:
    """The two words of `counts` under the two of `key`: uint32 arrays, of numpy or jax, whose shapes go together."""
    words = (*key, key[0] ^ key[1] ^ PARITY)
    x, y = counts[0] + words[0], counts[1] + words[1]
    for turn in range(5):
        for rotation in ROTATIONS[turn % 2]:
            x = x + y
            y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
            y = x ^ y
        x, y = x + words[(turn + 1) % 3], y + words[(turn + 2) % 3] + np.uint32(turn + 1)
    return x, y


def folded(seed: int, *numbers: int) -> np.ndarray:
    """The data (2,) uint32 of `jax.random.key(seed)` into which the numbers are folded, all in 0 ... 2**32 - 1, by numpy."""
    key = np.array([0, seed], np.uint32)
    for number in numbers:
        counts = np.zeros(1, np.uint32), np.array([number], np.uint32)
        key = np.concatenate(hashed((key[:1], key[1:]), counts))
    return key


def straight(key: jax.Array) -> jax.Array:
    """The key or keys, from which and from whose children come the same numbers, by `hashed` where that is the faster way.

    That is on a CPU. Keys of another kind, and what jax counts in another way, are left to jax.
    """
    is_ours = jax.random.key_impl(key) == STANDARD and settings.jax_threefry_partitionable
    if not is_ours or jax.default_backend() != 'cpu':
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_STRAIGHT)


def standard(key: jax.Array) -> jax.Array:
    """What was made `straight` as the key or keys that jax knows; others as they are."""
    if jax.random.key_impl(key) != _STRAIGHT:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=STANDARD)


def _fold_in(key: jax.Array, number: Any) -> jax.Array:
    number = jnp.asarray(number).astype(jnp.uint32)
    return jnp.stack(hashed((key[0], key[1]), (jnp.zeros_like(number), number)))


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.stack(hashed((key[0], key[1]), _counts(shape)), axis=-1)


def _random_bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    high, low = hashed((key[0], key[1]), _counts(shape))
    if width == 64:
        return (high.astype(jnp.uint64) << np.uint64(32)) | low.astype(jnp.uint64)
    return (high ^ low).astype(WIDTHS[width])


def _counts(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """0, 1, 2, ... in two words; no more than 2**32."""
    low = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return jnp.zeros_like(low), low


_STRAIGHT = extension.define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: jax.random.key_data(jax.random.key(seed)),
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name='threefry2x32_straight',
    tag='frs',
)
