"""The captions of Tux Paint's stamps: 804 short English texts, each about one of 16 kinds of things.

Debian's package tuxpaint-stamps-default (2022.06.04-1, GPL-2); `python -m bench.data fetch stamps` unpacks it. The source
`stamps` has the pictures too.

    stamp_captions().splits['all'][np.array([0])]     # {'text': ['A butterfly.'], 'label': [0]} for 'animals'

The kind is the folder: symbols 178, animals 142, town 79, household 66, food 63, seasonal 58, vehicles 51, clothes 43, plants
35, people 24, space 19, hobbies 15, sports 12, military 10, medical 6, naturalforces 3. A text says what a thing is and little
else, so that what 'A dingo.' belongs to must be known from elsewhere: a task for models that have read before.
"""

import pathlib

import numpy as np

from research.core.errors import UsageError
from research.core.files import data_folder
from research.data.bad_records import reading
from research.data.source import ArraySource, DataSet

FOLDER = pathlib.Path('deb/usr/share/tuxpaint/stamps')


def stamp_captions(*, dir: str | None = None) -> DataSet:  # noqa: A002
    """The captions in one split 'all': 'text' str and 'label' int32, the kind of thing.

    A caption that several pictures share is there once, with the first of their folders in alphabetical order.

    Args:
      dir: the folder 'stamps' of the package; None: where `python -m bench.data fetch stamps` puts it.

    Raises:
      UsageError: the folder is not there.
    """
    root = data_folder() / FOLDER if dir is None else pathlib.Path(dir).expanduser()
    found: dict[str, str] = {}
    for path in sorted(root.glob('**/*.txt')):
        if any(path.with_suffix(end).is_file() for end in ('.png', '.svg')):
            with reading(path):
                caption = path.read_text(encoding='utf-8').split('\n')[0].strip()
            found.setdefault(caption, path.relative_to(root).parts[0])
    if not found:
        raise UsageError(f'there are no stamps in {root}', 'python -m bench.data fetch stamps')
    class_names = tuple(sorted(set(found.values())))
    labels = np.array([class_names.index(kind) for kind in found.values()], np.int32)
    return DataSet('stamp_captions', {'all': ArraySource({'text': np.array([*found], object), 'label': labels})}, class_names)
