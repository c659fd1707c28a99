"""Any data set of TensorFlow Datasets (TFDS), read and where possible prepared without TensorFlow.

A data set that is prepared under `data_dir` in the array_record format is read at random access. One that is not is prepared
once: the MNIST and CIFAR families always, others if their builder's own code does without TensorFlow.

Shape letters: n examples, B examples of a block, H height, W width, C channels.

    tfds(dataset='cifar10').splits['test'][np.array([0, 9])]   # {'image': uint8 (2, 32, 32, 3), 'label': int32 (2,)}
"""

import contextlib
import functools
import importlib
import io
import os
import pathlib
from concurrent import futures
from typing import Any

import numpy as np

from research.core.errors import UsageError, nearest
from research.data.bad_records import DAMAGE, BadRecordError, filled, reading, reason_of, salvage
from research.data.source import ArraySource, Block, DataSet, Source, key_of, shapes_of
from research.data.sources import tfds_readers
from research.data.sources.image_folder import bad_image, decode_image

MAX_BYTES_IN_MEMORY = 10**9
CHUNK = 64  # images per task of a thread: decoding small ones takes less time than handing them over
READ = 4096  # examples per read when a whole split is decoded


def tfds(
    *,
    dataset: str,
    data_dir: str | None = None,
    download: bool = True,
    image_size: int | None = None,
    in_memory: bool | None = None,
    workers: int = 8,
) -> DataSet:
    """A TFDS data set with all its splits.

    The image is 'image' uint8 (H, W, C), the class 'label' int32. Other features are kept if they are numbers of a fixed shape
    and left out otherwise (text, sequences, further images).

    In memory, the key of an example is the hash of its decoded contents; otherwise it is the hash of its place (data set,
    version, split, index), which is the same wherever TFDS prepares that version, but does not show two equal examples.

    Args:
      dataset: a TFDS name, 'cifar10', 'emnist/letters' or 'name/config:version'.
      data_dir: where prepared data sets are; None: $TFDS_DATA_DIR or ~/tensorflow_datasets.
      download: whether a data set that is not there may be downloaded and prepared.
      image_size: scale the shorter side to it and cut out the centre; needed if the images vary in size. In pixels.
      in_memory: decode everything once and keep it; None: if all splits together take at most 1 GB.
      workers: threads that decode images.

    Raises:
      UsageError: unknown name, no network, not prepared, prepared in a format without random access, or no usable feature.
      BadRecordError: (when it is read; in memory too) a record whose shard is damaged or whose image cannot be decoded.
    """
    builder = _builder(dataset, data_dir)
    if not builder.is_prepared():
        if not download:
            raise UsageError(f'{dataset} is not prepared in {builder.data_dir_root}', 'set download=True or correct data_dir')
        tfds_readers.prepare(builder)
        builder = _builder(dataset, data_dir)
    names = [name for name, split in builder.info.splits.items() if split.num_examples]
    sources = {name: TfdsSource(builder, name, image_size, workers) for name in names}
    if in_memory is None:
        in_memory = sum(len(source) * source.example_bytes for source in sources.values()) <= MAX_BYTES_IN_MEMORY
    splits: dict[str, Source] = {name: load(source) if in_memory else source for name, source in sources.items()}
    label = _label(builder)
    is_classes = _is_class(label) and label.num_classes
    return DataSet(builder.name, splits, tuple(label.names) if is_classes else None)


