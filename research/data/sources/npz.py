"""Arrays in one .npz file, as Keras, MedMNIST and `np.savez` users keep them.

Names that are understood: image or x, label or y (one split 'all'), alone or with a split before or behind it: x_train, y_test,
train_images, val_labels, ... Nothing is unpickled.

Shape letters: n examples, H height, W width, C channels, F features.

    np.savez('toy.npz', x_train=images, y_train=labels, x_test=..., y_test=...)      # uint8 (n, 28, 28), int (n,)
    npz(path='toy.npz').splits['train']                                             # 'image' (28, 28, 1), 'label' int32
"""

import pathlib
import re
import zipfile

import numpy as np

from research.core.errors import UsageError
from research.data.bad_records import DAMAGE, reading, reason_of
from research.data.source import ArraySource, DataSet, Source

SPLIT_WORDS = {'train': 'train', 'test': 'test', 'validation': 'validation', 'valid': 'validation', 'val': 'validation'}
INPUT_WORDS = ('image', 'images', 'x', 'features')
TARGET_WORDS = ('label', 'labels', 'y', 'target', 'targets')
KNOWN_NAMES = 'image and label, x and y, x_train and y_train, train_images and train_labels (test and validation alike)'


def npz(*, path: str) -> DataSet:
    """The arrays of one .npz file.

    Inputs (n, H, W) or (n, H, W, C) become 'image' uint8 (n, H, W, C); any integer type will do if the values are 0..255.
    Inputs (n, F) become 'features' float32. Targets (n,) or (n, 1): integers become classes, 'label' int32 with the numbers as
    names; floats become a regression target, 'label' float32.

    Raises:
      UsageError: no such file, not an .npz, a name or an array that fits none of the above, objects, lengths that differ.
    """
    file = pathlib.Path(path).expanduser()
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, array in _read_arrays(file).items():
        split, role = _meaning(file, name)
        if role in pairs.setdefault(split, {}):
            raise UsageError(f'{file} holds the {role} of split {split!r} twice, {name!r} is the second', 'keep one of them')
        pairs[split][role] = _as_image_or_features(file, name, array) if role == 'input' else _as_target(file, name, array)
    splits: dict[str, Source] = {split: _to_source(file, split, pair) for split, pair in sorted(pairs.items())}
    targets = [pair['target'] for pair in pairs.values()]
    if len({target.dtype for target in targets}) > 1:
        raise UsageError(f'{file} has integer targets in one split and floats in another', 'store them in one type')
    is_classes = targets[0].dtype == np.int32
    count = 1 + max(int(target.max(initial=0)) for target in targets)
    return DataSet(file.stem, splits, tuple(str(i) for i in range(count)) if is_classes else None)


def _read_arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise UsageError(f'there is no file {file}', 'correct path')
    if not zipfile.is_zipfile(file):
        raise UsageError(f'{file} is not an .npz file', 'write it with np.savez(PATH, x_train=..., y_train=...)')
    arrays = {}
    again = 'write or fetch it again'
    # Opened here, since np.load leaves a damaged file open.
    with reading(file, again), file.open('rb') as raw, np.load(raw, allow_pickle=False) as opened:
        for name in opened.files:
            try:
                arrays[name] = opened[name]
            except DAMAGE as error:
                reason = reason_of(error)
                raise UsageError(f'{file}: {name!r} cannot be read: {reason}', 'store numeric arrays only') from error
            if not isinstance(arrays[name], np.ndarray) or arrays[name].dtype.kind not in 'buif':
                raise UsageError(f'{file}: {name!r} is not an array of numbers', 'store numeric arrays only')
    if not arrays:
        raise UsageError(f'{file} holds no arrays', f'store {KNOWN_NAMES}')
    return arrays


def _meaning(file: pathlib.Path, name: str) -> tuple[str, str]:
    """The split and the role ('input' or 'target') that an array's name tells: 'x_train' -> ('train', 'input')."""
    words = re.split('[_-]', name.lower())
    splits = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
    inputs, targets = ([word for word in words if word in known] for known in (INPUT_WORDS, TARGET_WORDS))
    if len(splits) > 1 or len(inputs + targets) != 1 or len(words) != len(splits) + 1:
        raise UsageError(f'{file}: it is not clear what {name!r} is', f'name the arrays {KNOWN_NAMES}')
    return (splits[0] if splits else 'all'), ('input' if inputs else 'target')


def _as_image_or_features(file: pathlib.Path, name: str, array: np.ndarray) -> np.ndarray:
    """Uint8 (n, H, W, C) or float32 (n, F)."""
    if array.ndim == 2:
        bad = int((~np.isfinite(array)).any(axis=1).sum())
        if bad:
            raise UsageError(
                f'{file}: {bad} rows of {name!r} hold values that are not finite', 'fill them in or leave them out'
            )
        return array.astype(np.float32)
    if array.ndim not in (3, 4):
        raise UsageError(f'{file}: {name!r} has shape {array.shape}', 'inputs are (n, H, W), (n, H, W, C) or (n, F)')
    if array.dtype.kind not in 'ui' or (array.dtype != np.uint8 and (array.min(initial=0) < 0 or array.max(initial=0) > 255)):
        raise UsageError(f'{file}: images {name!r} are {array.dtype}, not bytes', 'store images as uint8, 0 to 255')
    return (array if array.ndim == 4 else array[..., None]).astype(np.uint8)  # (n, H, W, C)


def _as_target(file: pathlib.Path, name: str, array: np.ndarray) -> np.ndarray:
    """Int32 (n,) classes or float32 (n,) values."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]  # (n,)
    if array.ndim != 1:
        raise UsageError(
            f'{file}: targets {name!r} have shape {array.shape}', 'targets are (n,); use np.argmax on one-hot rows'
        )
    if array.dtype.kind == 'f':
        if not np.isfinite(array).all():
            raise UsageError(f'{file}: {int((~np.isfinite(array)).sum())} values of {name!r} are not finite', 'leave them out')
        return array.astype(np.float32)
    if array.min(initial=0) < 0:
        raise UsageError(f'{file}: {name!r} holds the class {array.min()}', 'number the classes 0, 1, ...')
    return array.astype(np.int32)


def _to_source(file: pathlib.Path, split: str, pair: dict[str, np.ndarray]) -> ArraySource:
    if set(pair) != {'input', 'target'}:
        missing = 'target' if 'input' in pair else 'input'
        raise UsageError(f'{file} has no {missing} for split {split!r}', f'name the arrays {KNOWN_NAMES}')
    inputs, targets = pair['input'], pair['target']
    if len(inputs) != len(targets):
        raise UsageError(f'{file}: split {split!r} has {len(inputs)} inputs, but {len(targets)} targets', 'pair them')
    arrays = {'features' if inputs.ndim == 2 else 'image': inputs, 'label': targets}
    return ArraySource(arrays, label='label' if targets.dtype == np.int32 else None)
