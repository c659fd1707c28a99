"""Processes that agree, hear each other and lose each other: small real ones, joined by jax' service on loopback."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import pytest

from bench.fault_runs import free_port
from research.core import guardian
from research.core.errors import Interrupted, UsageError
from research.parallel import hosts, peers
from research.parallel.votes import Votes

ROOT = pathlib.Path(__file__).parents[2]
DESCRIBING = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES')
CHILD = """
import os, sys, threading, time
from research.core import guardian
from research.core.errors import Interrupted, NumericalError, StorageError
from research.parallel import hosts, peers
from research.parallel.votes import Votes

say = lambda *words: os.write(1, (' '.join(map(str, words)) + '\\n').encode())
with guardian.watching() as watch:
    hosts.start('auto')
    me = hosts.index()
"""


def processes(count, body, kill=None):
    """Runs `body` in `count` processes; process `kill` gets SIGKILL when it says so. -> code, out, seconds of each."""
    port, lines = free_port(), [f'    {line}' for line in body.strip().split('\n')]
    running = []
    for i in range(count):
        named = {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_NUM_PROCESSES': str(count), 'JAX_PROCESS_ID': str(i)}
        running.append(
            subprocess.Popen(
                [sys.executable, '-c', CHILD + '\n'.join(lines)],
                cwd=ROOT, env={**os.environ, 'JAX_PLATFORMS': 'cpu', **named}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    try:
        struck = None
        if kill is not None:
            before = [process.stdout.readline() for process in running]  # each is ready
            assert before == ['ready\n'] * count
            running[kill].send_signal(signal.SIGKILL)
            struck = time.monotonic()
        found = []
        for process in running:
            out, _ = process.communicate(timeout=60)
            seconds = None if struck is None else time.monotonic() - struck
            found.append(types.SimpleNamespace(code=process.returncode, out=out, seconds=seconds))
    finally:
        for process in running:
            process.kill()
    return found


def test_what_the_main_process_has_and_what_all_say():
    body = """
for value in (None, {'step': 7, 'seed': 2 ** 53 - 1}, [1.5, 'ü']):
    say('shared', hosts.share(value if me == 0 else 'mine'))
say('all', hosts.all_true(True), hosts.all_true(me != 1), hosts.all_true(False), hosts.all_true(True))
say('who', me, hosts.count(), hosts.is_main(), hosts.is_alone())
"""
    found = processes(3, body)
    for i, one in enumerate(found):
        assert one.code == 0, one.out
        assert re.findall('shared (.*)', one.out) == ['None', "{'step': 7, 'seed': 9007199254740991}", "[1.5, 'ü']"]
        assert 'all True False False True' in one.out
        assert f'who {i} 3 {i == 0} False' in one.out


def test_the_store_does_not_grow_with_the_run():
    body = """
for k in range(30):
    assert hosts.share(k if me == 0 else None) == k
    assert hosts.gather(10 * k + me) == [10 * k, 10 * k + 1]
hosts.gather(0)
say('left', len(hosts.client().key_value_dir_get('fulcrum/')))
hosts.gather(0)
"""
    for one in processes(2, body):
        assert one.code == 0, one.out
        assert int(re.search(r'left (\d+)', one.out)[1]) < 12


def test_a_meeting_is_kept_by_all_or_by_none():
    body = """
for k in range(6):
    meeting = hosts.Meeting()
    if me == 1 and k % 2:
        time.sleep(0.3)
        meeting.fail()
        continue
    try:
        meeting.arrive('written', 20_000)
        meeting.arrive('committed', 20_000)
        say('met', k)
    except RuntimeError as error:
        say(k, error)
hosts.all_true(True)
meeting = hosts.Meeting()
try:
    if me == 0:
        meeting.arrive('alone', 300)
except RuntimeError as error:
    say(error)
hosts.all_true(True)
"""
    one, other = processes(2, body)
    assert (one.code, other.code) == (0, 0), one.out
    assert one.out.split('\n')[:-1] == [
        'met 0', '1 process 1 of this run could not', 'met 2', '3 process 1 of this run could not', 'met 4',
        '5 process 1 of this run could not', 'another process of this run did not come',
    ]  # fmt: skip
    assert other.out == 'met 0\nmet 2\nmet 4\n'


def test_votes_are_answered_at_the_same_boundary_in_all():
    """Whoever asks, however far the others are, and more than once; no boundary is passed by one alone."""
    body = """
