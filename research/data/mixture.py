"""Mixtures: several sources as one, drawn in proportion to weights, each for at most so many epochs.

Shape letters: K parts, n_k examples of part k, B global batch, L places of a block.

    data = mixture(sources=('python_docs', 'text_files(path="notes")'), weights=(3, 1), max_epochs=(None, 4))

The stream of training examples is cut into blocks of L places, the smallest multiple of B in which every weight gives a whole
number (64 batches where that would be longer; the shares are then right to one example a block). A block is one fixed table:
the places of every part lie as evenly as they can. So place p is arithmetic: block p // L, part table[p % L], and the number
of the example in that part's own endless shuffled stream is what earlier blocks took plus its rank in this one. With weights
(3, 1) and B = 8 every batch holds 6 examples of the first part and 2 of the second.

A part that has given `max_epochs` times its examples leaves at that very place; from there on the other weights share the
stream: a new stage with a new table. All stages are computed at the start, and step 10**9 costs as much as step 0. When every
part has left, the mixture is at its end, and asking for more is an error. Weights and epochs count examples as they are in a
batch: rows, where documents were packed. The 'epoch' of an example is that of its own part.
"""

import dataclasses
import fractions
import math
from collections.abc import Callable, Sequence

import numpy as np

from research.core import registry
from research.core.errors import UsageError
from research.data.bad_records import spec_of
from research.data.plan import has_own_plan
from research.data.source import Block, DataSet, Source, Subset
from research.data.streams import block_counts, interleave, seed_of, stream

MIN_WEIGHT = 1e-5  # share below which a part cannot be placed in a table of sensible size


def mixture(
    *,
    sources: tuple[str | dict, ...],
    weights: tuple[float, ...] | None = None,
    max_epochs: tuple[float | None, ...] | None = None,
) -> DataSet:
    """Several data sets as one. All splits are mixed; evaluation goes over each split's parts one after the other.

    Args:
      sources: the data sets, as `config.data.source` spells one. They need the same splits; only keys of an example that all
        have, with the same shape and dtype, are kept.
      weights: how the training stream is shared out; None: by the number of examples.
      max_epochs: how often each part may be gone through at most, fractions allowed; None: without end.

    Raises:
      UsageError: the lists differ in length, a weight or cap is not positive, or the data sets do not fit together.
    """
    built = [registry.component('source', value, f'config.data.source.sources[{i}]').build() for i, value in enumerate(sources)]
    if not built:
        raise UsageError('a mixture of no sources', 'name at least one in config.data.source.sources')
    caps = max_epochs or (None,) * len(built)
    if len(caps) != len(built) or len(weights or caps) != len(built):
        raise UsageError(
            f'{len(built)} sources, {len(weights or caps)} weights and {len(caps)} max_epochs',
            'give one of each for every source',
        )
    wrong = [value for value in (*(weights or ()), *caps) if value is not None and value <= 0]
    if wrong:
        raise UsageError(
            f'a weight or max_epochs of the mixture is {wrong[0]}', 'leave a source out instead of giving it nothing'
        )
    names = {data.name: sorted(data.splits) for data in built}
    if len({tuple(splits) for splits in names.values()}) > 1 or len({data.class_names for data in built}) > 1:
        raise UsageError(f'the sources of a mixture differ in splits or classes: {names}', 'mix sources that have the same')
    splits: dict[str, Source] = {
        split: Mixture([data.splits[split] for data in built], weights, caps) for split in built[0].splits
    }
    return DataSet('+'.join(data.name for data in built), splits, built[0].class_names)


