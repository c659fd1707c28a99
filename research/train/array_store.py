"""Trees of arrays on disk, by Orbax: written in the background, read back into the shardings that are asked for.

Orbax checks its own metadata but no array data (a flipped bit in an array is read silently wrong), so that whoever reads must
compare fingerprints: `checkpoint.py` does.
"""

import contextlib
import functools
import gc
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from research.parallel import hosts
from research.train.manifest import CorruptError

# What a read can fail for without any fault of the files: no reason to put a checkpoint away.
ENVIRONMENT = (PermissionError, MemoryError, KeyboardInterrupt)
TRANSIENT = (
    'RESOURCE_EXHAUSTED',
    'UNAVAILABLE',
    'DEADLINE_EXCEEDED',
    'PERMISSION_DENIED',
    'out of memory',
    'Too many open files',
)


ECHOES = ('Event loop is closed', 'Encountered error while reading array index')


@functools.cache
def _orbax() -> Any:
    """Orbax, when something is first saved or read: no first step should wait for its import."""
    import orbax.checkpoint

    # What fails is reported once, in plain words. Orbax logs it too, with tracebacks, from its threads and at any time.
    logging.getLogger('absl').addFilter(lambda record: f'{os.sep}orbax{os.sep}' not in record.pathname)
    return orbax.checkpoint


class ArrayStore:
    """Writes one tree at a time and reads any number."""

    def __init__(self) -> None:
        self._writer: Any = None  # an AsyncCheckpointer, from the first save on
        self._meeting: hosts.Meeting | None = None  # of the save that is under way

    def begin(self, path: pathlib.Path, tree: Any) -> None:
        """Starts to write; returns as soon as the arrays are copied off the devices."""
        self._meeting = hosts.Meeting()
        if self._writer is None:
            ocp = _orbax()
            options = ocp.options.AsyncOptions(barrier_sync_fn=self._arrive)
            self._writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=options)
        with self._failing_together():
            self._writer.save(path.absolute(), args=_orbax().args.PyTreeSave(tree), force=True)

    def finish(self) -> None:
        """Waits until what was begun is written, by all processes; raises what went wrong."""
        if self._writer is not None:
            with self._failing_together():
                self._writer.wait_until_finished()

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            if self._meeting is not None:
                self._meeting.fail()  # else the other processes would wait for this one until Orbax' 20 minutes are over
            raise

    def _arrive(self, *, key: str, timeout_ms: int) -> None:
        assert self._meeting is not None
        self._meeting.arrive(key, timeout_ms)

    def close(self) -> None:
        """Ends the threads of Orbax."""
        if self._writer is not None:
            with contextlib.suppress(Exception):
                self._writer.close()
            self._writer = None


def restore(path: pathlib.Path, abstract: Any) -> Any:
    """The tree in `path` as arrays like `abstract`: shapes, dtypes and shardings.

    Raises:
      CorruptError: it cannot be read, and not for want of memory or permission.
    """
    ocp = _orbax()
    arguments = ocp.args.PyTreeRestore(item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
    return _read(path, arguments)


def structure(path: pathlib.Path) -> Any:
    """The tree in `path`, its leaves descriptions of arrays. Tuples come back as lists.

    Raises:
      CorruptError: see `restore`.
    """
    return _attempt(lambda reader: reader.metadata(path.absolute()).item_metadata.tree)


def read(path: pathlib.Path, tree: Any) -> Any:
    """The leaves that `tree`, a part of `structure(path)`, names, as numpy arrays.

    Raises:
      CorruptError: see `restore`.
    """
    ocp = _orbax()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return _read(path, ocp.args.PyTreeRestore(item=tree, restore_args=as_numpy, partial_restore=True))


def _read(path: pathlib.Path, arguments: Any) -> Any:
    return _attempt(lambda reader: reader.restore(path.absolute(), args=arguments))


def _attempt(action: Callable[[Any], Any]) -> Any:
    """What an action of Orbax gives; what it raises is called corrupt, unless the machine is to blame."""
    ocp = _orbax()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        try:
            return action(reader)
        except ENVIRONMENT:
            raise
        except Exception as error:
            if any(word in str(error) for word in TRANSIENT):
                raise
            reason = ' '.join(str(error).split())[:160] or type(error).__name__
    _collect()
    raise CorruptError(f'its arrays cannot be read ({reason})')


def _collect() -> None:
    """Drops the reads that Orbax left under way when one failed; Python would print each of them, at some later time."""
    before, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = before


# asyncio would print each write that failed again when it forgets the task.
FORGOTTEN = ('async_serialize', 'OCDBT', 'tensorstore')


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record of asyncio is of something else than a write that failed."""
    message, error = record.getMessage(), (record.exc_info or (None, None))[1]
    is_write = 'never retrieved' in message and isinstance(error, OSError)
    return not is_write and not any(word in message for word in FORGOTTEN)


logging.getLogger('asyncio').addFilter(_is_news)


def _hear_no_echo() -> None:
    """Has Python not print what threads of tensorstore still say when a write or read that failed has been reported."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not str(unraisable.exc_value).startswith(ECHOES):
            before(unraisable)

    sys.unraisablehook = hook


_hear_no_echo()