watch.enter('train')
with Votes(watch) as votes:
    hosts.all_true(True)
    saves, since = 0, 0
    for step in range(5000):
        time.sleep(0.004 + 0.001 * me)             # the main process runs ahead
        if step == since + 20 and me == (2, 0, 2, 1)[saves]:
            votes.request('save' if saves < 3 else 'stop')
        if votes.agreed('save'):
            say('save', step)
            saves, since = saves + 1, step
        if votes.agreed('stop'):
            say('stop', step, watch.stopped)
            break
    hosts.all_true(True)
"""
    found = processes(3, body)
    saves = [[int(step) for step in re.findall(r'save (\d+)', one.out)] for one in found]
    stops = [re.findall(r'stop (\d+) (.*)', one.out) for one in found]
    assert [one.code for one in found] == [0, 0, 0], found[0].out
    assert saves[0] == saves[1] == saves[2]
    assert len(saves[0]) == 3
    assert stops[0] == stops[1] == stops[2]
    assert len(stops[0]) == 1
    assert int(stops[0][0][0]) >= saves[0][-1] + 20
    assert stops[0][0][1] == 'another process'


@pytest.mark.parametrize('lost', [0, 1])
def test_a_lost_process_ends_the_others_with_a_reason(lost):
    """The main one takes the service with it: the others must not wait for it with their last words."""
    body = """
peers.LOST_S = 2.0
watch.last_words = lambda status, code: (say('last words', status, code), peers.leave())
with Votes(watch) as votes, peers.together(watch):
    time.sleep(1.5)                                # signs of life have been seen
    say('ready')
    time.sleep(40)
"""
    found = processes(3, body, kill=lost)
    assert found[lost].code == -9
    for i, one in enumerate(found):
        if i != lost:
            assert one.code in (134, -6), one.out
            assert 'is lost, so that no step can be finished' in one.out
            assert one.seconds <= 15
    assert any('last words PeerLostError 134' in one.out for one in found)


def test_an_error_of_one_process_is_told_and_ends_all():
    body = """
with Votes(watch) as votes, peers.together(watch):
    watch.last_words = lambda status, code: peers.leave()
    if me == 1:
        raise StorageError('the disk is full', 'make room')
    time.sleep(40)
"""
    one, other = processes(2, body)
    assert other.code == 74
    assert 'the disk is full' in other.out
    assert one.code == 134
    assert 'process 1 of this run is lost' in one.out


# ---- one process


def test_one_process_agrees_with_itself_at_once():
    with guardian.watching() as watch, Votes(watch) as votes:
        assert not votes.agreed('stop')
        votes.leave_waiting()
        votes.request('stop')
        assert votes.agreed('stop')
        assert not votes.agreed('stop')
        votes.request('stop')
        with pytest.raises(Interrupted, match='another process'):
            votes.leave_waiting()
        votes.request('save')
        votes.leave_if_agreed()
        assert votes.agreed('save')
    assert hosts.share([1]) == [1]
    assert hosts.all_true(True)
    assert not hosts.all_true(False)
    peers.leave()


@pytest.mark.parametrize(
    ('names', 'many'),
    [
        ({}, False),
        ({'JAX_COORDINATOR_ADDRESS': 'here:1'}, True),
        ({'SLURM_NTASKS': '1'}, False),
        ({'SLURM_NTASKS': '2'}, True),
        ({'OMPI_COMM_WORLD_SIZE': '16'}, True),
        ({'TPU_WORKER_HOSTNAMES': 'a'}, False),
        ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
    ],
)
def test_the_environment_tells_of_other_processes(monkeypatch, names, many):
    for name in (
        'JAX_COORDINATOR_ADDRESS',
        'JAX_NUM_PROCESSES',
        'SLURM_NTASKS',
        'OMPI_COMM_WORLD_SIZE',
        'TPU_WORKER_HOSTNAMES',
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert hosts._is_described() == many


def test_processes_that_cannot_be_found_are_an_error(monkeypatch):
    monkeypatch.delenv('JAX_COORDINATOR_ADDRESS', raising=False)
    with pytest.raises(UsageError, match='do not find each other'):
        hosts.start('on')
