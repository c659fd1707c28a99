"""Padding buckets: every batch holds rows of about one length and is no wider than they need.

Shape letters: n rows, K buckets, n_k rows of bucket k, B global batch.

    config.data.transforms = ['pad(length=128)', 'buckets(lengths=(32, 64, 128))']

A row belongs to the smallest bucket that holds it. Every batch, in training and evaluation, comes from one bucket and is cut to
its length, so a step is compiled once for each bucket that occurs, and all processes see the same shape.

Training: bucket k is an endless shuffled stream of its own (each example once in each of its epochs), cut into batches of B;
the remainder of an epoch is carried into the next, so no example is lost or repeated. By the end of epoch e bucket k has given
floor(e n_k / B) batches: every example has been seen e times but fewer than B of each bucket, which come next. The batches of
one epoch are in random order. With n_k = (5, 6) and B = 2 epoch 0 has 2 + 3 batches; the fifth row of the first bucket
begins its next batch, in epoch 1, which has 3 + 3. All this is arithmetic on the step.

Evaluation: every row once; each bucket's last batch is filled up under mask 0.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from research.core.errors import UsageError
from research.data import plan
from research.data.mixture import Mixture
from research.data.sequences import Transform
from research.data.source import Block, DataSet, Shapes, Source, shapes_of
from research.data.streams import seed_of, stream
from research.data.token_table import READ

# What is cut by the length of what: keys of a block by the key that tells the length (a segment row, or a number).
ALONG = {
    'text': {
        'segment': ('tokens', 'segment', 'position', 'tag'),
        'source_segment': ('source', 'source_segment'),
        'target_segment': ('target', 'target_segment'),
    },
    'audio': {'audio_length': ('audio',)},
}
EXTRA = {'target_segment': 1}  # a target has one token more than a decoder sees


def buckets(*, lengths: tuple[int, ...] = (32, 64, 128), along: str = 'text') -> Transform:
    """Rows in buckets of these lengths; behind `pad` or `pairs`.

    Args:
      lengths: rising; tokens ('text') or samples ('audio'). A pair belongs where both of its rows fit.
      along: 'text' cuts token rows, 'audio' cuts 'audio' by 'audio_length'.

    Raises:
      UsageError: lengths that do not rise, an unknown `along`; (when applied) a row that fits no bucket, nothing to cut, or a
        mixture, which has an order of its own.
    """
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
        raise UsageError(f'buckets(lengths={lengths}) do not rise', 'write them as (32, 64, 128)')
    if along not in ALONG:
        raise UsageError(f'buckets(along={along!r}) is unknown', f'choose one of {", ".join(ALONG)}')

    def bucketed(source: Source) -> Source:
        if isinstance(source, Mixture):
            raise UsageError('a mixture cannot be put into buckets: both say the order of training', 'use one of the two')
        return Buckets(source, lengths, along)

    def transform(dataset: DataSet) -> DataSet:
        return dataset.map(bucketed)

    return transform


class Buckets:
    """The rows of `source` by bucket, the longest bucket first (so that example 0 shows the largest shape)."""

    def __init__(self, source: Source, lengths: Sequence[int], along: str):
        self.source, self.lengths = source, np.array(lengths)
        self._families = ALONG[along]
        sizes = np.concatenate([self._sizes(start) for start in range(0, len(source), READ)])  # (n,)
        if sizes.max(initial=0) > lengths[-1]:
            raise UsageError(
                f'a row has length {sizes.max()}, the last bucket holds {lengths[-1]}', 'add a longer bucket, or pad to less'
            )
        bucket = np.searchsorted(self.lengths, sizes)  # (n,)
        self._order = np.argsort(-bucket, kind='stable')
        self._bucket = bucket[self._order]
        self.counts = tuple(int(c) for c in np.bincount(bucket, minlength=len(lengths))[::-1] if c)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, indices: np.ndarray) -> Block:
        block = self.source[self._order[indices]]
        width = int(self.lengths[self._bucket[indices].max()])
        extra = {key: EXTRA.get(family, 0) for family, keys in self._families.items() for key in keys}
        return {key: column[:, : width + extra[key]] if key in extra else column for key, column in block.items()}

    def keys(self) -> np.ndarray:
        """The keys of the rows, (n,) uint64."""
        return self.source.keys()[self._order]

    def labels(self) -> np.ndarray | None:
        """The classes of the rows, (n,)."""
        labels = self.source.labels()
        return None if labels is None else labels[self._order]

    def plan(self, batch_size: int, seed: int) -> 'BucketPlan':
        """The order of training."""
        return BucketPlan(self.counts, batch_size, seed)

    def evaluation_plan(self, batch_size: int) -> 'BucketEvaluationPlan':
        """The order of evaluation."""
        return BucketEvaluationPlan(self.counts, batch_size)

    def kinds(self) -> list[tuple[float, Shapes]]:
        """The share of each bucket in the batches of training, and what its rows look like."""
        starts = np.cumsum((0, *self.counts[:-1]))
        return [(c / len(self), shapes_of(self[np.array([start])])) for c, start in zip(self.counts, starts, strict=True)]

    def _sizes(self, start: int) -> np.ndarray:
        """The length each row of a block needs, (B,)."""
        block = self.source[np.arange(start, min(start + READ, len(self.source)))]
        found = [_length(block[key]) - EXTRA.get(key, 0) for key in self._families if key in block]
        if not found:
            raise UsageError(
                f'the rows have none of {", ".join(self._families)} to be cut by', "put 'pad' or 'pairs' before it"
            )
        return np.max(found, axis=0)


@dataclasses.dataclass(frozen=True)
class BucketPlan:
    """The order of training over buckets of `counts` rows, which lie one behind the other; see the module."""

    counts: tuple[int, ...]
    batch_size: int
    seed: int

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(indices, epochs, mask) of one step's global batch, each (B,): int64, int64, float32; one bucket."""
        epoch = self._epoch_of(step)
        earlier = self.batches_before(epoch)
        order, ranks = _arrangement(self, epoch)
        place = step - int(earlier.sum())
        bucket = int(order[place])
        number = int(earlier[bucket] + ranks[place])
        positions = number * self.batch_size + np.arange(self.batch_size)
        indices, epochs = stream(positions, self.counts[bucket], seed_of(self.seed, bucket))
        return indices + sum(self.counts[:bucket]), epochs, np.ones(self.batch_size, np.float32)

    def batches_before(self, epoch: int) -> np.ndarray:
        """How many batches each bucket gives before `epoch`, (K,)."""
        return np.array([epoch * count // self.batch_size for count in self.counts], np.int64)

    def unique(self, steps: int) -> int:
        """How many different rows the first `steps` steps hold."""
        epoch = self._epoch_of(steps)
        earlier = self.batches_before(epoch)  # (K,)
        order, _ = _arrangement(self, epoch)
        batches = earlier + np.bincount(order[: steps - int(earlier.sum())], minlength=len(self.counts))
        return int(np.minimum(batches * self.batch_size, self.counts).sum())

    def _epoch_of(self, step: int) -> int:
        epoch = step * self.batch_size // sum(self.counts)
        while self.batches_before(epoch + 1).sum() <= step:
            epoch += 1
        return epoch


@functools.lru_cache(maxsize=4)
def _arrangement(training: BucketPlan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(bucket, how many of its batches came before in this epoch) of each step of an epoch."""
    counts = training.batches_before(epoch + 1) - training.batches_before(epoch)  # (K,)
    total = int(counts.sum())
    shuffled = plan.permute(np.arange(total), total, training.seed, epoch)
    found = np.repeat(np.arange(len(counts)), counts)[shuffled]  # (steps,)
    ranks = np.empty(total, np.int64)
    ranks[np.argsort(found, kind='stable')] = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    return found, ranks


@dataclasses.dataclass(frozen=True)
class BucketEvaluationPlan:
    """Every row once, bucket by bucket; the last batch of each is filled with its first row under mask 0."""

    counts: tuple[int, ...]
    batch_size: int

    def __len__(self) -> int:
        return int(self._ends()[-1])

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(indices, epochs, mask) of batch `step`, each (B,)."""
        ends = self._ends()
        bucket = int(np.searchsorted(ends, step, side='right'))
        earlier = int(ends[bucket - 1]) if bucket else 0
        places = (step - earlier) * self.batch_size + np.arange(self.batch_size)
        valid = places < self.counts[bucket]
        indices = np.where(valid, places, 0) + sum(self.counts[:bucket])
        return indices, np.zeros(self.batch_size, np.int64), valid.astype(np.float32)

    def _ends(self) -> np.ndarray:
        """The number of the step behind each bucket's last, (K,)."""
        return np.cumsum([-(-count // self.batch_size) for count in self.counts])


def _length(column: np.ndarray) -> np.ndarray:
    """How much of each row is real, (B,): up to the last place of a segment row that is not 0, or the number itself."""
    if column.ndim == 1:
        return column
    real = column > 0  # (B, T)
    return np.where(real.any(axis=1), column.shape[1] - np.argmax(real[:, ::-1], axis=1), 0)
