"""The processes of one run: one by default. What only one of them may do, and what all of them must agree on.

    start('auto')                       # joins the other processes, where the environment names them
    share(value)                        # the main process's value, in every process
    votes = Votes(...); votes.request('stop'); ...; votes.agreed('stop')      # True after the same step in every process

Several processes talk through the key-value store of jax' coordination service. *Votes*: a request gets a number; a thread in
each process notices it within `POLL_S` and publishes the next boundary (call of `agreed`) that its main thread has not passed;
the largest of these is the boundary at which all do it. A main thread that comes to a boundary while a vote is open waits there
until all have published, so that none can be too far. *Signs of life*: the main process watches the counters of all, all watch
the main one's; a process that is silent for `LOST_S` is lost, and the rest ends with 134 and a plain reason. (jax' own
heartbeat aborts in C++ two seconds later, should Python be stuck.)
"""

import contextlib
import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from research.core.errors import (
    ExitCode,
    FulcrumError,
    Interrupted,
    NumericalError,
    StoppedError,
    UsageError,
    exit_code,
    explain,
)
from research.core.guardian import Guardian

POLL_S = 0.1
BEAT_S = 1.0
LOST_S = 6.0
HEARTBEAT_S = 10  # jax' own; its default of 100 s lets survivors wait that long
LEAVE_S = 4.0
SHARED = (StoppedError, NumericalError)  # raised by all processes at the same step
WAIT_MS = 3_600_000  # an hour: the watchdog bounds waits
ROOM = 'fulcrum'
END_MS = 5_000
_numbers = {'share': 0, 'all': 0, 'end': 0}


def start(mode: str) -> None:
    """Joins the other processes of the run: 'on', 'off', or 'auto' where the environment names them.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say it outright; else jax finds Slurm, Open MPI, TPU pods and
    Kubernetes. Must come before anything asks jax for devices.

    Raises:
      UsageError: they cannot be found.
    """
    if mode == 'off' or (mode == 'auto' and not _is_described()) or jax.distributed.is_initialized():
        return
    given = {name: os.environ.get(f'JAX_{name.upper()}') for name in ('num_processes', 'process_id')}
    numbers = {name: None if text is None else int(text) for name, text in given.items()}
    jax.config.update('jax_enable_preemption_service', False)  # it would swallow SIGTERM
    try:
        jax.distributed.initialize(
            None,
            numbers['num_processes'],
            numbers['process_id'],
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f'the processes of this run do not find each other: {str(error)[:200]}',
            'set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or config.parallel.distributed=off',
        ) from error


