"""How many steps may be in flight, by a device that is played: it does a step only when somebody waits for it."""

import itertools

import numpy as np
import pytest

from research.data.pipeline import BUFFER_BYTES
from research.parallel.mesh import make_mesh
from research.train import in_flight
from research.train.in_flight import BURST_S, LEAST, MOST, InFlight


class Device:
    """Its steps take `pace` seconds; `ahead` is how many were in flight each time that somebody began to wait."""

    def __init__(self, monkeypatch, pace):
        self.pace, self.now, self.given, self.done, self.ahead = pace, 0.0, 0, 0, []
        monkeypatch.setattr(in_flight.time, 'monotonic', lambda: self.now)

    def step(self):
        self.given += 1
        return Result(self, self.given)


class Result:
    def __init__(self, device, number):
        self.device, self.number = device, number

    def block_until_ready(self):
        if self.number > self.device.done:
            self.device.ahead.append(self.device.given - self.device.done)
            self.device.now += self.device.pace * (self.number - self.device.done)
            self.device.done = self.number
        return self


TINY = {'image': np.zeros((32, 8), np.uint8), 'mask': np.zeros(32, np.float32)}


def waits(device, mesh, steps, batch=TINY):
    """How many steps were in flight when the host went to sleep for a step that was not done."""
    host = InFlight(mesh)
    for _ in range(steps):
        host.add(device.step(), batch)
    return device.ahead


def longest(device):
    """The most steps that were in flight each time that the host had waited for enough of them."""
    return [n for n, before in zip(device.ahead, [0, *device.ahead], strict=False) if n >= before]


def test_short_steps_on_one_cpu_are_taken_in_bursts(monkeypatch):
    found = waits(Device(monkeypatch, 0.001), make_mesh(1), 100)
    assert found[0] == LEAST + 1
    assert set(found[1:]) == {MOST + 1, MOST}  # for the first of a burst, and then for the last
    assert len(found) < 2 * (100 / (MOST - LEAST) + 2)  # it sleeps long


@pytest.mark.parametrize(('pace', 'most'), [(BURST_S / 5.5, 5), (BURST_S, LEAST), (30.0, LEAST)])
def test_a_burst_lasts_no_longer_than_its_bound(pace, most, monkeypatch):
    device = Device(monkeypatch, pace)
    waits(device, make_mesh(1), 60)
    assert set(longest(device)[1:]) == {most + 1}


def test_steps_that_become_slow_end_the_bursts(monkeypatch):
    device = Device(monkeypatch, 0.001)
    beats, waited = [], []
    monkeypatch.setattr(in_flight.guardian, 'beat', lambda: beats.append(device.now))
    host = InFlight(make_mesh(1))
    for step in range(200):
        device.pace, before = 0.001 if step < 100 else 5.0, device.now
        host.add(device.step(), TINY)
        waited.append(device.now - before)
    assert MOST + 1 in device.ahead
    assert device.ahead[-1] == LEAST + 1
    assert max(waited) == pytest.approx((MOST + 1 - LEAST) * 5.0)  # one burst that nobody could foresee
    assert sum(wait > 2 * 5.0 for wait in waited) == 1
    assert max(b - a for a, b in itertools.pairwise(beats)) <= 2.001 * 5.0  # and it is no hang


def test_large_batches_are_few(monkeypatch):
    device = Device(monkeypatch, 0.001)
    batch = {'image': np.broadcast_to(np.uint8(0), (BUFFER_BYTES // 4,)), 'mask': np.zeros(1, np.float32)}
    waits(device, make_mesh(1), 60, batch)
    assert max(longest(device)) == 3 + 1  # a fourth would be some bytes too many


def test_several_devices_get_no_bursts(monkeypatch):
    assert set(waits(Device(monkeypatch, 0.001), make_mesh(2), 100)) == {LEAST + 1}
