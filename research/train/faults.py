"""Faults for tests, and for nothing else: the environment variable FULCRUM_FAULTS, read here alone.

    FULCRUM_FAULTS='kill@save:2,nan@7-9'       # dies at the second save; the batches 7 to 9 give NaN

`what@place:n`, at the n-th time (from 1) that a process enters a phase of the clock (`start`, `restore`, `compile`, `data`,
`train`, `evaluate`, `save`) or comes to `manifest` (arrays written, no manifest yet) or `rename` (manifest written, not yet
named): `kill` (SIGKILL), `term`, `int`, `usr1`, `hup` (the signal to itself), `hang` (sleeps), `gil` (sleeps with Python's
lock), `full` (no file may grow any more: RLIMIT_FSIZE), `room` (it may again).
`nan@a-b`, `spike@a-b`, `slow@a-b`: the batches a to b of the plan give NaN, or have other labels, or take a minute each.
`ids@a-b`: tells on standard error which examples these batches hold.
`flip@k`: the first run of step k computes one wrong bit, as a broken device does.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core import files

VARIABLE = 'FULCRUM_FAULTS'
_installed: list[str] = []


def install() -> None:
    """Puts the faults that the environment asks for in their places."""
    text = os.environ.get(VARIABLE, '')
    if not text or _installed:
        return
    _installed.append(text)
    sys.stderr.write(f'warning: faults are injected: {VARIABLE}={text}\n')
    at_places, at_batches = {}, []
    for item in text.split(','):
        what, _, where = item.partition('@')
        place, _, times = where.partition(':')
        if times:
            at_places[place, int(times)] = what
        else:
            first, _, last = where.partition('-')
            at_batches.append((what, int(first), int(last or first)))
    _Places(at_places).install()
    _install_batches([fault for fault in at_batches if fault[0] != 'flip'])
    _install_flips({first for what, first, _ in at_batches if what == 'flip'})


class _Places:
    """Counts how often each place was entered, and strikes."""

    def __init__(self, faults: dict[tuple[str, int], str]):
        self.faults, self.counts = faults, {}

    def install(self) -> None:
        from research.core import clock
        from research.train import manifest

        phase, write, enter = clock.Clock.phase, manifest.write, self.enter

        @contextlib.contextmanager
        def faulty_phase(self: Any, name: str) -> Iterator[None]:
            with phase(self, name):
                enter(name)
                yield

        def faulty_write(*arguments: Any) -> None:
            enter('manifest')
            write(*arguments)
            enter('rename')

        clock.Clock.phase = faulty_phase
        manifest.write = faulty_write

    def enter(self, place: str) -> None:
        """Counts one more, and does what is asked for there."""
        self.counts[place] = self.counts.get(place, 0) + 1
        what = self.faults.get((place, self.counts[place]))
        if what is not None:
            sys.stderr.write(f'struck {time.time():.3f} {what} at {place}\n')
            STRIKES[what]()


def _signal(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _limit(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


STRIKES: dict[str, Callable[[], Any]] = {
    'kill': _signal(signal.SIGKILL),
    'term': _signal(signal.SIGTERM),
    'int': _signal(signal.SIGINT),
    'usr1': _signal(signal.SIGUSR1),
    'hup': _signal(signal.SIGHUP),
    'hang': lambda: time.sleep(3600),
    'gil': lambda: ctypes.PyDLL(None).sleep(3600),
    'full': _limit(64),
    'room': _limit(resource.RLIM_INFINITY),
}


def _install_batches(faults: list[tuple[str, int, int]]) -> None:
    """Has batches of the plan go wrong, by their number in the plan: what is left out is left out with its fault."""
    if not faults:
        return
    from research.train import loop, rollback

    make_feed = loop.make_feed

    def faulty(source: Any, plan: Any, sharding: Any, placement: str) -> Callable[[int], Any]:
        feed = make_feed(source, plan, sharding, placement)
        history = plan.history if isinstance(plan, rollback.Shifted) else []
        if not (hasattr(plan, 'seed') or isinstance(plan, rollback.Shifted)):
            return feed  # an evaluation

        def faulty_feed(step: int) -> Any:
            batch = feed(step)
            number = rollback.shifted(step, history)
            for what, first, last in faults:
                if first <= number <= last:
                    batch = BATCHES[what](batch, step)
            return batch

        return faulty_feed

    loop.make_feed = faulty


def _nan(batch: dict[str, Any], step: int) -> dict[str, Any]:
    del step
    return {**batch, 'mask': batch['mask'] * np.float32(np.nan)}


def _spike(batch: dict[str, Any], step: int) -> dict[str, Any]:
    del step
    return {**batch, 'label': (batch['label'] + 1) % 10}


def _slow(batch: dict[str, Any], step: int) -> dict[str, Any]:
    del step
    time.sleep(60)
    return batch


def _ids(batch: dict[str, Any], step: int) -> dict[str, Any]:
    parts = [batch['id']] if isinstance(batch['id'], np.ndarray) else [shard.data for shard in batch['id'].addressable_shards]
    mine = [np.asarray(part).tobytes() for part in parts]
    sys.stderr.write(f'ids {step} {files.digest(mine)}\n')
    return batch


BATCHES = {'nan': _nan, 'spike': _spike, 'slow': _slow, 'ids': _ids}


def _install_flips(steps: set[int]) -> None:
    """Has the compiled step give one wrong bit in its first leaf of parameters, once for each of `steps`."""
    if not steps:
        return
    from research.parallel import compile as compilation

    lower = compilation.lower_step

    def faulty(*arguments: Any) -> Any:
        finish = lower(*arguments)
        return lambda: _flipping(finish(), steps)

    compilation.lower_step = faulty


def _flipping(step: Any, steps: set[int]) -> Any:
    def faulty(state: Any, batch: Any) -> Any:
        number = int(state.step)
        new, terms = step(state, batch)
        if number not in steps:
            return new, terms
        steps.discard(number)
        leaves, structure = jax.tree.flatten(new.params)
        return new.replace(params=jax.tree.unflatten(structure, [_flipped(leaves[0]), *leaves[1:]])), terms

    return faulty


def _flipped(leaf: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    flipped = words.at[(0,) * words.ndim].set(words[(0,) * words.ndim] ^ np.uint32(1 << 12))
    return jax.device_put(jax.lax.bitcast_convert_type(flipped, leaf.dtype), leaf.sharding)