def _is_described() -> bool:
    """Whether the environment speaks of more than one process."""
    many = [os.environ.get(name, '1') for name in ('JAX_NUM_PROCESSES', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')]
    return (
        'JAX_COORDINATOR_ADDRESS' in os.environ
        or any(text.isdigit() and int(text) > 1 for text in many)
        or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
    )


def index() -> int:
    """The number of this process; known before jax looks for devices."""
    return _state().process_id or 0


def count() -> int:
    """How many processes the run has."""
    return _state().num_processes or 1


def is_main() -> bool:
    """Whether this process writes what the run tells: records, events, manifests."""
    return index() == 0


def is_alone() -> bool:
    """Whether this process is the whole run."""
    return count() == 1


def share(value: Any) -> Any:
    """The value (of JSON) that the main process has, in every process. All must call it in the same order."""
    if is_alone():
        return value
    _numbers['share'] += 1
    client, key = _client(), f'{ROOM}/share/{_numbers["share"]}'
    if is_main():
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(key, WAIT_MS))


def all_true(flag: bool) -> bool:
    """Whether the flag is set in every process. All must call it in the same order."""
    if is_alone():
        return flag
    _numbers['all'] += 1
    client, room = _client(), f'{ROOM}/all/{_numbers["all"]}'
    client.key_value_set(f'{room}/{index()}', str(int(flag)))
    found = [client.blocking_key_value_get(f'{room}/{i}', WAIT_MS) for i in range(count())]
    return '0' not in found


class Votes:
    """What the processes of a run agree to do at the same boundary, whoever asks for it: 'stop', 'save'. A context manager.

    `agreed` must be called equally often in every process; each call is a boundary. `watch` hears when another process was
    asked to stop, and ends this one when another is lost.
    """

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
            if is_alone():
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
            alone, number, boundary = is_alone(), self._open.get('stop'), self._passed.get('stop', 0)
            wanted = 'stop' in self._wanted
        if (alone and wanted) or (not alone and number is not None and boundary == self._target('stop', number)):
            self.leave_if_agreed()

    def __enter__(self) -> 'Votes':
        if not is_alone():
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._thread.ident is not None:
            with contextlib.suppress(Exception):  # none may leave while others still watch for its signs of life
                _client().wait_at_barrier(f'{ROOM}/end/{_numbers["end"]}', END_MS)
            _numbers['end'] += 1
            self._close.set()
            self._thread.join()

    def _target(self, what: str, number: int) -> int:
        """The boundary of a vote: the largest that any process published."""
        keys = [f'{ROOM}/at/{what}/{number}/{i}' for i in range(count())]
        return max(int(_client().blocking_key_value_get(key, WAIT_MS)) for key in keys)

    def _work(self) -> None:
        life = _Life()
        while not self._close.wait(POLL_S):
            try:
                self._ask()
                self._answer()
                lost = life.look()
            except Exception as error:  # noqa: BLE001 - the service is gone, and with it the main process
                lost = f'the main process ({" ".join(str(error).split())[:80]})'
            if lost is not None and not self._close.is_set():
                end_for_loss(self._watch, lost)

    def _ask(self) -> None:
        with self._lock:
            asked = {what: self._held.get(what, 0) + 1 for what in self._wanted if what not in self._open}
        for what, number in asked.items():
            name = self._watch.stopped or ''
            _client().key_value_set(f'{ROOM}/vote/{what}/{number}', name, allow_overwrite=True)

    def _answer(self) -> None:
        for key, name in _client().key_value_dir_get(f'{ROOM}/vote/'):
            what, number = key.split('/')[-2], int(key.split('/')[-1])
            with self._lock:
                if what in self._open or number != self._held.get(what, 0) + 1:
                    continue  # one after the other: who is ahead may ask anew before this process has come to the boundary
                self._open[what] = number
                boundary = self._passed.get(what, 0)
                # Inside the lock: the main thread must not pass a boundary that is being published.
                _client().key_value_set(f'{ROOM}/at/{what}/{number}/{index()}', str(boundary))
            if what == 'stop':
                self._watch.request(name or 'another process')


class _Life:
    """The signs of life of the processes, as this one sees them."""

    def __init__(self) -> None:
        self._count, self._due = 0, 0.0
        watched = range(count()) if is_main() else [0]
        self._seen = {i: ('', time.monotonic()) for i in watched if i != index()}

    def look(self) -> str | None:
        """Gives a sign of life, looks for others', and names a process that is lost."""
        now = time.monotonic()
        if now < self._due:
            return None
        self._due, self._count = now + BEAT_S, self._count + 1
        _client().key_value_set(f'{ROOM}/alive/{index()}', str(self._count), allow_overwrite=True)
        found = dict(_client().key_value_dir_get(f'{ROOM}/alive/'))
        for i, (text, since) in self._seen.items():
            sign = found.get(f'{ROOM}/alive/{i}', '')
            if sign != text:
                self._seen[i] = sign, now
            elif text and now - since > LOST_S:
                _client().key_value_set(f'{ROOM}/lost/{i}', f'process {i}', allow_overwrite=True)
                return f'process {i}'
        return next((name for _, name in _client().key_value_dir_get(f'{ROOM}/lost/')), None)


def leave() -> None:
    """Tells the others that this process goes, alone: they need not wait for its signs of life."""
    if is_alone():
        return

    def say() -> None:
        with contextlib.suppress(Exception):
            _client().key_value_set(f'{ROOM}/lost/{index()}', f'process {index()}', allow_overwrite=True)

    speaker = threading.Thread(target=say, name='leave', daemon=True)  # where the coordinator is gone the call does not return
    speaker.start()
    speaker.join(END_MS / 1000 / 2)


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
    if not is_alone():
        _explain_aborts(watch)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not is_alone() and _is_loss(error):
            end_for_loss(watch, 'another process')
        if not is_alone() and isinstance(error, (FulcrumError, KeyboardInterrupt)) and not isinstance(error, SHARED):
            time.sleep(LEAVE_S if is_main() else 5 * POLL_S)  # all hear why, and the others go before their coordinator does
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
    words = (
        'Gloo',
        'Connection reset',
        'Connection closed',
        'coordination service',
        'CoordinationService',
        'UNAVAILABLE',
        'NCCL',
    )
    return any(word in str(error) for word in words)


def _client() -> Any:
    """The client of jax' coordination service."""
    return _state().client


def _state() -> Any:
    """What jax.distributed knows. Its key-value store has no public name (jax 0.10 to 0.12)."""
    from jax._src import distributed

    return distributed.global_state
