"""How many steps may be in flight, by a device that is played: it does a step only when somebody waits for it."""

import pytest

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
        self.device.ahead.append(self.device.given - self.device.done)
        self.device.now += self.device.pace * (self.number - self.device.done)
        self.device.done = self.number
        return self


def waits(device, mesh, steps):
    """How many steps were in flight when the host went to sleep."""
    host = InFlight(mesh)
    for _ in range(steps):
        host.add(device.step())
    return device.ahead


def test_short_steps_on_one_cpu_are_taken_in_bursts(monkeypatch):
    found = waits(Device(monkeypatch, 0.001), make_mesh(1), 100)
    assert found[0] == LEAST + 1
    assert set(found[1:]) == {MOST + 1}
    assert len(found) < 100 / (MOST - LEAST) + 2  # it sleeps long


@pytest.mark.parametrize(('pace', 'most'), [(BURST_S / 5.5, 5), (BURST_S, LEAST), (30.0, LEAST)])
def test_a_burst_lasts_no_longer_than_its_bound(pace, most, monkeypatch):
    found = waits(Device(monkeypatch, pace), make_mesh(1), 60)
    assert set(found[1:]) == {most + 1}


def test_steps_that_become_slow_end_the_bursts(monkeypatch):
    device = Device(monkeypatch, 0.001)
    host = InFlight(make_mesh(1))
    for step in range(200):
        device.pace = 0.001 if step < 100 else 1.0
        host.add(device.step())
    assert MOST + 1 in device.ahead
    assert device.ahead[-1] == LEAST + 1


def test_several_devices_get_no_bursts(monkeypatch):
    assert set(waits(Device(monkeypatch, 0.001), make_mesh(2), 100)) == {LEAST + 1}