class Mixture:
    """Parts (K sources) as one source of sum n_k examples, in the parts' order; `plan` draws from them by weight.

    Attributes:
      rows: the numbers (n_k,) of each part's examples, equal where two parts hold the same one; None: all differ.

    Raises:
      UsageError: parts whose keys differ or of which one says an order of training itself (another mixture).
    """

    def __init__(
        self,
        parts: Sequence[Source],
        weights: Sequence[float] | None,
        max_epochs: Sequence[float | None],
        rows: Sequence[np.ndarray] | None = None,
    ):
        self.parts, self.weights, self.max_epochs, self.rows = tuple(parts), weights, tuple(max_epochs), rows
        if ordered := [k for k, part in enumerate(self.parts) if has_own_plan(part)]:
            raise UsageError(
                f'source {ordered[0]} of the mixture is a mixture or in buckets: its own order of training would be lost',
                'name the sources of an inner mixture in the outer one, with the weights multiplied',
            )
        self.overlapping = any(getattr(part, 'overlapping', False) for part in self.parts)  # as `Windows` may be
        self._offsets = np.cumsum([0, *(len(part) for part in self.parts)])  # (K + 1,)
        self._spec = _common_spec([part for part in self.parts if len(part)])

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, indices: np.ndarray) -> Block:
        indices = np.asarray(indices)
        owners = np.searchsorted(self._offsets, indices, side='right') - 1  # (B,)
        block = {key: np.empty((len(indices), *shape), dtype) for key, (shape, dtype) in self._spec.items()}
        for owner in np.unique(owners):
            inside = owners == owner
            read = self.parts[owner][indices[inside] - self._offsets[owner]]
            for key, column in block.items():
                column[inside] = read[key]
        return block

    def keys(self) -> np.ndarray:
        """The keys of all parts, (n,) uint64."""
        return np.concatenate([part.keys() for part in self.parts])

    def labels(self) -> np.ndarray | None:
        """The classes of all parts, (n,); None if a part has none."""
        labels = [part.labels() for part in self.parts]
        return None if any(part is None for part in labels) else np.concatenate([part for part in labels if part is not None])

    def map(self, function: Callable[[Source], Source]) -> 'Mixture':
        """The mixture of the parts after `function`; a part without examples stays as it is."""
        parts = [function(part) if len(part) else part for part in self.parts]
        same = [len(part) for part in parts] == [len(part) for part in self.parts]  # else they are rows of another kind
        return Mixture(parts, self.weights, self.max_epochs, self.rows if same else None)

    def select(self, indices: np.ndarray) -> 'Mixture':
        """The mixture of what `indices` (m,) choose of each part."""
        indices = np.asarray(indices)
        owners = np.searchsorted(self._offsets, indices, side='right') - 1
        chosen = [indices[owners == k] - self._offsets[k] for k in range(len(self.parts))]
        parts = [Subset(part, places) for part, places in zip(self.parts, chosen, strict=True)]
        rows = None if self.rows is None else [own[places] for own, places in zip(self.rows, chosen, strict=True)]
        return Mixture(parts, self.weights, self.max_epochs, rows)

    def plan(self, batch_size: int, seed: int) -> 'MixturePlan':
        """The order of training over this mixture.

        Raises:
          UsageError: a part has no examples.
        """
        sizes = tuple(len(part) for part in self.parts)
        if 0 in sizes:
            raise UsageError(
                f'source {sizes.index(0)} of the mixture has no training examples', 'leave it out, or hold out less of it'
            )
        return MixturePlan(sizes, tuple(self.weights or sizes), self.max_epochs, batch_size, seed, self.rows)


