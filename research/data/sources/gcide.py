r"""The GNU Collaborative International Dictionary of English: Webster 1913 with later additions, 40 million characters.

    python -m bench.data fetch gcide
    gcide().splits['all']       # 126,000 entries: {'text': 'Aceric \\A*cer"ic\\, a. [L. acer maple.]\n   Pertaining to, ...'}

An example is one entry, found by the dictionary's own index (lines "headword, offset, length" in base 64 digits; several
headwords may lead to one entry). Entries are short, 300 characters in the mean: pack them.
"""

import gzip
import pathlib
import string

from research.core import files
from research.core.errors import UsageError
from research.data.bad_records import reading
from research.data.source import ArraySource, DataSet
from research.data.sources.text_files import as_column

DIGITS = {digit: i for i, digit in enumerate(string.ascii_uppercase + string.ascii_lowercase + string.digits + '+/')}


def gcide(*, dir: str | None = None) -> DataSet:  # noqa: A002  the config's word
    """The entries in one split 'all': 'text' object (str).

    Args:
      dir: the folder of gcide.dict.dz and gcide.index; None: where `python -m bench.data fetch gcide` puts them.

    Raises:
      UsageError: they are not there.
    """
    folder = files.data_folder() / 'deb/usr/share/dictd' if dir is None else pathlib.Path(dir).expanduser()
    if not (folder / 'gcide.index').is_file():
        raise UsageError(f'there is no gcide.index in {folder}', 'python -m bench.data fetch gcide')
    again = 'python -m bench.data fetch gcide'
    with reading(folder / 'gcide.dict.dz', again), gzip.open(folder / 'gcide.dict.dz') as opened:
        contents = opened.read()
    with reading(folder / 'gcide.index', again):
        places = _places(folder / 'gcide.index')
    texts = [contents[offset : offset + length].decode(errors='replace') for offset, length in sorted(places)]
    return DataSet('gcide', {'all': ArraySource({'text': as_column(texts)})})


def _places(index: pathlib.Path) -> set[tuple[int, int]]:
    """Where each entry begins and how long it is."""
    lines = [line.split('\t')[:3] for line in index.read_text(encoding='utf-8').splitlines()]
    # What the dictionary says of itself begins with 00-.
    return {(_number(offset), _number(length)) for headword, offset, length in lines if not headword.startswith('00-')}


def _number(text: str) -> int:
    """A number written in base 64, the first digit the highest: 'BA' is 64."""
    value = 0
    for digit in text:
        value = value * 64 + DIGITS[digit]
    return value
