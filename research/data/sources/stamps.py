"""The stamps of Tux Paint: 785 pictures of things, 674 different captions, in up to 78 languages.

Debian's package tuxpaint-stamps-default (2022.06.04-1, GPL-2 and public domain); `python -m bench.data fetch stamps` unpacks it
without installing it. Its 165 vector drawings are left out.

    stamps(languages=('en', 'de')).splits['all'][np.array([0])]
    # 'image' uint8 (1, 64, 64, 3), 'caption' ['A frog.'], 'caption_de' ['Ein Frosch.'], 'label' [0] for 'animals'

Pictures may share a caption ('A flower.' has six). An example's hash is that of its English caption, so all pictures of one
caption lie in one split, and a held-out caption is one that training never saw.
"""

import os
import pathlib
import re

import numpy as np

from research.core.errors import UsageError, nearest
from research.core.files import data_folder
from research.data.bad_records import reading
from research.data.source import ArraySource, DataSet, key_of
from research.data.sources.image_folder import decode_image

FOLDER = pathlib.Path('deb/usr/share/tuxpaint/stamps')
TRANSLATION = re.compile(r'(?m)^([\w@]+)\.utf8=(.*)$')
Stamp = tuple[pathlib.Path, dict[str, str]]  # the picture, and its captions by language


def stamps(*, dir: str | None = None, size: int = 64, languages: tuple[str, ...] = ('en',)) -> DataSet:  # noqa: A002
    """The pictures in one split 'all': 'image' uint8 (size, size, 3), 'caption' str, 'label' int32, the kind of thing.

    Args:
      dir: the folder 'stamps' of the package; None: where `python -m bench.data fetch stamps` puts it.
      size: side of the pictures in pixels. Their proportions are kept; what is transparent, or beside them, is white.
      languages: of the captions, such as 'en', 'de', 'pt_BR'. The first is 'caption', others are 'caption_de' and so on; a
        picture without a translation has the English caption there.

    Raises:
      UsageError: the folder is not there, or no caption is in one of the languages.
    """
    root = data_folder() / FOLDER if dir is None else pathlib.Path(dir).expanduser()
    found = _find(root)
    known = {language for _, captions in found for language in captions}
    for language in languages or ('none',):
        if language not in known:
            raise UsageError(f'no stamp has a caption in {language!r}', nearest(language, known))
    kinds = [path.relative_to(root).parts[0] for path, _ in found]
    class_names = tuple(sorted(set(kinds)))
    arrays = {'image': np.stack([_read(path, size) for path, _ in found])}  # (n, size, size, 3)
    for language in languages:
        name = 'caption' if language == languages[0] else f'caption_{language}'
        arrays[name] = np.array([captions.get(language, captions['en']) for _, captions in found], object)
    arrays['label'] = np.array([class_names.index(kind) for kind in kinds], np.int32)
    return DataSet('stamps', {'all': Captioned(arrays, [captions['en'] for _, captions in found])}, class_names)


class Captioned(ArraySource):
    """Arrays whose examples have the hash of a caption each."""

    def __init__(self, arrays: dict[str, np.ndarray], captions: list[str]):
        super().__init__(arrays)
        self._hashes = np.array([key_of(caption) for caption in captions], np.uint64)

    def keys(self) -> np.ndarray:
        """A hash of each example's caption, (n,) uint64; its image does not count."""
        return self._hashes


def _find(root: pathlib.Path) -> list[Stamp]:
    """All pictures that have a caption, in the order of their paths."""
    texts = sorted(path for path in root.glob('**/*.txt') if path.with_suffix('.png').is_file())
    if not texts:
        raise UsageError(f'there are no stamps in {root}', 'python -m bench.data fetch stamps')
    return [(path.with_suffix('.png'), _captions(path)) for path in texts]


def _captions(path: pathlib.Path) -> dict[str, str]:
    """The captions by language: the first line is English, others are 'de.utf8=...'."""
    with reading(path):
        text = path.read_text(encoding='utf-8')
    translated = {language: caption.strip() for language, caption in TRANSLATION.findall(text)}
    return {language: caption for language, caption in translated.items() if caption} | {'en': text.split('\n')[0].strip()}


def _read(path: str | os.PathLike[str], size: int) -> np.ndarray:
    """A picture as uint8 (size, size, 3) in the middle of a white square."""
    from PIL import Image, ImageOps

    image = Image.fromarray(decode_image(path, None, 3, str(path)))
    return np.asarray(ImageOps.pad(image, (size, size), Image.Resampling.BILINEAR, color='white'))
