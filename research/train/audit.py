"""The replay audit: now and then a step is taken twice, and must give the same bits; if not, a device computes wrong.

The two results are compared shard by shard, and replicas of one leaf with each other, so that the device can be named. Where
they differ the step is taken a third time, and training goes on from the result that two of them share. A step is a pure
function of state and batch, so nothing but a fault can make them differ, given that the backend is deterministic (on GPUs only
with `XLA_FLAGS=--xla_gpu_deterministic_ops=true`). It costs one step and two copies of the state every `train.audit_every`.

A fault that is always the same on one device, in every replica, is not seen by this.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.core import leaves
from research.core.terms import Packed
from research.parallel import hosts
from research.train.fingerprint import digest
from research.train.state import TrainState
from research.train.step import Batch, CompiledStep

Shards = dict[tuple[str, str, str], tuple[int, int]]  # (leaf, place in the array, device) -> fingerprint


class Audit:
    """A step that is now and then taken twice; `report(step, problems)` hears of differences.

    By the number of the step, so that a run of many short lives is audited as one long one. `begin` says at which it begins.

    Attributes:
      steps: how many were audited.
      differences: how many of them gave other bits.
    """

    def __init__(self, step: CompiledStep, every: int, report: Callable[[int, list[str]], None]):
        self.step, self.every, self.report = step, every, report
        self.steps, self.differences, self._done = 0, 0, 0

    def begin(self, step: int) -> None:
        """The next call takes the run beyond `step` steps."""
        self._done = step

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Packed]:
        self._done += 1
        if not self.every or self._done % self.every:
            return self.step(state, batch)
        spare = _copied(state)
        first, again = self.step(_copied(state), batch), self.step(state, batch)
        return self._compared(int(spare.step), spare, batch, first, again)

    def _compared(
        self, number: int, spare: TrainState, batch: Batch, first: tuple[TrainState, Packed], again: tuple[TrainState, Packed]
    ) -> tuple[TrainState, Packed]:
        self.steps += 1
        one, two = shards(first[0]), shards(again[0])
        if hosts.all_true(one == two and not replicas(two)):
            return again
        self.differences += 1
        third = self.step(spare, batch)
        three = shards(third[0])
        # In all processes the same choice, also in those that saw nothing: it is one state.
        votes = hosts.gather((three == two, three == one))
        if all(as_again for as_again, _ in votes):
            chosen, odd = again, one
        elif all(as_first for _, as_first in votes):
            chosen, odd = first, two
        else:
            chosen, odd = third, two
        told = hosts.gather(problems(odd, three) + replicas(odd))
        self.report(number, [problem for own in told for problem in own])
        return chosen


def shards(state: TrainState) -> Shards:
    """The fingerprint of every shard that lies in this process."""
    found = {}
    for name, leaf in leaves.flat(state).items():
        for shard in leaf.addressable_shards:
            place = ','.join(f'{s.start or 0}:{"" if s.stop is None else s.stop}' for s in shard.index)
            found[name, place, str(shard.device)] = digest(shard.data)
    return {key: tuple(np.asarray(value).tolist()) for key, value in found.items()}


def problems(odd: Shards, right: Shards) -> list[str]:
    """Where two results differ, in words."""
    return [f'{name} on {device}' for (name, place, device), value in odd.items() if right[name, place, device] != value]


def replicas(found: Shards) -> list[str]:
    """Where the replicas of a shard differ among the devices: those that are not like most."""
    groups: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    for (name, place, device), value in found.items():
        groups.setdefault((name, place), {})[device] = value
    told = []
    for (name, _), values in groups.items():
        usual = max(set(values.values()), key=list(values.values()).count)
        told += [f'{name} on {device} is not like its replicas' for device, value in values.items() if value != usual]
    return told


def _copied(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)
