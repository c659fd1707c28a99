"""LibreOffice's help in English and German: 35,900 aligned paragraphs, for translation.

    python -m bench.data fetch help_en_de
    help_en_de().splits['all']      # {'source': 'Click the OK button.', 'target': 'Klicken Sie auf die Schaltfläche OK.'}

Paragraphs are aligned by file and paragraph id, so the alignment is exact. A pair's place in the splits follows its English
side without case and punctuation: equal sentences never lie on both sides of a split. The help repeats itself all the same
("Returns the ... of a number" with other words in it), so results here are better than on free text.
"""

import functools
import html
import pathlib
import re

import numpy as np

from research.core import files
from research.core.errors import UsageError
from research.data.bad_records import reading
from research.data.source import ArraySource, DataSet, key_of
from research.data.sources.text_files import as_column

LANGUAGES = {'source': 'en-US', 'target': 'de'}
PARAGRAPH = re.compile(r'(?s)<(p|h\d)[^>]*\bid="([^"]+)"[^>]*>(.*?)</\1>')
NOT_TEXT = re.compile(r'(?s)<(script|style)\b.*?</\1>')


def help_en_de(*, dir: str | None = None, min_words: int = 1) -> DataSet:  # noqa: A002  the config's word
    """The pairs in one split 'all': 'source' (English) and 'target' (German), both object (str).

    Pairs that are the same in both languages (names of functions, keys) are left out, and so are repetitions.

    Args:
      dir: the folder of en-US/ and de/; None: where `python -m bench.data fetch help_en_de` puts them.
      min_words: the least words of the English side.

    Raises:
      UsageError: they are not there.
    """
    folder = files.data_folder() / 'deb/usr/share/libreoffice/help' if dir is None else pathlib.Path(dir).expanduser()
    for language in LANGUAGES.values():
        if not (folder / language).is_dir():
            raise UsageError(f'there is no folder {folder / language}', 'python -m bench.data fetch help_en_de')
    source, target = (_paragraphs(folder / language / 'text') for language in LANGUAGES.values())
    aligned = {(text, target[place]) for place, text in source.items() if target.get(place) not in (None, '', text)}
    pairs = sorted(pair for pair in aligned if len(pair[0].split()) >= max(1, min_words))
    columns = {key: as_column([pair[i] for pair in pairs]) for i, key in enumerate(LANGUAGES)}
    return DataSet('help_en_de', {'all': PairSource(columns)})


class PairSource(ArraySource):
    """Pairs of texts in memory; the key of a pair is that of its source's letters and digits."""

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        return np.array([key_of(' '.join(re.findall(r'\w+', text.casefold()))) for text in self.arrays['source']], np.uint64)


def _paragraphs(root: pathlib.Path) -> dict[tuple[str, str], str]:
    """The text of every paragraph and heading below `root` by file and id."""
    found = {}
    for path in sorted(root.rglob('*.html')):
        name = path.relative_to(root).as_posix()
        with reading(path, 'python -m bench.data fetch help_en_de'):
            page = NOT_TEXT.sub('', path.read_text(encoding='utf-8'))
        for match in PARAGRAPH.finditer(page):
            text = html.unescape(re.sub(r'<[^>]+>', '', match[3]))
            found[name, match[2]] = ' '.join(text.split())
    return found
