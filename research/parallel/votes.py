"""Votes: what all processes of a run do at the same step, whoever asks for it.

    votes = Votes(watch); votes.request('stop'); ...; votes.agreed('stop')      # True after the same step in every process

A request gets a number; a thread in each process notices it within `hosts.POLL_S` and publishes the next boundary (call of
`agreed`) that its main thread has not passed; the largest of these is the boundary at which all do it. A main thread that comes
to a boundary while a vote is open waits there until all have published, so that none can be too far.
"""

import contextlib
import threading
from typing import Any

from research.core.errors import Interrupted
from research.core.guardian import Guardian
from research.parallel import hosts, peers

END_MS = 5_000


class Votes:
    """What the processes of a run agree to do at the same boundary, whoever asks for it: 'stop', 'save'. A context manager.

    `agreed` must be called equally often in every process; each call is a boundary. `watch` hears when another process was
    asked to stop, and ends this one when another is lost.
    """

    _ends = 0  # of this process, whatever run

    def __init__(self, watch: Guardian):
        self._watch = watch
        self._lock = threading.Lock()
        self._wanted: set[str] = set()
        self._passed: dict[str, int] = {}  # boundaries of each kind that the main thread has passed
        self._open: dict[str, int] = {}  # the number of the open vote of each kind
        self._held: dict[str, int] = {}  # how many votes of each kind are over
        self._close = threading.Event()
        self._thread = threading.Thread(target=self._work, name='votes', daemon=True)

    def request(self, what: str) -> None:
        """Asks for it; from any thread."""
        with self._lock:
            self._wanted.add(what)

    def agreed(self, what: str) -> bool:
        """Whether it is to be done here and now; the request is then answered."""
        with self._lock:
            if hosts.is_alone():
                is_now = what in self._wanted
                self._wanted.discard(what)
                return is_now
            boundary, number = self._passed.get(what, 0), self._open.get(what)
            if number is None:
                self._passed[what] = boundary + 1
                return False
        is_now = boundary == self._target(what, number)
        with self._lock:
            self._passed[what] = boundary + 1
            if is_now:
                self._held[what] = number
                del self._open[what]
                self._wanted.discard(what)
        return is_now

    def leave_if_agreed(self, what: str = 'stop') -> None:
        """A boundary inside something that may be left: raises Interrupted."""
        if self.agreed(what):
            raise Interrupted(self._watch.stopped or 'another process')

    def leave_waiting(self) -> None:
        """For a main thread that waits before its next boundary: raises Interrupted if all are to stop at that one."""
        with self._lock:
            alone, number, boundary = hosts.is_alone(), self._open.get('stop'), self._passed.get('stop', 0)
            wanted = 'stop' in self._wanted
        if (alone and wanted) or (not alone and number is not None and boundary == self._target('stop', number)):
            self.leave_if_agreed()

    def __enter__(self) -> 'Votes':
        if not hosts.is_alone():
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._thread.ident is not None:
            with contextlib.suppress(Exception):  # none may leave while others still watch for its signs of life
                hosts.client().wait_at_barrier(f'{hosts.ROOM}/end/{Votes._ends}', END_MS)
            Votes._ends += 1
            self._close.set()
            self._thread.join()

    def _target(self, what: str, number: int) -> int:
        """The boundary of a vote: the largest that any process published."""
        keys = [f'{hosts.ROOM}/at/{what}/{number}/{i}' for i in range(hosts.count())]
        return max(int(hosts.client().blocking_key_value_get(key, hosts.WAIT_MS)) for key in keys)

    def _work(self) -> None:
        life = peers.Life()
        while not self._close.wait(hosts.POLL_S):
            try:
                self._ask()
                self._answer()
                lost = life.look()
            except Exception as error:  # noqa: BLE001 - the service is gone, and with it the main process
                lost = f'the main process ({" ".join(str(error).split())[:80]})'
            if lost is not None and not self._close.is_set():
                peers.end_for_loss(self._watch, lost)

    def _ask(self) -> None:
        with self._lock:
            asked = {what: self._held.get(what, 0) + 1 for what in self._wanted if what not in self._open}
        for what, number in asked.items():
            name = self._watch.stopped or ''
            hosts.client().key_value_set(f'{hosts.ROOM}/vote/{what}/{number}', name, allow_overwrite=True)

    def _answer(self) -> None:
        for key, name in hosts.client().key_value_dir_get(f'{hosts.ROOM}/vote/'):
            what, number = key.split('/')[-2], int(key.split('/')[-1])
            with self._lock:
                if what in self._open or number != self._held.get(what, 0) + 1:
                    continue  # one after the other: who is ahead may ask anew before this process has come to the boundary
                self._open[what] = number
                boundary = self._passed.get(what, 0)
                # Inside the lock: the main thread must not pass a boundary that is being published.
                hosts.client().key_value_set(f'{hosts.ROOM}/at/{what}/{number}/{hosts.index()}', str(boundary))
            if what == 'stop':
                self._watch.request(name or 'another process')
