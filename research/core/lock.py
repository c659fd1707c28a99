"""One owner of a folder: host, process, and a sign of life, so that a dead owner's lock can be told from a living one's.

    with Lock('runs/a/.lock').held():       # or: error: process 4711 on gpu3 (boot 1f2e3d4c) trains in runs/a
        ...                                 # call `beat` every `BEAT_S` seconds from a thread

The lock is a file that says {host, pid, token, beat, time}, and is empty while nobody holds the folder. On one machine `flock`
decides, which the kernel lets go of when the process dies. Between machines (a shared file system whose `flock` may be local)
the sign of life decides: an owner renews `beat` every `BEAT_S` seconds, and who wants the folder watches for `WATCH_S` seconds
whether it moves. Clocks are never compared. Two that take over at the same moment find each other at their next beat.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from research.core import files
from research.core.errors import StorageError, UsageError

BEAT_S = 3.0
WATCH_S = 10.0
LOOK_S = 0.2
SIZE = 256  # of the record, filled up with blanks: one write changes it whole, whoever reads meanwhile


class Lock:
    """The lock file of a folder; `held` takes it, `beat` renews the sign of life."""

    def __init__(self, path: files.Path):
        self.path = pathlib.Path(path)
        self.earlier: dict[str, Any] | None = None  # who held it before and did not give it back
        self._token = uuid.uuid4().hex
        self._number = 0
        self._is_written = self._is_over = False
        self._is_flocked = False
        self._turn = threading.Lock()  # of the thread that beats and the one that gives back

    @contextlib.contextmanager
    def held(self, say: Callable[[str], None] = print) -> Iterator['Lock']:
        """Holds the folder inside the `with` block.

        Raises:
          UsageError: another process holds it and is alive.
        """
        self._is_written = self._is_over = False
        with open(self.path, 'a+', encoding='utf-8') as file:
            self._is_flocked = self._lock_here(file)
            self.earlier = self.read()
            if self.earlier is not None:
                self._take_over(self.earlier, say)
            self.beat()
            try:
                yield self
            finally:
                self.give_back()

    def read(self) -> dict[str, Any] | None:
        """What the lock file says; None if nobody holds the folder."""
        try:
            found = json.loads(self.path.read_text(encoding='utf-8'))
        except (OSError, ValueError):  # empty, or torn by a crash
            return None
        return found if isinstance(found, dict) and 'host' in found else None

    def beat(self) -> None:
        """Renews the sign of life. A full disk is no reason to end a run, so a failure to write is let pass.

        Raises:
          StorageError: another process has taken the folder over (this one was frozen for long).
        """
        with self._turn:
            if not self._is_over:
                self._beat()

    def _beat(self) -> None:
        now = self.read()
        if self._is_written and self._is_lost(now):
            other = 'another process' if now is None else _who(now)
            raise StorageError(f'{other} has taken over {self.path.parent}', 'look at its run; this process ends')
        self._number += 1
        mine = {'host': _host(), 'pid': os.getpid(), 'token': self._token, 'beat': self._number, 'time': time.time()}
        data = json.dumps(mine).ljust(SIZE).encode()
        with contextlib.suppress(OSError):
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.pwrite(file, data, 0)  # in place: flock holds the file, not its name, and a full disk has room for it
                os.ftruncate(file, len(data))
                self._is_written = True
            finally:
                os.close(file)

    def _is_lost(self, now: dict[str, Any] | None) -> bool:
        """Whether another process wrote the file since we did; one that has gone again leaves it empty."""
        if now is not None:
            return now.get('token') != self._token
        try:
            return self.path.stat().st_size == 0
        except OSError:  # the storage does not answer: no sign of another process
            return False

    def give_back(self) -> None:
        """Nobody holds the folder any more, if this process did."""
        with self._turn:
            self._is_over = True  # a beat that comes later would say that this process still holds it
            with contextlib.suppress(OSError):
                now = self.read()
                if now is not None and now.get('token') == self._token:  # else it is another's by now
                    os.truncate(self.path, 0)

    def _lock_here(self, file: Any) -> bool:
        """Asks the kernel of this machine; False where the file system cannot lock: there the sign of life decides."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._refusal(self.read()) from error
        except OSError:
            return False
        return True

    def _take_over(self, other: dict[str, Any], say: Callable[[str], None]) -> None:
        """Returns when the former owner is certainly gone."""
        if other['host'] != _host() or not self._is_flocked:  # else flock said so
            end = time.monotonic() + WATCH_S
            say(f'{self.path.parent} was held by {_who(other)}: watching for {WATCH_S:.0f} s whether it is alive')
            while time.monotonic() < end:
                time.sleep(LOOK_S)
                now = self.read()
                if now is None or now.get('beat') != other.get('beat') or now.get('token') != other.get('token'):
                    raise self._refusal(now)
        say(f'took over {self.path.parent}: {_who(other)} is gone')

    def _refusal(self, other: dict[str, Any] | None) -> UsageError:
        who = 'another process' if other is None else _who(other)
        return UsageError(f'{who} trains in {self.path.parent}', 'wait for it, or give another --workdir')


def _host() -> str:
    """The machine, in this boot: after a restart its process numbers mean other processes."""
    try:
        boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()[:8]
    except OSError:
        boot = 'unknown'
    return f'{socket.gethostname()} (boot {boot})'


def _who(record: dict[str, Any]) -> str:
    return f'process {record.get("pid")} on {record.get("host")}'
