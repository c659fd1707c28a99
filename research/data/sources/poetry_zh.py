r"""Poems of the Tang and Song dynasties in traditional characters: 311,828 poems with a text, 19 million
characters and 4 million in titles.

    python -m bench.data fetch poetry_zh
    poetry_zh(dynasty='tang').splits['all']     # 57,607 poems: {'text': '帝京篇十首 一\n秦川雄帝宅，函谷壯皇居。\n...'}

An example is one poem: its title, then its lines. Poems that are in the collection twice have one key, so they never lie in
different splits.
"""

import json
import pathlib

from research.core import files
from research.core.errors import UsageError
from research.data.bad_records import reading
from research.data.source import ArraySource, DataSet
from research.data.sources.text_files import as_column

DYNASTIES = ('tang', 'song')


def poetry_zh(*, dir: str | None = None, dynasty: str | None = None) -> DataSet:  # noqa: A002  the config's word
    """The poems in one split 'all': 'text' object (str).

    Args:
      dir: the folder of poet.tang.0.json and the others; None: where `python -m bench.data fetch poetry_zh` puts them.
      dynasty: 'tang' or 'song' alone; None: both.

    Raises:
      UsageError: they are not there, or there was no such dynasty.
    """
    if dynasty not in (None, *DYNASTIES):
        raise UsageError(f'poetry_zh(dynasty={dynasty!r}) is unknown', f'choose one of {", ".join(DYNASTIES)}, or None')
    packaged = 'npm/cp/package/chinese-poetry/json'
    folder = files.data_folder() / packaged if dir is None else pathlib.Path(dir).expanduser()
    paths = [path for name in DYNASTIES if dynasty in (None, name) for path in sorted(folder.glob(f'poet.{name}.*.json'))]
    if not paths:
        raise UsageError(f'there are no poems in {folder}', 'python -m bench.data fetch poetry_zh')
    texts = [text for path in paths for text in _texts(path)]
    return DataSet('poetry_zh', {'all': ArraySource({'text': as_column(texts)})})


def _texts(path: pathlib.Path) -> list[str]:
    with reading(path, 'python -m bench.data fetch poetry_zh'):
        poems = json.loads(path.read_bytes())
        return ['\n'.join([poem['title'], *poem['paragraphs']]) + '\n' for poem in poems if poem['paragraphs']]
