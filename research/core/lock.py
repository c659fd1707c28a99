"""One owner of a folder: host, process, and a sign of life, so that a dead owner's lock can be told from a living one's.

The lock is a file that says {host, boot, pid, born, beat}. On one machine `flock` decides, which the kernel lets go of when the
process dies. Between machines (a shared file system whose `flock` may be local) the sign of life decides: an owner renews `beat`
every `BEAT_S` seconds, and who wants the folder watches for `WATCH_S` seconds whether it moves. Clocks are never compared.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from research.core import files
from research.core.errors import StorageError, UsageError

BEAT_S = 3.0
WATCH_S = 10.0


class Lock:
    """The lock file of a folder; `held` takes it, `beat` renews the sign of life."""

    def __init__(self, path: files.Path):
        self.path = pathlib.Path(path)
        self.earlier: dict[str, Any] | None = None  # who held it before and did not give it back
        self._token = uuid.uuid4().hex
        self._number = 0

    @contextlib.contextmanager
    def held(self, say: Callable[[str], None] = print) -> Iterator['Lock']:
        """Holds the folder inside the `with` block.

        Raises:
          UsageError: another process holds it and is alive.
        """
        with open(self.path, 'a+', encoding='utf-8') as file:
            self._lock_here(file)
            self.earlier = self.read()
            if self.earlier is not None:
                self._take_over(self.earlier, say)
            self.beat()
            try:
                yield self
            finally:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, 0)  # the empty file says: given back

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
        now = self.read()
        if self._number and now is not None and now.get('token') != self._token:
            raise StorageError(f'{_who(now)} has taken over {self.path.parent}', 'look at its run; this process ends')
        self._number += 1
        mine = {'host': _host(), 'pid': os.getpid(), 'token': self._token, 'beat': self._number, 'time': time.time()}
        data = json.dumps(mine).encode()
        with contextlib.suppress(OSError):
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)  # in place: flock holds the file, not its name
            try:
                os.pwrite(file, data, 0)
                os.ftruncate(file, len(data))
            finally:
                os.close(file)

    def _lock_here(self, file: Any) -> None:
        """Asks the kernel of this machine. A file system that cannot lock leaves the decision to the sign of life."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._refusal(self.read()) from error
        except OSError:
            pass

    def _take_over(self, other: dict[str, Any], say: Callable[[str], None]) -> None:
        """Returns when the former owner is certainly gone."""
        if other['host'] != _host():  # else flock said so
            end = time.monotonic() + WATCH_S
            say(f'{self.path.parent} was held by {_who(other)}: watching for {WATCH_S:.0f} s whether it is alive')
            while time.monotonic() < end:
                time.sleep(0.2)
                now = self.read()
                if now is None or now.get('beat') != other.get('beat') or now.get('token') != other.get('token'):
                    raise self._refusal(now)
        say(f'took over {self.path.parent}: {_who(other)} is gone')

    def _refusal(self, other: dict[str, Any] | None) -> UsageError:
        who = 'another process' if other is None else _who(other)
        return UsageError(f'{who} trains in {self.path.parent}', 'wait for it, or give another --workdir')


def _host() -> str:
    """This machine, in this boot: after a restart its process numbers mean other processes."""
    try:
        boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()[:8]
    except OSError:
        boot = 'unknown'
    return f'{socket.gethostname()} (boot {boot})'


def _who(record: dict[str, Any]) -> str:
    return f'process {record.get("pid")} on {record.get("host")}'
