"""The processes of one run: one by default. What only one of them may do, and what all of them must know.

    start('auto')                       # joins the other processes, where the environment names them
    share(value)                        # the main process's value, in every process
    gather(value)                       # the value of every process, in every process

Several processes talk through the key-value store of jax' coordination service. What they do at the same step: `votes.py`; how
they notice that one is gone: `peers.py`.
"""

import contextlib
import json
import os
import time
from typing import Any

import jax

from research.core.errors import UsageError

POLL_S = 0.1
HEARTBEAT_S = 10  # jax' own; its default of 100 s lets survivors wait that long
WAIT_MS = 3_600_000  # an hour: the watchdog bounds waits
ROOM = 'fulcrum'
MEETINGS = 4  # an earlier one is over everywhere
_numbers = {'share': 0, 'gather': 0, 'meeting': 0}


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
    key = f'{ROOM}/share/{_numbers["share"]}'
    if is_main():
        client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(client().blocking_key_value_get(key, WAIT_MS))


def gather(value: Any) -> list[Any]:
    """The values (of JSON) of all processes, in their order, in each of them. All must call it in the same order."""
    if is_alone():
        return [value]
    _numbers['gather'] += 1
    number = _numbers['gather']
    client().key_value_set(f'{ROOM}/gather/{number}/{index()}', json.dumps(value))
    found = [json.loads(client().blocking_key_value_get(f'{ROOM}/gather/{number}/{i}', WAIT_MS)) for i in range(count())]
    if is_main():  # all are here, so all have read what came before: the store must not grow with the run
        client().key_value_delete(f'{ROOM}/share/')
        client().key_value_delete(f'{ROOM}/gather/{number - 1}/')
    return found


def all_true(flag: bool) -> bool:
    """Whether the flag is set in every process. All must call it in the same order."""
    return all(gather(flag))


class Meeting:
    """Something that all processes finish, or none does. All must make it in the same order.

    `arrive` is a barrier for background threads that ends at once, by an error, where any process has said `fail`.
    """

    def __init__(self) -> None:
        _numbers['meeting'] += 1
        self._room = f'{ROOM}/meeting/{_numbers["meeting"]}'
        if not is_alone() and is_main():
            client().key_value_delete(f'{ROOM}/meeting/{_numbers["meeting"] - MEETINGS}/')

    def fail(self) -> None:
        """Tells all who wait, or will, that this process does not come."""
        if not is_alone():
            with contextlib.suppress(Exception):  # the service is gone: nobody is there to be told
                client().key_value_set(f'{self._room}/failed/{index()}', '', allow_overwrite=True)

    def arrive(self, key: str, timeout_ms: int) -> None:
        """Waits until all processes have come to `key`.

        Raises:
          RuntimeError: another process has failed, or time is over.
        """
        if is_alone():
            return
        place, end = f'{self._room}/at/{key}', time.monotonic() + timeout_ms / 1000
        client().key_value_set(f'{place}/{index()}', '')
        while len(client().key_value_dir_get(f'{place}/')) < count():
            if failed := client().key_value_dir_get(f'{self._room}/failed/'):
                raise RuntimeError(f'process {failed[0][0].rpartition("/")[2]} of this run could not')
            if time.monotonic() > end:
                raise RuntimeError('another process of this run did not come')
            time.sleep(POLL_S)


def client() -> Any:
    """The client of jax' coordination service."""
    return _state().client


def _state() -> Any:
    """What jax.distributed knows. Its key-value store has no public name (jax 0.10 to 0.12)."""
    from jax._src import distributed

    return distributed.global_state
