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

LEAST = 2  # more can dead-lock simulated devices, and hide which step is slow
MOST, BURST_S = 16, 1.0  # steps and seconds of a burst: who asks a run to stop waits for no more


class InFlight:
    """The results of the newest steps. After each step `add` waits until few enough are in flight."""

    def __init__(self, mesh: Mesh):
        self._may_burst = mesh.size == 1 and mesh.devices.flat[0].platform == 'cpu'
        self._results: collections.deque[Any] = collections.deque()
        self._most, self._since = LEAST, time.monotonic()

    def add(self, result: Any) -> None:
        """`result`, of arrays, is that of the step that was just dispatched."""
        self._results.append(result)
        if len(self._results) <= self._most:
            return
        done = 0
        while len(self._results) > LEAST:
            last, done = self._results.popleft(), done + 1
        jax.block_until_ready(last)
        if self._may_burst:
            now = time.monotonic()
            pace, self._since = (now - self._since) / done, now
            self._most = min(max(int(BURST_S / max(pace, 1e-6)), LEAST), MOST)
