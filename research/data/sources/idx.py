"""Folders in MNIST's format: MNIST, Fashion-MNIST, KMNIST and whatever else is stored as four IDX files.

An IDX file is a header (two zero bytes, a type code, the number of axes, each axis as a big-endian 32-bit number) and then the
values, big-endian. 60,000 images of 28x28: 00 00 08 03, 00 00 ea 60, 00 00 00 1c, 00 00 00 1c, 47,040,000 bytes.

Shape letters: n examples, H height, W width.

    idx(dir='/usr/share/datasets/fashion-mnist').splits['train']       # 60,000 x {'image': uint8 (28, 28, 1), 'label': int32}
"""

import gzip
import math
import pathlib
import struct
import zlib

import numpy as np

from research.core.errors import UsageError
from research.data.source import ArraySource, DataSet

SPLITS = {'train': 'train', 'test': 't10k'}  # our name: the files' prefix
DTYPES = {0x08: 'u1', 0x09: 'i1', 0x0B: '>i2', 0x0C: '>i4', 0x0D: '>f4', 0x0E: '>f8'}
DEBIAN_DIR = '/usr/share/datasets/fashion-mnist'
FASHION_MNIST = (
    'T-shirt/top',
    'Trouser',
    'Pullover',
    'Dress',
    'Coat',
    'Sandal',
    'Shirt',
    'Sneaker',
    'Bag',
    'Ankle boot',
)


def idx(*, dir: str, class_names: tuple[str, ...] | None = None) -> DataSet:  # noqa: A002  the config's word
    """The splits 'train' and 'test' of a folder of IDX files: 'image' uint8 (H, W, 1), 'label' int32.

    Args:
      dir: holds {train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte, plain or with .gz.
      class_names: names of the classes 0, 1, ...; None: Fashion-MNIST's in a folder of that name, else the numbers.

    Raises:
      UsageError: a file is missing, damaged or does not fit the others; fewer names than classes.
    """
    folder = pathlib.Path(dir).expanduser()
    if not folder.is_dir():
        debian = str(folder) == DEBIAN_DIR
        raise UsageError(
            f'there is no folder {folder}',
            'install the Debian package dataset-fashion-mnist (apt-get install dataset-fashion-mnist)'
            if debian
            else 'correct dir',
        )
    arrays = {split: _read_split(folder, prefix) for split, prefix in SPLITS.items()}
    classes = 1 + max(int(labels.max(initial=0)) for _, labels in arrays.values())
    if class_names is None:
        is_fashion = folder.name.lower().replace('_', '-') == 'fashion-mnist'
        class_names = FASHION_MNIST if is_fashion else tuple(str(i) for i in range(classes))
    if len(class_names) < classes:
        raise UsageError(
            f'class_names has {len(class_names)} names, but {folder} has labels up to {classes - 1}', 'name every class'
        )
    splits = {
        split: ArraySource({'image': images[..., None], 'label': labels.astype(np.int32)})  # (n, H, W, 1)
        for split, (images, labels) in arrays.items()
    }
    return DataSet(folder.name, dict(splits), tuple(class_names))


def read_idx(path: pathlib.Path) -> np.ndarray:
    """The array of one IDX file, plain or gzipped (told apart by content, not by name), in native byte order.

    Raises:
      UsageError: not an IDX file, or its length is not what its header says.
    """
    fix = f'fetch {path.name} again'
    try:
        with path.open('rb') as file:
            is_gzip = file.read(2) == b'\x1f\x8b'
        with gzip.open(path) if is_gzip else path.open('rb') as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b'\0\0' or magic[2] not in DTYPES or magic[3] == 0:
                raise UsageError(f'{path} is not an IDX file: it begins with {magic.hex(" ")}', fix)
            header = file.read(4 * magic[3])
            if len(header) < 4 * magic[3]:
                raise UsageError(f'{path} ends inside its header', fix)
            shape, dtype = struct.unpack(f'>{magic[3]}I', header), np.dtype(DTYPES[magic[2]])
            size = math.prod(shape) * dtype.itemsize
            data = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f'{path} is damaged: {error}', fix) from error
    if len(data) != size:
        raise UsageError(f'{path} announces {shape}, {size} bytes of values, but holds {len(data)}', fix)
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder('='), copy=False)


def _read_split(folder: pathlib.Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, H, W) uint8 and labels (n,) uint8 of one split."""
    images_path, labels_path = (_find(folder, f'{prefix}-{kind}-ubyte') for kind in ('images-idx3', 'labels-idx1'))
    images, labels = read_idx(images_path), read_idx(labels_path)
    for path, array, axes in ((images_path, images, 3), (labels_path, labels, 1)):
        if array.ndim != axes or array.dtype != np.uint8:
            raise UsageError(f'{path} holds {array.dtype} {array.shape}', f'it must hold unsigned bytes with {axes} axes')
    if len(images) != len(labels):
        raise UsageError(
            f'{images_path} has {len(images)} images, but {labels_path} has {len(labels)} labels', 'pair the files'
        )
    return images, labels


def _find(folder: pathlib.Path, name: str) -> pathlib.Path:
    for path in (folder / name, folder / f'{name}.gz'):
        if path.is_file():
            return path
    raise UsageError(f'{folder} has neither {name} nor {name}.gz', 'it must hold the four files of the MNIST format')
