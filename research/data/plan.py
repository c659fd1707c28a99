"""The index plan: which examples the batch of a step holds, by arithmetic alone. There is no iterator and no state.

Shape letters: n examples of the training split, B global batch.

Position p of the endless stream of training examples belongs to epoch p // n; within its epoch its example is
permutation(seed, epoch)[p % n]. Step s holds the positions s*B ... s*B + B - 1, so no remainder is dropped, every epoch holds
every example once, and any host can compute its slice of any step. With n = 10 and B = 4, step 2 holds the last two examples
of epoch 0 and the first two of epoch 1.

The permutation is a four-round Feistel network over the smallest even number of bits that holds n, walked until it falls
below n (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): it needs no memory, is the same on every machine
and for every library version.
"""

import dataclasses
import functools

import numpy as np

from research.core import files

ROUNDS = 4
TABLE_LIMIT = 2**22  # up to this many examples an epoch's order is computed once and kept (32 MB)


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The images of `positions` (int64, each in [0, n)) under the permutation of [0, n) with the address (seed, epoch)."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    keys = _round_keys(seed, epoch)
    result = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := result >= n).any():
        result[outside] = _feistel(result[outside], half, keys)
    return result.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    return [np.uint64(int(files.digest([f'order {seed} {epoch} {i}'], 8), 16)) for i in range(ROUNDS)]


def _feistel(x: np.ndarray, half: np.uint64, keys: list[np.uint64]) -> np.ndarray:
    """One pass of the network over 2 * half bits; a bijection for any round function."""
    low = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & low
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & low)
    return (left << half) | right


def mix(x: np.ndarray) -> np.ndarray:
    """A bijective 64-bit hash of `x` (uint64): the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    with np.errstate(over='ignore'):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The whole order of one epoch, (n,)."""
    return permute(np.arange(n), n, seed, epoch)


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """The order of training: endless epochs, each shuffled anew."""

    num_examples: int
    batch_size: int
    seed: int

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(indices, epochs, mask) of one step's global batch, each (B,): int64, int64, float32. Training has no padding."""
        positions = step * self.batch_size + np.arange(self.batch_size)
        epochs, offsets = np.divmod(positions, self.num_examples)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            indices[inside] = self._permuted(offsets[inside], int(epoch))
        return indices, epochs, np.ones(self.batch_size, np.float32)

    def _permuted(self, offsets: np.ndarray, epoch: int) -> np.ndarray:
        if self.num_examples <= TABLE_LIMIT:
            return _order(self.num_examples, self.seed, epoch)[offsets]
        return permute(offsets, self.num_examples, self.seed, epoch)


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """Every example once, in order; the last batch is padded with example 0 under mask 0."""

    num_examples: int
    batch_size: int

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(indices, epochs, mask) of batch `step`, each (B,)."""
        positions = step * self.batch_size + np.arange(self.batch_size)
        valid = positions < self.num_examples
        return np.where(valid, positions, 0), np.zeros(self.batch_size, np.int64), valid.astype(np.float32)
