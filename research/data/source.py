"""What a data set is: named splits of random-access sources that are read in blocks.

Shape letters: n examples of a source, B indices of one block.

    data = digits()
    data.splits['all'][np.array([3, 1])]        # {'image': uint8 (2, 8, 8, 1), 'label': int32 (2,)}
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from research.core import files
from research.core.errors import UsageError

Block = dict[str, np.ndarray]
Shapes = dict[str, tuple[tuple[int, ...], Any]]  # (shape, dtype) of one example by key


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


class Tokenizer(Protocol):
    """Between text and token ids. Special tokens that it does not have are None.

    Attributes:
      vocabulary_size: V; ids are 0 ... V - 1.
      byte_lengths: (V,) int32, how many bytes of UTF-8 each token stands for; 0 for special tokens.
      fingerprint: a digest of its whole definition.
    """

    vocabulary_size: int
    byte_lengths: np.ndarray
    fingerprint: str
    pad: int | None
    bos: int | None
    eos: int | None
    unknown: int | None
    mask: int | None
    cls: int | None
    sep: int | None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, (T,) int32, without special tokens."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; special tokens are left out."""
        ...

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes what is needed to make it again into `folder`."""
        ...


@contextlib.contextmanager
def naming(split: str) -> Iterator[None]:
    """Puts the name of the split before a `UsageError` that is raised inside."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f'split {split!r}: {error.message}', error.fix) from error


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Splits of examples, and what is known of them.

    Attributes:
      name: what it is called.
      splits: 'train', 'test', 'validation', or one 'all' that is still to be split.
      class_names: the names of the classes; None for data without any.
      tokenizer: between text and token ids; None as long as there is none.
      cardinalities: for each column of 'category' how many values it can have.
      unlabelled: training draws so many examples without label for each labelled one; None: no label is hidden.
    """

    name: str
    splits: dict[str, Source]
    class_names: tuple[str, ...] | None = None
    tokenizer: Tokenizer | None = None
    cardinalities: tuple[int, ...] = ()
    unlabelled: int | None = None

    def map(self, function: Callable[[Source], Source], **changes: Any) -> 'DataSet':
        """The data set with `function` applied to every split, and other `changes`; its `UsageError` names the split."""
        splits = {}
        for name, source in self.splits.items():
            with naming(name):
                splits[name] = function(source)
        return dataclasses.replace(self, splits=splits, **changes)


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a task must know of the data: shape and dtype of one example, and its classes.

    Attributes:
      examples: for each key of a batch the (shape, dtype) of one example, without the batch axis.
      class_names: the names of the classes; None for regression.
      class_counts: examples of each class in the training split; None without classes.
      tokenizer: between text and token ids; None for data that are no text.
      cardinalities: for each column of 'category' how many values it can have.
      example_tokens: tokens of a training example, padding left out, on average; None for data that are no text.
      unlabelled: training draws so many examples without label for each labelled one; None: no label is hidden.
    """

    examples: Shapes
    class_names: tuple[str, ...] | None = None
    class_counts: tuple[int, ...] | None = None
    tokenizer: Tokenizer | None = None
    cardinalities: tuple[int, ...] = ()
    example_tokens: float | None = None
    unlabelled: int | None = None

    @property
    def num_classes(self) -> int | None:
        """How many classes there are; None for regression."""
        return None if self.class_names is None else len(self.class_names)


class ArraySource:
    """Arrays in memory that share a leading axis n; text is an object array of str. All arrays count for an example's hash."""

    def __init__(self, arrays: Mapping[str, np.ndarray], label: str | None = 'label'):
        lengths = {key: len(value) for key, value in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f'arrays of one source must share their leading axis, got {lengths}')
        self.arrays = {key: np.ascontiguousarray(value) for key, value in arrays.items()}  # (n, ...)
        self._length = next(iter(lengths.values()))
        self._label = label if label in self.arrays else None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, indices: np.ndarray) -> Block:
        return {key: value[indices] for key, value in self.arrays.items()}

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        columns = [_as_bytes(array) for _, array in sorted(self.arrays.items())]
        return np.array([key_of(b''.join(parts)) for parts in zip(*columns, strict=True)], np.uint64)

    def keys(self) -> np.ndarray:
        """A hash of each example's bytes, (n,) uint64: equal examples share it, so a split by hash never separates them."""
        return self._keys

    def labels(self) -> np.ndarray | None:
        """The label array, (n,); None without one."""
        return self.arrays[self._label] if self._label else None


def _as_bytes(array: np.ndarray) -> list[bytes]:
    """The bytes of each row of an array (n, ...); of a text (n,) its UTF-8 behind its length."""
    if array.dtype == object:
        encoded = [text.encode() for text in array]
        return [len(data).to_bytes(8, 'little') + data for data in encoded]
    rows = array.reshape(len(array), -1).view(np.uint8)
    return [row.tobytes() for row in rows]


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


def select(source: Source, indices: np.ndarray) -> Source:
    """The examples at `indices` (m,): what the source's own `select` gives (a mixture stays one), else a `Subset`."""
    own = getattr(source, 'select', None)
    return Subset(source, indices) if own is None else own(indices)


def key_of(data: bytes | str) -> int:
    """The stable 64-bit hash of one example's bytes (or of the name of its file)."""
    return int(files.digest([data], length=8), 16)


def fingerprint(source: Source) -> str:
    """A fingerprint of all examples of a source in their order."""
    return files.digest([source.keys().astype('<u8').tobytes()])


def example_spec(source: Source) -> Shapes:
    """The (shape, dtype) of one example by key."""
    return shapes_of(source[np.array([0])])


def shapes_of(block: Block) -> Shapes:
    """The (shape, dtype) of one example of a block by key."""
    return {key: (value.shape[1:], value.dtype) for key, value in block.items()}


def kinds_of(source: Any, spec: DataSpec) -> list[tuple[float, Shapes]]:
    """The shapes of a row that training draws, each with its share of the batches: several in buckets, else those of `spec`."""
    own = getattr(source, 'kinds', None)
    return [(1.0, spec.examples)] if own is None else own()
