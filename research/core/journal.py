"""Append-only files of JSON lines that neither a killed process nor a full disk can spoil.

    journal = Journal('runs/a/metrics.jsonl')
    journal.append({'step': 1, 'loss': 2.3})       # on disk, or waiting: it never raises for the disk's sake
    journal.flush()                                # None, or why lines are still waiting

A line is written whole by one call of the system. Where that fails half-way (disk full) the file is cut back to its last whole
line, and the line waits for the next try.
"""

import contextlib
import os
import pathlib
from typing import Any

from research.core import files

MAX_WAITING = 100_000  # lines; a disk that stays full for so long ends the run before


class Journal:
    """One file of JSON lines that this process appends to."""

    def __init__(self, path: files.Path):
        self.path = pathlib.Path(path)
        self._waiting: list[str] = []

    def append(self, record: dict[str, Any]) -> None:
        """Adds one record at the end."""
        self._waiting.append(files.json_line(record))
        self.flush()

    def flush(self, sync: bool = False) -> str | None:
        """Writes what is waiting; why that is impossible, or None. `sync`: down to the disk, against a power cut."""
        try:
            self._write(sync)
        except OSError as error:
            del self._waiting[MAX_WAITING:]
            return f'{self.path}: {error.strerror}'
        return None

    def _write(self, sync: bool) -> None:
        if not self._waiting and not sync:
            return
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            end = os.fstat(file).st_size
            data = ''.join(self._waiting).encode()
            if os.write(file, data) != len(data):  # only a part went in: take it back
                os.ftruncate(file, end)
                raise OSError(28, 'No space left on device')
            self._waiting = []
            if sync:
                os.fsync(file)
        finally:
            os.close(file)


def cut(path: files.Path, keep: Any) -> None:
    """Cuts a file of JSON lines before its first record that `keep(record)` refuses, and a torn last line, in one call."""
    path = pathlib.Path(path)
    end = 0
    with open(path, 'rb') as file:
        for line in file:
            record = files.parse_line(line)
            if record is None or not keep(record):
                break
            end += len(line)
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size != end:
            os.truncate(path, end)
