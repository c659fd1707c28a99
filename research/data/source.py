"""What a data set is: named splits of random-access sources that are read in blocks.

Shape letters: n examples of a source, B indices of one block.

    data = digits()
    data.splits['all'][np.array([3, 1])]        # {'image': uint8 (2, 8, 8, 1), 'label': int32 (2,)}
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from research.core import files

Block = dict[str, np.ndarray]


class Source(Protocol):
    """Random access to n examples, a block at a time; never one Python call an example where it can be helped."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> Block:
        """The examples at `indices` (B,) int: a dict of arrays with leading axis B (images as uint8, NHWC)."""
        ...

    def keys(self) -> np.ndarray:
        """A stable hash of each example, (n,) uint64: the same on every machine; splits and budgets are made from it."""
        ...

    def labels(self) -> np.ndarray | None:
        """The class of each example, (n,) int, for stratified subsets and class weights; None if there are no classes."""
        ...


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Splits by name ('train', 'test', 'validation', or one 'all' that is still to be split) and the names of the classes."""

    name: str
    splits: dict[str, Source]
    class_names: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a task must know of the data: shape and dtype of one example, and its classes.

    Attributes:
      examples: for each key of a batch the (shape, dtype) of one example, without the batch axis.
      class_names: the names of the classes; None for regression.
      class_counts: examples of each class in the training split; None without classes.
    """

    examples: dict[str, tuple[tuple[int, ...], np.dtype]]
    class_names: tuple[str, ...] | None = None
    class_counts: tuple[int, ...] | None = None

    @property
    def num_classes(self) -> int | None:
        """How many classes there are; None for regression."""
        return None if self.class_names is None else len(self.class_names)


class ArraySource:
    """Arrays in memory that share a leading axis n. The hash of an example covers the bytes of all its arrays."""

    def __init__(self, arrays: Mapping[str, np.ndarray], label: str | None = 'label'):
        lengths = {key: len(value) for key, value in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f'arrays of one source must share their leading axis, got {lengths}')
        self.arrays = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
        self._length = next(iter(lengths.values()))
        self._label = label if label in self.arrays else None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, indices: np.ndarray) -> Block:
        return {key: value[indices] for key, value in self.arrays.items()}

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        rows = [np.asarray(a).reshape(self._length, -1).view(np.uint8) for _, a in sorted(self.arrays.items())]
        return np.array([key_of(b''.join(row[i].tobytes() for row in rows)) for i in range(self._length)], np.uint64)

    def keys(self) -> np.ndarray:
        """A hash of each example's bytes, (n,) uint64: equal examples share it, so a split by hash never separates them."""
        return self._keys

    def labels(self) -> np.ndarray | None:
        """The label array, (n,); None without one."""
        return self.arrays[self._label] if self._label else None


class Subset:
    """The examples of `source` at `indices` (m,), in that order."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, np.asarray(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: np.ndarray) -> Block:
        return self.source[self.indices[indices]]

    def keys(self) -> np.ndarray:
        """Hashes of the chosen examples, (m,) uint64."""
        return self.source.keys()[self.indices]

    def labels(self) -> np.ndarray | None:
        """Classes of the chosen examples, (m,)."""
        labels = self.source.labels()
        return None if labels is None else labels[self.indices]


def key_of(data: bytes | str) -> int:
    """The stable 64-bit hash of one example's bytes (or of the name of its file)."""
    return int(files.digest([data], length=8), 16)


def fingerprint(source: Source) -> str:
    """A fingerprint of all examples of a source in their order."""
    return files.digest([source.keys().astype('<u8').tobytes()])


def example_spec(source: Source) -> dict[str, tuple[tuple[int, ...], Any]]:
    """The (shape, dtype) of one example by key."""
    return {key: (value.shape[1:], value.dtype) for key, value in source[np.array([0])].items()}
