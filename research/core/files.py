"""Small file operations that survive a crash: atomic writes, JSON lines, fingerprints; and where this user's files lie."""

import contextlib
import hashlib
import json
import os
import pathlib
import stat
import sys
from collections.abc import Iterable, Iterator
from typing import Any

Path = str | os.PathLike[str]


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that a reader, or a crash, sees the old file or the new one, never a part."""
    path = pathlib.Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'w', encoding='utf-8') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk stays no fuller than it was
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinity become null: JSON has no such numbers."""
    write_atomically(path, json.dumps(finite(value), indent=2, allow_nan=False) + '\n')


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    with open(path, encoding='utf-8') as file:
        return json.load(file)


def json_line(record: dict[str, Any]) -> str:
    """One line of JSON lines, with its newline."""
    return json.dumps(finite(record), allow_nan=False) + '\n'


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file; a torn last line (the writer was killed) is left out."""
    with open(path, 'rb') as file:
        for line in file:
            record = parse_line(line)
            if record is not None:
                yield record


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of one line of JSON lines; None for a torn or damaged one."""
    try:
        record = json.loads(line) if line.endswith(b'\n') else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def tell(text: str) -> None:
    """Writes to standard error, if anybody still reads it."""
    with contextlib.suppress(Exception):
        sys.stderr.write(text)
        sys.stderr.flush()


def settle_output() -> None:
    """Flushes what was printed; an output that takes nothing is let go of, so that the exit code stays what it is."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk; a reader (head, less) that has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def sync_folder(path: Path) -> None:
    """Brings the names in a folder (a rename, a new file) down to the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def finite(value: Any) -> Any:
    """`value` with every non-finite float replaced by None, through dicts, lists and tuples."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float('inf'), float('-inf'))):
        return None
    return value


def digest(parts: Iterable[bytes | str], length: int = 16) -> str:
    """A hexadecimal fingerprint (blake2b) of `parts`; the borders between parts count."""
    state = hashlib.blake2b(digest_size=length)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, 'little') + data)
    return state.hexdigest()


def data_folder() -> pathlib.Path:
    """Where fetched data sets lie (`python -m bench.data`): $FULCRUM_DATA, else a folder of this user's."""
    chosen = os.environ.get('FULCRUM_DATA')
    return pathlib.Path(chosen).expanduser() if chosen else pathlib.Path.home() / '.cache' / 'fulcrum' / 'data'


def cache_folder(kind: str) -> pathlib.Path:
    """Where things of a kind ('tokenizers', 'tokens') that can be made again are kept; $FULCRUM_CACHE moves it."""
    chosen = os.environ.get('FULCRUM_CACHE')
    return (pathlib.Path(chosen) if chosen else pathlib.Path.home() / '.cache' / 'fulcrum') / kind


def problem_of_folder(path: pathlib.Path) -> str | None:
    """Why `path` cannot serve as a private folder (it is made where it is missing); None if it can."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = path.stat()
    except OSError as error:
        return f'{path} cannot be made: {error.strerror}'
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f'{path} can be written by others; run: chmod 700 {path}'
    return None
