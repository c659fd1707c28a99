"""How far the host runs ahead of the devices: steps that are dispatched, and not yet known to be done.

Where the device is a core of the host, each time that Python wakes it finds its own code and data driven out of the caches by
the step before. There it takes short steps in bursts, and sleeps until all but `LEAST` are done: what it does for a step of the
reference program costs half as much (`python -m bench.loop_profile`). It changes no number.
"""

import collections
import time
from typing import Any

import jax
from jax.sharding import Mesh

from research.core import guardian
from research.data.pipeline import Batch, fitting

LEAST = 2  # more can dead-lock simulated devices, and hide which step is slow
MOST, BURST_S = 16, 1.0  # steps of a burst, and its seconds at the pace of the burst before


class InFlight:
    """The results of the newest steps. After each step `add` waits until few enough are in flight.

    Steps that become slow without warning are `MOST` in flight once: whoever asks the run to stop waits for all of them.
    """

    def __init__(self, mesh: Mesh):
        is_one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == 'cpu'
        self.burst = MOST if is_one_cpu else 0  # steps that may follow each other without a look at them
        self._results: collections.deque[Any] = collections.deque()
        self._most, self._since = LEAST, time.monotonic()

    def add(self, result: Any, batch: Batch) -> None:
        """`result` and `batch`, of arrays, are those of the step that was just dispatched."""
        self._results.append(result)
        if len(self._results) <= self._most:
            return
        due = [self._results.popleft() for _ in range(len(self._results) - LEAST)]
        begun = time.monotonic()
        jax.block_until_ready(due[0])
        is_slow = time.monotonic() - begun > BURST_S / MOST
        for late in due[1:] if is_slow else due[-1:]:
            jax.block_until_ready(late)
            guardian.beat()  # a burst of steps that have become slow is no hang
        if self.burst:
            now = time.monotonic()
            pace, self._since = (now - self._since) / len(due), now
            # A batch lives until its step is done.
            self._most = max(LEAST, fitting(batch, min(self.burst, int(BURST_S / max(pace, 1e-6)))))
