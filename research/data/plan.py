"""The index plan: which examples the batch of a step holds, by arithmetic alone. There is no iterator and no state.

Shape letters: n examples of the training split, B global batch.

Position p of the endless stream of training examples belongs to epoch p // n; within its epoch its example is
permutation(seed, epoch)[p % n]. Step s holds the positions s*B ... s*B + B - 1, so no remainder is dropped, every epoch holds
every example once, and any host can compute its slice of any step. With n = 10 and B = 4, step 2 holds the last two examples
of epoch 0 and the first two of epoch 1.

Up to 2**22 examples the permutation sorts a 64-bit hash of the indices, and one epoch's order is kept (32 MB at most). Beyond
that it is a Feistel network over the smallest even number of bits that holds n, walked until it falls below n (Black and
Rogaway, "Ciphers with arbitrary finite domains", 2002): no memory, any part without the rest. (On few examples such a network
is visibly not uniform.) Both are the same on every machine and for every library version.
"""

import dataclasses
import functools
from typing import Any, Protocol

import numpy as np

from research.core import files

ROUNDS = 6
TABLE_LIMIT = 2**22


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The images of `positions` (int64, each in [0, n)) under the permutation of [0, n) with the address (seed, epoch)."""
    return _sorted(n, seed, epoch)[positions] if n <= TABLE_LIMIT else feistel(positions, n, seed, epoch)


@functools.lru_cache(maxsize=4)
def _sorted(n: int, seed: int, epoch: int) -> np.ndarray:
    """The whole permutation, (n,), by the order of hashes."""
    return np.argsort(mix(np.arange(n, dtype=np.uint64) + _keys(seed, epoch)[0]), kind='stable')


def feistel(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The images of `positions` under a permutation of [0, n) that is computed place by place."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    keys = _keys(seed, epoch)
    result = _network(positions.astype(np.uint64), half, keys)
    while (outside := result >= n).any():
        result[outside] = _network(result[outside], half, keys)
    return result.astype(np.int64)


def _keys(seed: int, epoch: int) -> list[np.uint64]:
    return [np.uint64(int(files.digest([f'order {seed} {epoch} {i}'], 8), 16)) for i in range(ROUNDS)]


def _network(x: np.ndarray, half: np.uint64, keys: list[np.uint64]) -> np.ndarray:
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


class Plan(Protocol):
    """The global batch of every step."""

    @property
    def batch_size(self) -> int:
        """B, the size of the global batch."""
        ...

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(indices, epochs, mask) of one step, each (B,): int64, int64, float32."""
        ...


def has_own_plan(source: Any) -> bool:
    """Whether a source says the order of training itself (a mixture, buckets): what hides its `plan` would undo it."""
    return getattr(source, 'plan', None) is not None


def plan_of(source: Any, batch_size: int, seed: int) -> Plan:
    """The order of training over `source`: its own `plan(batch_size, seed)` where it has one, else shuffled epochs."""
    own = getattr(source, 'plan', None)
    return TrainPlan(len(source), batch_size, seed) if own is None else own(batch_size, seed)


def unique_examples(source: Any, steps: int, batch_size: int, seed: int) -> int:
    """How many different examples of `source` the first `steps` steps of training hold.

    What the plan's own `unique(steps)` says where it has one (exact for shuffled epochs, mixtures and buckets), else
    min(steps * B, n). Examples are told apart by their place in the source, not by what they hold: an exact duplicate counts
    twice, and so does an example that two sources of a mixture have in common; but not one that few_labels shows with and
    without its label.
    """
    plan = plan_of(source, batch_size, seed)
    own = getattr(plan, 'unique', None)
    return min(steps * plan.batch_size, len(source)) if own is None else own(steps)


def evaluation_plan_of(source: Any, batch_size: int) -> Any:
    """The order of evaluation: the source's own `evaluation_plan(batch_size)` where it has one, else `EvaluationPlan`."""
    own = getattr(source, 'evaluation_plan', None)
    return EvaluationPlan(len(source), batch_size) if own is None else own(batch_size)


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
        if epochs[0] == epochs[-1]:  # nearly always, and there is nothing to take apart
            indices = permute(offsets, self.num_examples, self.seed, int(epochs[0]))
            return indices, epochs, np.ones(self.batch_size, np.float32)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            indices[inside] = permute(offsets[inside], self.num_examples, self.seed, int(epoch))
        return indices, epochs, np.ones(self.batch_size, np.float32)


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
