"""How a run of several processes notices that one of them is gone, and ends with a plain reason instead of waiting for ever.

*Signs of life*: the main process watches the counters of all, all watch the main one's; a process that is silent for `LOST_S`
is lost, and the rest ends with 134. (jax' own heartbeat aborts in C++ two seconds later, should Python be stuck.) Who goes
alone says so (`leave`). `together` gives the errors and aborts of collective operations the same reason.
"""

import contextlib
import ctypes
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from research.core.errors import ExitCode, FulcrumError, NumericalError, StoppedError, exit_code, explain
from research.core.guardian import Guardian
from research.parallel import hosts

BEAT_S = 1.0
LOST_S = 6.0
LEAVE_S = 4.0
SAY_S = 2.5
LOSS = ('Gloo', 'Connection reset', 'Connection closed', 'coordination service', 'CoordinationService', 'UNAVAILABLE', 'NCCL')
SHARED = (StoppedError, NumericalError)  # raised by all processes at the same step


class Life:
    """The signs of life of the processes, as this one sees them."""

    def __init__(self) -> None:
        self._count, self._due = 0, 0.0
        watched = range(hosts.count()) if hosts.is_main() else [0]
        self._seen = {i: ('', time.monotonic()) for i in watched if i != hosts.index()}

    def look(self) -> str | None:
        """Gives a sign of life, looks for others', and names a process that is lost."""
        now = time.monotonic()
        if now < self._due:
            return None
        self._due, self._count = now + BEAT_S, self._count + 1
        hosts.client().key_value_set(f'{hosts.ROOM}/alive/{hosts.index()}', str(self._count), allow_overwrite=True)
        found = dict(hosts.client().key_value_dir_get(f'{hosts.ROOM}/alive/'))
        for i, (text, since) in self._seen.items():
            sign = found.get(f'{hosts.ROOM}/alive/{i}', '')
            if sign != text:
                self._seen[i] = sign, now
            elif text and now - since > LOST_S:
                hosts.client().key_value_set(f'{hosts.ROOM}/lost/{i}', f'process {i}', allow_overwrite=True)
                return f'process {i}'
        return next((name for _, name in hosts.client().key_value_dir_get(f'{hosts.ROOM}/lost/')), None)


def leave() -> None:
    """Tells the others that this process goes, alone: they need not wait for its signs of life."""
    if hosts.is_alone():
        return

    def say() -> None:
        with contextlib.suppress(Exception):
            hosts.client().key_value_set(f'{hosts.ROOM}/lost/{hosts.index()}', f'process {hosts.index()}', allow_overwrite=True)

    speaker = threading.Thread(target=say, name='leave', daemon=True)  # where the coordinator is gone the call does not return
    speaker.start()
    speaker.join(SAY_S)


def end_for_loss(watch: Guardian, who: str) -> None:
    """Ends this process because another one is gone: no step can be finished any more. If all were to stop, it has stopped."""
    if watch.stopped is not None:
        told = f'stopped by {watch.stopped}; {who} of this run was gone before this one'
        watch.end('StoppedError', ExitCode.STOPPED, f'{told}\n  fix: the same command goes on from the last checkpoint')
    told = f'{who} of this run is lost, so that no step can be finished'
    watch.end(
        'PeerLostError', ExitCode.PEER_LOST, f'{told}\n  fix: start all processes again; they go on from the last checkpoint'
    )


@contextlib.contextmanager
def together(watch: Guardian) -> Iterator[None]:
    """Inside, what a collective operation raises, or aborts for, because a process is gone ends this one, with a reason."""
    if not hosts.is_alone():
        _explain_aborts(watch)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not hosts.is_alone() and _is_loss(error):
            end_for_loss(watch, 'another process')
        if not hosts.is_alone() and isinstance(error, (FulcrumError, KeyboardInterrupt)) and not isinstance(error, SHARED):
            # All hear why, and the others go before their coordinator does.
            time.sleep(LEAVE_S if hosts.is_main() else 5 * hosts.POLL_S)
            watch.end(type(error).__name__, exit_code(error), explain(error)[0])  # nobody else is at this point: wait for none
        raise


def _explain_aborts(watch: Guardian) -> None:
    """Has the process say why, and record its end, before an abort of C++ (gloo, jax' heartbeat) takes it."""

    def aborted(number: int) -> None:
        del number
        end_for_loss(watch, 'most likely another process')

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    _kept.append(handler)  # C holds no reference
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


_kept: list[Any] = []


def _is_loss(error: BaseException) -> bool:
    return any(word in str(error) for word in LOSS)
