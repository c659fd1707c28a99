"""Folders of image files, one folder a class: the format people's own photographs come in.

    dir/train/cat/1.jpg  dir/train/dog/2.png  dir/test/cat/3.webp         splits 'train' and 'test' (and 'validation' or 'val')
    dir/cat/1.jpg  dir/dog/2.png                                          one split 'all'

Files are decoded when they are asked for, a block at a time by a small pool of threads. Shape letters: n images, B images of a
block, C channels.

    image_folder(dir='pets', image_size=32).splits['train'][np.array([0, 7])]  # {'image': uint8 (2, 32, 32, 3), 'label': (2,)}
"""

import contextlib
import functools
import io
import os
import pathlib
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from research.core.errors import UsageError
from research.data.bad_records import DAMAGE, BadRecordError, reason_of
from research.data.source import Block, DataSet, Source, key_of

SPLITS = {'train': 'train', 'test': 'test', 'validation': 'validation', 'val': 'validation'}  # folder: split
SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # Pillow's names by number of channels


def image_folder(*, dir: str, image_size: int, channels: int = 3, workers: int = 8) -> DataSet:  # noqa: A002
    """A folder of images with one folder a class: 'image' uint8 (image_size, image_size, channels), 'label' int32.

    Each image is turned as its EXIF orientation says, its shorter side is scaled to `image_size` (bilinear with antialiasing)
    and the centre is cut out. Classes are the folders' names in sorted order.

    The key of an example is the hash of its path below `dir`: the contents are not read for it, so two copies of one image
    under two names have two keys.

    Args:
      dir: the folder; see the module for its two layouts.
      image_size: height and width of the result, in pixels.
      channels: 3 (colour), 1 (grey) or 4 (colour and alpha). Transparency becomes white for 1 and 3.
      workers: threads that decode one block; Pillow decodes outside Python's lock. The result does not depend on them.

    Raises:
      UsageError: no such folder, no images, a class without images, splits with different classes.
      BadRecordError: (when an example is read) a file that is not an image Pillow can decode.
    """
    if channels not in MODES or image_size < 1 or workers < 1:
        raise UsageError(
            f'image_folder(image_size={image_size}, channels={channels}, workers={workers}) is out of range',
            'image_size and workers are at least 1, channels is 1, 3 or 4',
        )
    root = pathlib.Path(dir).expanduser()
    if not root.is_dir():
        raise UsageError(f'there is no folder {root}', 'correct dir')
    parts = {SPLITS[p.name]: p for p in _folders(root) if p.name in SPLITS and _folders(p)} or {'all': root}
    listed = {split: _list_classes(folder) for split, folder in parts.items()}
    class_names = _common_classes(listed, parts)
    splits: dict[str, Source] = {
        split: ImageFolder(
            root, [path for paths in classes.values() for path in paths], class_names, image_size, channels, workers
        )
        for split, classes in listed.items()
    }
    return DataSet(root.resolve().name, splits, class_names)


class ImageFolder:
    """Random access to image files `paths`, each in the folder of its class. Pickles, so a worker process can hold one."""

    def __init__(
        self,
        root: pathlib.Path,
        paths: Sequence[pathlib.Path],
        class_names: Sequence[str],
        image_size: int,
        channels: int,
        workers: int,
    ):
        self.root, self.paths = root, list(paths)
        self._image_size, self._channels, self._workers = image_size, channels, workers
        number = {name: i for i, name in enumerate(class_names)}
        self._labels = np.array([number[path.parent.name] for path in self.paths], np.int32)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: np.ndarray) -> Block:
        images = np.empty((len(indices), self._image_size, self._image_size, self._channels), np.uint8)

        def read(place: int) -> None:
            images[place] = self._read(indices[place])  # while it is in the cache

        with futures.ThreadPoolExecutor(self._workers) as pool:  # one per block: 0.3 ms, and no threads that outlive it
            for _ in pool.map(read, range(len(indices))):  # raises the first error, in the order of `indices`
                pass
        return {'image': images, 'label': self._labels[indices]}

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        return np.array([key_of(path.relative_to(self.root).as_posix()) for path in self.paths], np.uint64)

    def keys(self) -> np.ndarray:
        """The hash of each file's path below the root, (n,) uint64."""
        return self._keys

    def labels(self) -> np.ndarray:
        """The class of each file, (n,) int32."""
        return self._labels

    def _read(self, index: int) -> np.ndarray:
        path = self.paths[index]
        with bad_image(path, index, str(path)):
            return decode_image(path, self._image_size, self._channels, str(path))


@contextlib.contextmanager
def bad_image(shard: str | os.PathLike[str], record: int, what: str) -> Iterator[None]:
    """Turns the `UsageError` of `decode_image`, which called it `what`, into that of a bad record."""
    try:
        yield
    except UsageError as error:
        raise BadRecordError(shard, record, error.message.removeprefix(f'{what} ')) from error


def decode_image(
    file: str | os.PathLike[str] | io.BytesIO, size: int | None, channels: int, what: str, orient: bool = True
) -> np.ndarray:
    """An image file as uint8 (size, size, channels): orientation applied, shorter side scaled, centre cut out.

    Args:
      file: a path or the encoded bytes.
      size: in pixels; None leaves the image as it is, (H, W, channels).
      channels: 1, 3 or 4.
      what: how an error names the image.
      orient: turn it as its EXIF orientation says.

    Raises:
      UsageError: Pillow cannot decode it, or it has more than 8 bits a channel.
      OSError: the file system does not let it be read: the image may be sound.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            if size is not None:
                opened.draft(None, (size, size))  # JPEG only: decode at 1/2, 1/4 or 1/8 where that is still large enough
            image = ImageOps.exif_transpose(opened) if orient and opened.getexif() else opened
            if image.mode[0] in 'IF':
                raise UsageError(f'{what} has more than 8 bits a channel (mode {image.mode})', 'convert it to 8 bits')
            image = _with_mode(image, MODES[channels])
            if size is not None and image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
            return np.asarray(image).reshape(image.height, image.width, channels)
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise UsageError(f'{what} cannot be decoded: {reason_of(error)}', 'remove it or replace it') from error


def _with_mode(image: Any, mode: str) -> Any:
    """`image` in Pillow's `mode`; transparent pixels become white where the mode has no alpha."""
    from PIL import Image

    if image.mode == mode:
        image.load()
        return image
    if mode != 'RGBA' and image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert(mode)


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith('.'))


def _list_classes(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Sorted image files by class, classes sorted by name."""
    found = {
        child.name: sorted(p for p in child.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith('.'))
        for child in _folders(folder)
    }
    if not any(found.values()):
        raise UsageError(f'{folder} holds no images', f'put them into {folder}/CLASS/ as {", ".join(SUFFIXES)}')
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise UsageError(f'the class folders {", ".join(empty)} of {folder} hold no images', 'fill them or remove them')
    return found


def _common_classes(listed: dict[str, dict[str, list[pathlib.Path]]], parts: dict[str, pathlib.Path]) -> tuple[str, ...]:
    first, *others = listed
    for split in others:
        differing = sorted(set(listed[first]) ^ set(listed[split]))
        if differing:
            raise UsageError(
                f'{parts[first]} and {parts[split]} have different classes: {", ".join(differing)} in one of them only',
                'give every split the same class folders',
            )
    return tuple(listed[first])
