"""An endless shuffled stream over n examples, any place of it without the rest: what mixtures and buckets are made of.

Shape letters: n examples, m positions, K streams that share a block of L places.

Position p belongs to epoch p // n and is the example permutation(seed, epoch)[p % n], as in `plan.TrainPlan`; but a plan that
draws from many streams at once cannot keep a sorted order for each large one, so from 2**16 examples on the Feistel network
of `plan` computes the places that are asked for.

    stream(np.array([0, 1, 2, 3]), n=3, seed=0)          # three different examples of epoch 0, then one of epoch 1
"""

import fractions
import functools
import math

import numpy as np

from research.data import plan

TABLE_LIMIT = 2**16
MAX_BATCHES = 64  # of a block


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


def block_counts(shares: list[fractions.Fraction], batch_size: int) -> np.ndarray:
    """Examples of each part in a block, (K,): exact where MAX_BATCHES batches suffice, else by largest remainder."""
    total = sum(shares, fractions.Fraction(0))
    shares = [share / total for share in shares]
    common = math.lcm(*(share.denominator for share in shares))
    batches = common // math.gcd(common, batch_size)
    if batches > MAX_BATCHES:
        least = min(share for share in shares if share)
        batches = max(MAX_BATCHES, math.ceil(16 / (least * batch_size)))
    wanted = [share * batches * batch_size for share in shares]
    counts = [math.floor(amount) for amount in wanted]
    by_remainder = sorted(range(len(wanted)), key=lambda k: counts[k] - wanted[k])
    for k in by_remainder[: batches * batch_size - sum(counts)]:
        counts[k] += 1
    return np.array(counts, np.int64)


def interleave(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(owners, ranks), each (L,): example r of the c of a part lies at (r + 1/2) / c of the block."""
    owners = np.repeat(np.arange(len(counts)), counts)
    ranks = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.lexsort((owners, (ranks + 0.5) / counts[owners]))
    return owners[order], ranks[order]


def _permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    return _order(n, seed, epoch)[positions] if n <= TABLE_LIMIT else plan.feistel(positions, n, seed, epoch)


@functools.lru_cache(maxsize=64)  # 32 MB at most
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return plan.permute(np.arange(n), n, seed, epoch)  # (n,)