def map_source(function: Callable[[Source], Source], source: Source) -> Source:
    """`function` applied to a source, or to every part of a mixture: how all transforms are applied."""
    return source.map(function) if isinstance(source, Mixture) else function(source)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of the stream with one table.

    Attributes:
      start: its first position.
      owners: the part of each place of a block, (L,).
      ranks: which of its part's examples in the block that place takes, (L,).
      counts: examples of each part in a block, (K,).
      consumed: examples that each part gave before this stage, (K,).
    """

    start: int
    owners: np.ndarray
    ranks: np.ndarray
    counts: np.ndarray
    consumed: np.ndarray


class MixturePlan:
    """The order of training over K parts; see the module.

    Attributes:
      length: positions until every part is exhausted; None: endless.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        max_epochs: Sequence[float | None],
        batch_size: int,
        seed: int,
        rows: Sequence[np.ndarray] | None = None,
    ):
        self.sizes, self.batch_size, self.seed, self.rows = tuple(sizes), batch_size, seed, rows
        limits = [None if cap is None else max(1, math.floor(cap * n)) for cap, n in zip(max_epochs, sizes, strict=True)]
        self.stages, self.length = _stages(_shares(weights), limits, batch_size)
        self._starts = np.array([stage.start for stage in self.stages])
        self._offsets = np.cumsum([0, *sizes])

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(indices, epochs, mask) of one step's global batch, each (B,): int64, int64, float32.

        Raises:
          UsageError: the mixture has no such step any more.
        """
        positions = step * self.batch_size + np.arange(self.batch_size)
        if self.length is not None and positions[-1] >= self.length:
            raise UsageError(
                f'the mixture ends after {self.length} examples ({self.length // self.batch_size} steps): every source has '
                'reached its max_epochs',
                'train for fewer steps, raise max_epochs, or set it to None for one source',
            )
        owners, places = self._locate(positions)
        indices, epochs = np.empty_like(positions), np.empty_like(positions)
        for owner in np.unique(owners):
            inside = owners == owner
            found = stream(places[inside], self.sizes[owner], seed_of(self.seed, int(owner)))
            indices[inside], epochs[inside] = found[0] + self._offsets[owner], found[1]
        return indices, epochs, np.ones(self.batch_size, np.float32)

    def unique(self, steps: int) -> int:
        """How many different examples the first `steps` steps hold; parts share those of the same number in `rows`."""
        position = steps * self.batch_size
        stage = self.stages[np.searchsorted(self._starts, position, side='right') - 1]
        blocks, rest = divmod(position - stage.start, len(stage.owners))
        given = stage.consumed + blocks * stage.counts + np.bincount(stage.owners[:rest], minlength=len(self.sizes))
        counts = np.minimum(given, self.sizes)  # (K,)
        if self.rows is None:
            return int(counts.sum())
        parts = enumerate(zip(self.rows, counts, self.sizes, strict=True))
        seen = [rows[stream(np.arange(count), size, seed_of(self.seed, k))[0]] for k, (rows, count, size) in parts]
        return len(np.unique(np.concatenate(seen)))

    def _locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part of each position and the place in that part's own stream, each (m,)."""
        owners, places = np.empty_like(positions), np.empty_like(positions)
        numbers = np.searchsorted(self._starts, positions, side='right') - 1
        for number in np.unique(numbers):
            inside, stage = numbers == number, self.stages[number]
            block, place = np.divmod(positions[inside] - stage.start, len(stage.owners))
            owner = stage.owners[place]
            owners[inside] = owner
            places[inside] = stage.consumed[owner] + block * stage.counts[owner] + stage.ranks[place]
        return owners, places


def _shares(weights: Sequence[float]) -> list[fractions.Fraction]:
    """Weights as fractions that add up to 1: 0.1 is taken for one tenth, not for the nearest double."""
    exact = [fractions.Fraction(weight).limit_denominator(10**9) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    if min(shares) < MIN_WEIGHT:
        raise UsageError(f'a source has a share of {float(min(shares)):.1e} of the mixture', f'give at least {MIN_WEIGHT}')
    return shares


def _stages(shares: list[fractions.Fraction], limits: list[int | None], batch_size: int) -> tuple[list[Stage], int | None]:
    """All stages, and the position at which the last one ends (None: never)."""
    stages: list[Stage] = []
    start, consumed = 0, np.zeros(len(shares), np.int64)
    left = [limit is None or limit > 0 for limit in limits]
    while any(left):
        counts = block_counts(
            [share if stays else fractions.Fraction(0) for share, stays in zip(shares, left, strict=True)], batch_size
        )
        owners, ranks = interleave(counts)
        stages.append(Stage(start, owners, ranks, counts, consumed))
        ends = [
            _end(owners, int(counts[k]), limit - int(consumed[k]), k)
            for k, limit in enumerate(limits)
            if left[k] and limit is not None
        ]
        if not ends:
            return stages, None
        blocks, rest = divmod(min(ends), len(owners))
        consumed = consumed + blocks * counts + np.bincount(owners[:rest], minlength=len(shares))
        left = [
            stays and (limit is None or consumed[k] < limit) for k, (stays, limit) in enumerate(zip(left, limits, strict=True))
        ]
        start += min(ends)
    return stages, start


def _end(owners: np.ndarray, count: int, remaining: int, part: int) -> int:
    """The position in a stage just behind the example with which a part has given `remaining` more."""
    blocks, rest = divmod(remaining - 1, count)
    return blocks * len(owners) + int(np.flatnonzero(owners == part)[rest]) + 1


def _common_spec(parts: Sequence[Source]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every key that all parts have."""
    specs = [spec_of(part) for part in parts]
    common = {key: spec for key, spec in specs[0].items() if all(key in other for other in specs)} if specs else {}
    for key, spec in common.items():
        differing = [other[key] for other in specs if other[key] != spec]
        if differing:
            raise UsageError(f'the sources of a mixture differ in {key!r}: {spec} and {differing[0]}', 'bring them to one form')
    if specs and not common:
        raise UsageError(f'the sources of a mixture have no key in common: {[sorted(s) for s in specs]}', 'mix like with like')
    return common
