"""Append-only files of JSON lines that neither a killed process nor a full disk can spoil.

    journal = Journal('runs/a/metrics.jsonl')
    journal.append({'step': 1, 'loss': 2.3})       # on disk, or waiting: it never raises for the disk's sake
    journal.flush()                                # None, or why lines are still waiting

What cannot be written whole (disk full) is cut back to the last whole line; the rest waits for the next try. Where a try was
left in the middle, by a signal or by a death, the file itself says how far it came: no line is written twice.
"""

import contextlib
import json
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any

from research.core import files

MAX_WAITING = 100_000  # lines; a disk that stays full for so long ends the run before
BLOCK_BYTES = 1 << 16


class Journal:
    """One file of JSON lines that this process appends to, from any of its threads."""

    def __init__(self, path: files.Path):
        self.path = pathlib.Path(path)
        self._waiting: list[str] = []
        self._end: int | None = None  # where the first waiting line belongs; None: not known yet
        self._lock = threading.Lock()

    def append(self, record: dict[str, Any]) -> None:
        """Adds one record at the end."""
        line = files.json_line(record)
        with self._lock:
            del self._waiting[MAX_WAITING - 1 :]
            self._waiting.append(line)
        self.flush()

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Of the records that wait only those that are `wanted`."""
        with self._lock:
            self._waiting = [line for line in self._waiting if wanted(json.loads(line))]

    def waiting(self) -> list[dict[str, Any]]:
        """The records that are not known to be in the file."""
        with self._lock:
            return [json.loads(line) for line in self._waiting]

    def flush(self, sync: bool = False) -> str | None:
        """Writes what is waiting; why that is impossible, or None. `sync`: down to the disk, against a power cut."""
        try:
            with self._lock:
                self._write(sync)
        except OSError as error:
            return f'{self.path}: {error.strerror or error}'
        return None

    def _write(self, sync: bool) -> None:
        if not self._waiting and not sync:
            return
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._write_to(file)
            if sync:
                os.fsync(file)
                files.sync_folder(self.path.parent)
        finally:
            os.close(file)

    def _write_to(self, file: int) -> None:
        data = ''.join(self._waiting).encode()
        size = os.fstat(file).st_size
        done = -1 if self._end is None else size - self._end
        if self._end is None or done < 0 or os.pread(file, done, self._end) != data[:done]:  # new here, or others wrote
            self._end, done = _mend(file, size), 0
        try:
            while done < len(data):
                done += os.write(file, data[done:])
        except OSError:
            done = data.rfind(b'\n', 0, done) + 1
            with contextlib.suppress(OSError):
                os.ftruncate(file, self._end + done)
            raise
        finally:
            self._settle(data.count(b'\n', 0, done), data.rfind(b'\n', 0, done) + 1)

    def _settle(self, lines: int, size: int) -> None:
        """So many of the waiting lines are in the file."""
        assert self._end is not None
        self._waiting, self._end = self._waiting[lines:], self._end + size


def _mend(file: int, size: int) -> int:
    """Cuts off a torn last line, which would spoil the next one; the size that the file then has."""
    end = size
    while end:
        start = max(end - BLOCK_BYTES, 0)
        whole = os.pread(file, end - start, start).rfind(b'\n')
        if whole >= 0:
            end = start + whole + 1
            break
        end = start
    if end != size:
        os.ftruncate(file, end)
    return end


def cut(path: files.Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Cuts a file of JSON lines before its first record that `keep` refuses, in one call; else a torn end off.

    A damaged line with good ones behind it stays: readers leave it out.
    """
    path = pathlib.Path(path)
    end = position = 0
    with open(path, 'rb') as file:
        for line in file:
            position += len(line)
            record = files.parse_line(line)
            if record is None:
                continue
            if not keep(record):
                break
            end = position
    if path.stat().st_size != end:
        os.truncate(path, end)