class TfdsSource:
    """Random access to one split of a prepared builder."""

    def __init__(self, builder: Any, split: str, image_size: int | None, workers: int):
        from tensorflow_datasets import decode

        self.split, self.image_size, self.workers = split, image_size, workers
        self._folder, self._full_name = pathlib.Path(builder.data_path), builder.info.full_name
        self._fields = fields_of(builder, image_size)
        self.has_classes = _is_class(_label(builder))
        with reading(self._folder / 'dataset_info.json'):
            shards = builder.info.splits[split].file_instructions
        self._shards = [(pathlib.Path(s.filename), s.skip, s.examples_in_shard) for s in shards]
        self._ends = np.cumsum([s.take for s in shards])
        self._lost: dict[int, str | None] = {}  # by shard that was looked at: why none of its records can be trusted
        images = [name for name, feature in builder.info.features.items() if _is_image(feature)]
        try:
            self._records = builder.as_data_source(split, decoders={name: decode.SkipDecoding() for name in images})
        except NotImplementedError as error:
            raise UsageError(
                f'{builder.name} is prepared in {builder.data_path} as {builder.info.file_format.value}, without random access',
                'run once where TensorFlow is installed: tfds convert_format '
                f'--dataset_version_dir={builder.data_path} --out_file_format=array_record',
            ) from error

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, indices: np.ndarray) -> Block:
        records = self._read(indices)
        block = {}
        for name, (shape, dtype) in self._fields.items():
            values = [record[name] for record in records]
            if name == 'image':
                values = self._decode(values, indices, shape)
            block[name] = np.array(values, dtype).reshape(len(records), *shape)
        return block

    @property
    def example_bytes(self) -> int:
        """The size of one decoded example."""
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._fields.values())

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        return np.array([key_of(f'{self._full_name}/{self.split}/{i}') for i in range(len(self))], np.uint64)

    def keys(self) -> np.ndarray:
        """The hash of each example's place, (n,) uint64."""
        return self._keys

    @functools.cached_property
    def _labels(self) -> np.ndarray:
        """Read once from all records, images left encoded, and kept beside them: for ImageNet that is 150 GB to go through."""
        path = self._folder / f'fulcrum-labels-{self.split}.npy'
        kept = _kept_labels(path)
        if kept is not None and kept.shape == (len(self),):
            return kept
        ranges = np.array_split(np.arange(len(self)), -(-len(self) // READ))
        labels = np.concatenate([self.label_block(r)['label'] for r in ranges])
        if os.access(self._folder, os.W_OK):
            temporary = path.with_name(f'.{os.getpid()}.{path.name}')
            np.save(temporary, labels)
            os.replace(temporary, path)
        return labels

    def labels(self) -> np.ndarray | None:
        """The class of each example, (n,) int32; None if 'label' is not a class."""
        return self._labels if self.has_classes else None

    def label_block(self, indices: np.ndarray) -> Block:
        """'label' (B,) int32 of the records at `indices`, without decoding their images."""
        return {'label': np.array([record['label'] for record in self._read(indices)], np.int32)}

    def _read(self, indices: np.ndarray) -> list[dict[str, Any]]:
        """The records at `indices` (B,), images left encoded."""
        wanted = [int(i) for i in indices]
        self._check_shards(wanted)
        try:
            return self._records.__getitems__(wanted)
        except _damage() as error:
            for index in wanted:  # array_record does not say which
                try:
                    self._records.__getitems__([index])
                except _damage() as own:
                    raise BadRecordError(*self._place(index), reason_of(own)) from own
            raise BadRecordError(*self._place(wanted[0]), reason_of(error)) from error

    def _place(self, index: int) -> tuple[pathlib.Path, int]:
        """The shard of an example and its number there."""
        shard = int(np.searchsorted(self._ends, index, side='right'))
        path, skipped, _ = self._shards[shard]
        return path, index - (int(self._ends[shard - 1]) if shard else 0) + skipped

    def _check_shards(self, indices: list[int]) -> None:
        """Raises the error of the first example whose shard holds less than it should: array_record may give empty ones."""
        for index, shard in zip(indices, np.searchsorted(self._ends, indices, side='right').tolist(), strict=True):
            if shard not in self._lost:
                self._lost[shard] = _problem(self._shards[shard][0], self._shards[shard][2])
            if (reason := self._lost[shard]) is not None:
                raise BadRecordError(*self._place(index), reason)

    def _decode_one(self, data: bytes, index: int, shape: tuple[int, ...]) -> np.ndarray:
        with bad_image(*self._place(index), 'it'):
            image = decode_image(io.BytesIO(data), self.image_size, shape[-1], 'it', orient=False)
        if image.shape != shape:
            raise BadRecordError(*self._place(index), f'its image is {image.shape}, not {shape}')
        return image

    def _decode(self, encoded: list[bytes], indices: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
        chunk = max(1, min(CHUNK, len(encoded) // self.workers))
        starts = range(0, len(encoded), chunk)

        def decode_chunk(start: int) -> list[np.ndarray]:
            rows = slice(start, start + chunk)
            return [self._decode_one(data, int(i), shape) for data, i in zip(encoded[rows], indices[rows], strict=True)]

        with futures.ThreadPoolExecutor(self.workers) as pool:
            return [image for images in pool.map(decode_chunk, starts) for image in images]


def load(source: TfdsSource) -> ArraySource:
    """The whole split, decoded, in memory. A `Loaded` if some of it cannot be read.

    Raises:
      BadRecordError: nothing of it can be read.
    """
    ranges = np.array_split(np.arange(len(source)), -(-len(source) // READ))
    read = [salvage(source.__getitem__, r) for r in ranges]
    errors = {index: error for _, found in read for index, error in found.items()}
    blocks = [block for block, _ in read if block is not None]
    if not blocks:
        raise next(iter(errors.values()))
    arrays = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    label = 'label' if source.has_classes else None
    return Loaded(arrays, label, errors) if errors else ArraySource(arrays, label)


class Loaded(ArraySource):
    """Arrays in memory of which some rows could not be read: those are zero, with label -1, and raise their `errors`."""

    def __init__(self, arrays: dict[str, np.ndarray], label: str | None, errors: dict[int, BadRecordError]):
        good = next(iter(arrays.values()))
        bad = np.isin(np.arange(len(good) + len(errors)), list(errors))  # (n,)
        arrays = filled(arrays, bad, shapes_of(arrays))
        if label is not None:
            arrays[label][bad] = -1
        super().__init__(arrays, label)
        self.errors = errors

    def __getitem__(self, indices: np.ndarray) -> Block:
        for index in np.asarray(indices).tolist():
            if index in self.errors:
                raise self.errors[index].bare()
        return super().__getitem__(indices)


def fields_of(builder: Any, image_size: int | None) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of what is kept of one example, by feature.

    Raises:
      UsageError: nothing but labels would be kept, the images are not bytes, or they vary in size and `image_size` is None.
    """
    fields: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for name, feature in sorted(builder.info.features.items()):  # TFDS's own order changes from run to run
        if name == 'image' and _is_image(feature):
            fields[name] = (_image_shape(builder.name, feature, image_size), np.dtype(np.uint8))
        elif not _is_image(feature):
            fields |= _number_field(name, feature)
    if not any(not _is_class(builder.info.features[name]) and name != 'label' for name in fields):
        raise UsageError(
            f'{builder.name} has neither images nor numbers of a fixed shape, only {", ".join(sorted(builder.info.features))}',
            'use a data set with a feature called image, or write a source of your own (package.module:Thing)',
        )
    return fields


def _image_shape(name: str, feature: Any, image_size: int | None) -> tuple[int, ...]:
    height, width, channels = feature.shape
    if np.dtype(feature.np_dtype) != np.uint8:
        raise UsageError(f'the images of {name} are {np.dtype(feature.np_dtype)}', 'only images of 8 bits a channel are read')
    if image_size is not None:
        height = width = image_size
    if height is None or width is None:
        raise UsageError(
            f'the images of {name} vary in size', 'set image_size, for example --config.data.source.image_size=224'
        )
    return height, width, channels or 3


def _number_field(name: str, feature: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The field of a feature that is a number or an array of a fixed shape; empty for others."""
    info = feature.get_tensor_info()
    if isinstance(info, (dict, list)) or None in info.shape or np.dtype(info.np_dtype).kind not in 'buif':
        return {}
    dtype = np.dtype(info.np_dtype)
    if _is_class(feature):
        dtype = np.dtype(np.int32)
    elif name == 'label' or dtype == np.float64:
        dtype = np.dtype(np.float32)
    return {name: (tuple(info.shape), dtype)}


def _label(builder: Any) -> Any:
    features = builder.info.features
    return features['label'] if 'label' in features else None  # noqa: SIM401  it has no get


def _is_image(feature: Any) -> bool:
    from tensorflow_datasets import features

    return isinstance(feature, features.Image)


def _is_class(feature: Any) -> bool:
    from tensorflow_datasets import features

    return isinstance(feature, features.ClassLabel)


def _kept_labels(path: pathlib.Path) -> np.ndarray | None:
    """The labels that an earlier run left, unless they are damaged."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def _problem(path: pathlib.Path, expected: int) -> str | None:
    """Why a shard cannot hold the `expected` records; None if it may, or if reading it says so by itself."""
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue] - built from C++

    try:
        reader = array_record_module.ArrayRecordReader(str(path), options='readahead_buffer_size:0')
        count = reader.num_records()
    except RuntimeError as error:
        return reason_of(error)
    with contextlib.suppress(RuntimeError):  # of a file that it made nothing of it says so here, without a word
        reader.close()
    return None if count == expected else f'the shard holds {count} records, not {expected}'


def _damage() -> tuple[type[Exception], ...]:
    """What array_record and TFDS raise on damaged records."""
    return *DAMAGE, _protobuf('message').DecodeError


def _protobuf(module: str) -> Any:
    """A module of protobuf, which TFDS brings; `google` is a name that many packages share."""
    return importlib.import_module(f'google.protobuf.{module}')


def _builder(dataset: str, data_dir: str | None) -> Any:
    """The TFDS builder of a name; it reads no data and uses no network."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming, registered

    try:
        if naming.parse_builder_name_kwargs(dataset)[0].namespace:
            raise UsageError(
                f'TFDS community data set {dataset!r} would run code from elsewhere', "use a data set of TFDS's own, or a file"
            )
        return tfds.builder(dataset, data_dir=None if data_dir is None else os.path.expanduser(data_dir))
    except registered.DatasetNotFoundError as error:
        word = dataset.partition('/')[0].partition(':')[0]
        known = nearest(word, tfds.list_builders(with_community_datasets=False))
        raise UsageError(f'TFDS has no data set {dataset!r}', known) from error
    # No such config, no such version, needs a package, a damaged dataset_info.json.
    except (ValueError, TypeError, LookupError, AssertionError, ImportError, _protobuf('json_format').ParseError) as error:
        reason = str(error).partition('\n')[0].rpartition('}": ')[2]
        raise UsageError(
            f'TFDS cannot open {dataset!r}: {reason}', "write 'name', 'name/config' or 'name/config:version'"
        ) from error
