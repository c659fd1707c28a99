"""Fingerprints of arrays, computed where the arrays are: 64 bits a leaf, the same for any sharding and number of devices.

Each word of 32 bits is mixed with its place in the whole array, w ^ 0x9E3779B1 * i (i counts row by row), by the finaliser
of MurmurHash3 (Appleby, 2011), a bijection; the sums of these and of a second bijection of them, modulo 2**32, are the two
halves. So one changed word always changes the fingerprint, and words that changed places or several changed words do with a
probability of 1 - 2**-64. Sums of integers do not depend on their order, which is why devices do not matter.
Shape letters: L leaves.

It finds damage, not malice: who can choose the bits can find others with the same fingerprint.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from research.core import leaves


@functools.partial(jax.jit, static_argnames='sharding')
def _digests(arrays: list[jax.Array], sharding: NamedSharding | None) -> tuple[jax.Array, jax.Array]:
    """((L, 2) uint32 fingerprints, (L,) bool whether a leaf holds NaN)."""
    found = jnp.stack([_digest(x) for x in arrays]), jnp.stack([_has_nan(x) for x in arrays])
    return found if sharding is None else jax.lax.with_sharding_constraint(found, sharding)


@jax.jit
def digest(x: jax.Array) -> jax.Array:
    """The fingerprint of one array, (2,) uint32."""
    return _digest(x)


def _digest(x: jax.Array) -> jax.Array:
    """The two halves, (2,) uint32."""
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):  # no reshape: the array stays laid out over its devices
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    mixed = _mix(words ^ (place * np.uint32(0x9E3779B1)))
    again = (mixed ^ (mixed >> 15)) * np.uint32(0x2C1B3C6D)
    again ^= again >> 12
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(again, dtype=jnp.uint32)])


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(x: jax.Array) -> jax.Array:
    """The bits of `x` as uint32; narrower elements have a word each, of eight bytes become a last axis of 2."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([jnp.real(x), jnp.imag(x)], -1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize >= 4:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}[x.dtype.itemsize]).astype(jnp.uint32)


def _has_nan(x: jax.Array) -> jax.Array:
    return jnp.any(jnp.isnan(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.zeros((), bool)


class Fingerprints:
    """Fingerprints of a tree that are still being computed; asking for them waits."""

    def __init__(self, tree: Any):
        flat = leaves.flat(tree)
        self.names = list(flat)
        first = next((x for x in flat.values() if isinstance(getattr(x, 'sharding', None), NamedSharding)), None)
        everywhere = None if first is None else NamedSharding(first.sharding.mesh, PartitionSpec())
        self._found = _digests(list(flat.values()), everywhere)

    def by_name(self) -> dict[str, str]:
        """Sixteen hexadecimal digits for each leaf."""
        return {name: f'{a:08x}{b:08x}' for name, (a, b) in zip(self.names, np.asarray(self._found[0]).tolist(), strict=True)}

    def not_numbers(self) -> list[str]:
        """The leaves that hold NaN."""
        return [name for name, bad in zip(self.names, np.asarray(self._found[1]).tolist(), strict=True) if bad]
