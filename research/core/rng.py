"""Randomness is an address: a key is a pure function of (seed, name, numbers), so no generator state is ever stored.

Shape letters: B batch.

    rng.key(42, 'dropout', step)      # one key for one step, the same on every host, device count and restart
    rng.example_keys(rng.key(42, 'augment'), ids, epochs)      # (B,) keys that follow the example, not its place in the batch
"""

import zlib

import jax
import jax.numpy as jnp

from research.core import threefry


def key(seed: int, name: str, *numbers: int | jax.Array) -> jax.Array:
    """The random key at the address (seed, name, *numbers); the numbers may be traced integers.

    Returns a typed scalar key (`jax.random.key`).
    """
    address = zlib.crc32(name.encode())
    settings = threefry.settings
    is_standard = settings.jax_default_prng_impl == threefry.STANDARD and not settings.jax_random_seed_offset
    if is_standard and 0 <= seed < 2**32:
        result = jax.random.wrap_key_data(jnp.asarray(threefry.folded(seed, address)))  # a constant of what is traced
    else:
        result = jax.random.fold_in(jax.random.key(seed), address)
    for number in numbers:
        result = jax.random.fold_in(result, number)
    return result


def example_keys(stream: jax.Array, ids: jax.Array, epochs: jax.Array) -> jax.Array:
    """One key per example, (B,), from its id (B,) and epoch (B,): independent of batch size, order and devices."""
    stream = threefry.straight(stream)
    return threefry.standard(jax.vmap(lambda i, e: jax.random.fold_in(jax.random.fold_in(stream, i), e))(ids, epochs))


def fold_each(keys: jax.Array, number: int | jax.Array) -> jax.Array:
    """The keys (B,), into each of which `number` is folded."""
    return threefry.standard(jax.vmap(jax.random.fold_in, (0, None))(threefry.straight(keys), number))


def split_each(keys: jax.Array, count: int = 2) -> jax.Array:
    """`count` new keys for each of `keys` (B,): (count, B)."""
    return threefry.standard(jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(threefry.straight(keys)))
