"""Token files as nanoGPT's prepare scripts write them: train.bin and val.bin, or .npy, mapped and never read whole.

Shape letters: N tokens of a file, T length of a window, n rows.

    config.data.source = 'tokens_memmap(dir="openwebtext", length=1024)'        # 'tokens' (1025,) int32
    config.data.tokenizer = 'token_ids(vocabulary_size=50304)'                  # or the tokenizer that made the files
    config.data.test = 0.0

A .bin file is its tokens as uint16 and nothing else. A row is a window of the file (`sequences.Windows`); rows count as the
examples of the data set, so '5%' of the data are 5 % of the windows.
"""

import pathlib

import numpy as np

from research.core import files
from research.core.errors import UsageError
from research.data.bad_records import DAMAGE, reason_of
from research.data.sequences import Windows
from research.data.source import DataSet, Source, naming

SPLITS = {'train': ('train',), 'validation': ('val', 'validation'), 'test': ('test',)}  # ours: the files' names
DTYPES = ('uint16', 'uint32')


def tokens_memmap(*, dir: str, length: int = 1024, stride: int | None = None, dtype: str = 'uint16') -> DataSet:  # noqa: A002
    """The windows of train, val and test files: 'tokens' (length + 1,) int32.

    The key of a row is a hash of its place, of the file's size and of its first and last 64 KiB, not of all its contents.

    A split without a file is held out from the windows of train by their hash (`config.data.test`, `config.data.validation`).
    Windows that overlap (stride < length) are refused there, since most of the test's tokens would be trained on. Borders of
    documents are not known, so also at stride = length windows of one document may fall into several splits, and the last
    window, which is moved back, may share tokens with the one before. Give files for validation and test where that matters.

    Args:
      dir: a folder with train.bin or train.npy, and val and test alike.
      length: T, the tokens that a model sees.
      stride: from one row to the next; None: `length`.
      dtype: of the .bin files, 'uint16' or 'uint32'; a .npy file tells its own.

    Raises:
      UsageError: no train file, a file of another kind, or fewer tokens than a window.
    """
    root = pathlib.Path(dir).expanduser()
    if dtype not in DTYPES:
        raise UsageError(f'tokens_memmap(dtype={dtype!r}) is unknown', f'choose one of {", ".join(DTYPES)}')
    found = {split: file for split, names in SPLITS.items() for file in _candidates(root, names) if file.is_file()}
    if 'train' not in found:
        raise UsageError(f'{root} has no train.bin and no train.npy', 'give the folder that a prepare script wrote them to')
    splits: dict[str, Source] = {}
    for split, file in found.items():
        with naming(split):
            splits[split] = Windows(_map(file, dtype), length, stride or length, _address(file))
    return DataSet(root.resolve().name, splits)


def _candidates(root: pathlib.Path, names: tuple[str, ...]) -> list[pathlib.Path]:
    return [root / f'{name}{suffix}' for name in names for suffix in ('.npy', '.bin')]


def _map(file: pathlib.Path, dtype: str) -> np.ndarray:
    """The tokens of a file, (N,)."""
    try:
        tokens = np.load(file, mmap_mode='r', allow_pickle=False) if file.suffix == '.npy' else np.memmap(file, dtype, 'r')
    except DAMAGE as error:
        raise UsageError(f'{file} cannot be mapped: {reason_of(error)}', 'write it again') from error
    if tokens.ndim != 1 or tokens.dtype.kind not in 'ui':
        raise UsageError(f'{file} holds {tokens.dtype} of shape {tokens.shape}, not token ids', 'store them as uint16 (N,)')
    return tokens


def _address(file: pathlib.Path) -> str:
    """A digest of the file's size and of its beginning and end."""
    size = file.stat().st_size
    with open(file, 'rb') as opened:
        head = opened.read(2**16)
        opened.seek(max(0, size - 2**16))
        return files.digest([str(size), head, opened.read()])
