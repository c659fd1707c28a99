"""An endless shuffled stream over n examples, any place of it without the rest: what mixtures and buckets are made of.

Shape letters: n examples, m positions.

Position p belongs to epoch p // n and is the example permutation(seed, epoch)[p % n], as in `plan.TrainPlan`; but a plan that
draws from many streams at once cannot keep a sorted order for each large one, so from 2**16 examples on the Feistel network
of `plan` computes the places that are asked for.

    stream(np.array([0, 1, 2, 3]), n=3, seed=0)          # three different examples of epoch 0, then one of epoch 1
"""

import functools

import numpy as np

from research.data import plan

TABLE_LIMIT = 2**16


def stream(positions: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices, epochs) at `positions` (m,) int64 of the stream with this seed, each (m,) int64."""
    epochs, offsets = np.divmod(positions, n)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        indices[inside] = _permute(offsets[inside], n, seed, int(epoch))
    return indices, epochs


def seed_of(seed: int, part: int) -> int:
    """The seed of the stream of one part of a plan: streams of equal length must not run side by side."""
    return seed + (part + 1) * 2**32


def _permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    return _order(n, seed, epoch)[positions] if n <= TABLE_LIMIT else plan.feistel(positions, n, seed, epoch)


@functools.lru_cache(maxsize=64)  # 32 MB at most
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return plan.permute(np.arange(n), n, seed, epoch)  # (n,)
