"""The manifest of a checkpoint: what is in it, bit for bit, and the mark that it is complete.

`manifest.json` is written last, synced, and then the folder takes its name: a folder with the name of a step and a right
manifest is a whole checkpoint, anything else is not one. It holds the step, the kind (permanent or temporary), a digest of the
config, for each leaf of the state shape, dtype and fingerprint (`fingerprint.py`), for each file its size, for small files (all
of Orbax' own metadata) their digest, what belongs to the run beside the arrays (`meta`), and a digest of all this.
"""

import hashlib
import json
import os
import pathlib
from typing import Any

from research.core import files
from research.core.errors import StorageError

NAME = 'manifest.json'
FORMAT = 1
SMALL = 1 << 20  # bytes; the content of larger files is proved by the fingerprints of the leaves


class CorruptError(Exception):
    """A checkpoint is not what was written: why, in words."""


def write(folder: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes the manifest of all files below `folder`, which are synced first, and syncs it.

    Args:
      folder: the checkpoint, complete but for this.
      content: 'step', 'kind', 'config', 'leaves' {name: {'shape', 'dtype', 'fingerprint'}} and 'meta'.
    """
    paths = sorted(path for path in folder.rglob('*') if path.is_file() and path.name != NAME)
    for path in paths:
        _sync(path)
    listed = {path.relative_to(folder).as_posix(): _described(path) for path in paths}
    _write(folder, {'format': FORMAT, **content, 'files': listed})
    for inner in (folder, *(path for path in folder.rglob('*') if path.is_dir())):
        files.sync_folder(inner)


def rewrite(folder: pathlib.Path, described: dict[str, Any]) -> None:
    """Replaces the manifest of a complete checkpoint by another of the same files."""
    _write(folder, described)
    files.sync_folder(folder)


def _write(folder: pathlib.Path, whole: dict[str, Any]) -> None:
    files.write_atomically(folder / NAME, json.dumps({**whole, 'digest': _digest(whole)}, indent=1) + '\n')


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
      CorruptError: there is none, or it is damaged.
      StorageError: it is right, but of a format that this program does not know.
      OSError: it cannot be read although it is there.
    """
    try:
        found = json.loads((folder / NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CorruptError(f'it has no {NAME}') from error
    except (ValueError, RecursionError) as error:
        raise CorruptError(f'{NAME} is damaged') from error
    if not isinstance(found, dict) or found.pop('digest', None) != _digest(found):
        raise CorruptError(f'{NAME} is damaged')
    if found['format'] != FORMAT:
        raise StorageError(
            f'{folder} has format {found["format"]}, this program knows {FORMAT}', 'use the version of Fulcrum that made it'
        )
    return found


def check_files(folder: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Compares every file with the manifest: presence, size, and the content of small ones.

    Raises:
      CorruptError: a file is missing, cut off, longer, or other.
    """
    for name, wanted in manifest['files'].items():
        path = folder / name
        try:
            found = _described(path)
        except FileNotFoundError as error:
            raise CorruptError(f'{name} is missing') from error
        if found['size'] != wanted['size']:
            raise CorruptError(f'{name} has {found["size"]:,} bytes, expected {wanted["size"]:,}')
        if found != wanted:
            raise CorruptError(f'{name} is not what was written')
    known = {*manifest['files'], NAME}
    found = [path for path in folder.rglob('*') if path.is_file() and not path.name.startswith(f'.{NAME}.')]  # a torn rewrite
    strangers = [path for path in found if path.relative_to(folder).as_posix() not in known]
    if strangers:
        raise CorruptError(f'{strangers[0].relative_to(folder).as_posix()} does not belong to it')


def _described(path: pathlib.Path) -> dict[str, Any]:
    size = path.stat().st_size
    content = {} if size > SMALL else {'digest': hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()}
    return {'size': size, **content}


def _digest(content: dict[str, Any]) -> str:
    return files.digest([json.dumps(content, sort_keys=True)])


def _sync(path: pathlib.Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
