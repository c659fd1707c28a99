"""The batch pipeline: `feed(step) -> Batch` of arrays on the devices, a pure function of the step.

Shape letters: B global batch.

    batch = feed(7)         # {'image': (B, H, W, C) uint8, 'label': (B,), 'mask': (B,) float32, 'id': (B,), 'epoch': (B,)}

`HostFeed` reads blocks from a source in host memory (or on disk) and sends them to the devices; `DeviceFeed` keeps a small
data set on every device and sends only indices. `Prefetcher` runs either ahead in a thread; it changes nothing but the wait.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from research.core.errors import UsageError
from research.data.bad_records import BAD
from research.data.buckets import Buckets
from research.data.plan import Plan
from research.data.source import Source

Batch = dict[str, Any]
Feed = Callable[[int], Batch]

LOOK_UP_S = 0.1  # between two calls of `waiting`
LEAVE_S = 1.0
BUFFER_BYTES = 2**28  # of the batches of a burst


def _local(plan: Plan, step: int) -> tuple[np.ndarray, Batch]:
    """The contiguous share of a step that falls to this process: its indices, and what every batch holds beside examples."""
    indices, epochs, mask = plan.batch(step)
    size = plan.batch_size // jax.process_count()
    share = slice(jax.process_index() * size, (jax.process_index() + 1) * size)
    indices = indices[share]
    return indices, {'mask': mask[share], 'id': indices.astype(np.int32), 'epoch': epochs[share].astype(np.int32)}


class HostFeed:
    """Reads each process's share of a batch from `source` and puts it on the devices under `sharding`."""

    def __init__(self, source: Source, plan: Plan, sharding: jax.sharding.Sharding):
        self.source, self.plan, self._place = source, plan, placing(sharding)

    def __call__(self, step: int) -> Batch:
        indices, rest = _local(self.plan, step)
        return self._place(without_bad({**self.source[indices], **rest}))


def placing(sharding: jax.sharding.Sharding) -> Callable[[Batch], Batch]:
    """How a block of this process gets under `sharding`.

    One CPU device reads the host's memory: nothing is moved, and a compiled step takes numpy arrays as they are. They are made
    for that step alone, so nobody changes them while it runs.
    """
    if jax.process_count() > 1:
        return lambda block: {k: jax.make_array_from_process_local_data(sharding, v) for k, v in block.items()}
    if len(sharding.device_set) == 1 and next(iter(sharding.device_set)).platform == 'cpu':
        return lambda block: {k: np.asarray(v, jax.dtypes.canonicalize_dtype(v.dtype)) for k, v in block.items()}
    return lambda block: jax.device_put(block, sharding)


class DeviceFeed:
    """Keeps all of `source` on every device; a step sends B indices, and the devices gather their own rows.

    Raises:
      UsageError: the rows are in buckets, whose widths differ.
    """

    def __init__(self, source: Source, plan: Plan, sharding: jax.sharding.NamedSharding):
        if isinstance(source, Buckets):
            raise UsageError(
                "config.data.placement='device' would undo the buckets: it keeps all rows at the width of the longest",
                "set config.data.placement='host', or leave buckets out",
            )
        self.plan, self._place = plan, placing(sharding)
        everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        self._arrays = jax.device_put(source[np.arange(len(source))], everywhere)
        self._gather = jax.jit(_gather, out_shardings=sharding)

    def __call__(self, step: int) -> Batch:
        _, rest = _local(self.plan, step)
        return self._gather(self._arrays, self._place(rest))


def _gather(arrays: Batch, rest: Batch) -> Batch:
    return without_bad({**{k: v[rest['id']] for k, v in arrays.items()}, **rest})


def without_bad(batch: Batch) -> Batch:
    """The batch with mask 0, (B,) or (B, T), in the rows that are 'bad' (B,) bool; of those only what counted stays bad."""
    if BAD not in batch:
        return batch
    mask = batch['mask']
    bad = batch[BAD] & (mask.reshape(len(mask), -1) > 0).any(axis=1)  # a row of padding counts as nothing
    kept = ~batch[BAD].reshape(-1, *(1,) * (mask.ndim - 1))  # (B,) or (B, 1)
    return {**batch, 'mask': mask * kept, BAD: bad}


def fitting(batch: Batch, most: int) -> int:
    """How many batches like this, up to `most`, have `BUFFER_BYTES` at most together."""
    return min(most, BUFFER_BYTES // max(sum(array.nbytes for array in batch.values()), 1))


class Prefetcher:
    """Runs a feed `depth` steps ahead in a background thread. Steps must be asked for in order, starting at `start`.

    It runs up to `burst` steps ahead where so many batches fit (`fitting`): who takes many at once then wakes it but once.
    `waiting` is called now and then while the caller has to wait; it may leave by an exception.
    An error in the thread is raised in the caller, at the step it belongs to. It is a context manager: the thread ends with it,
    or, where it is in the middle of a read that takes longer than `LEAVE_S`, after that read.
    """

    def __init__(self, feed: Feed, start: int, depth: int, waiting: Callable[[], None] = lambda: None, burst: int = 0):
        self.feed, self.depth, self.waiting, self.burst = feed, depth, waiting, burst
        self._next = start
        self._queue: queue.Queue[tuple[int, Batch | BaseException]] = queue.Queue(maxsize=max(depth, 1))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start,), name='prefetch', daemon=True)
        if depth:
            self._thread.start()

    def __call__(self, step: int) -> Batch:
        if not self.depth:
            return self.feed(step)
        if step != self._next:
            raise ValueError(f'prefetched batches come in order: expected step {self._next}, asked for {step}')
        batch = self._wait()
        if isinstance(batch, BaseException):
            raise batch
        self._next += 1
        return batch

    def _wait(self) -> Batch | BaseException:
        while True:
            try:
                return self._queue.get(timeout=LOOK_UP_S)[1]
            except queue.Empty:
                self.waiting()

    def __enter__(self) -> 'Prefetcher':
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        end = time.monotonic() + LEAVE_S  # who was asked to stop has a state to save, and cannot wait for a disk that hangs
        while self._thread.is_alive() and time.monotonic() < end:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _work(self, step: int) -> None:
        while not self._stop.is_set():
            try:
                batch: Batch | BaseException = self.feed(step)
                if self.burst:
                    self._queue.maxsize = max(self.depth, fitting(batch, self.burst))
            except BaseException as error:  # noqa: BLE001 - handed to the caller, who raises it
                batch = error
            if self._stop.is_set():
                return
            self._queue.put((step, batch))
            if isinstance(batch, BaseException):
                return
            step += 1


def make_feed(source: Source, plan: Plan, sharding: jax.sharding.NamedSharding, placement: str) -> Feed:
    """The feed for `placement` 'host' or 'device'."""
    return {'host': HostFeed, 'device': DeviceFeed}[placement](source, plan, sharding)
