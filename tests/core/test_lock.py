"""The lock of a folder: two processes, a killed owner, owners on other machines, a file system that cannot lock.

Another machine is faked by what the lock file says, since only the file tells of it.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from research.core import lock
from research.core.errors import StorageError, UsageError
from research.core.lock import Lock

ROOT = pathlib.Path(__file__).parents[2]
OWNER = """
import sys, time
from research.core.lock import Lock
with Lock(sys.argv[1]).held():
    print('held', flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, 'WATCH_S', 0.4)
    monkeypatch.setattr(lock, 'LOOK_S', 0.02)
    return tmp_path / '.lock'


@contextlib.contextmanager
def owner(path):
    """Another process that holds the lock."""
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
    with subprocess.Popen([sys.executable, '-c', OWNER, str(path)], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == b'held\n'
        try:
            yield process
        finally:
            process.kill()


def stranger(path, **changes):
    """Writes what an owner on another machine would have written."""
    record = {'host': 'far (boot 12345678)', 'pid': 4711, 'token': 'theirs', 'beat': 7, 'time': time.time(), **changes}
    path.write_text(json.dumps(record))


@contextlib.contextmanager
def flock_fails(monkeypatch):
    """A file system that cannot lock."""

    def refuse(*_):
        raise OSError(95, 'Operation not supported')

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, 'flock', refuse)
        yield


def test_held_and_given_back(path):
    one = Lock(path)
    with one.held(pytest.fail) as held:
        assert held is one
        assert one.earlier is None
        said = one.read()
        assert said['pid'] == os.getpid()
        assert said['beat'] == 1
        one.beat()
        assert one.read()['beat'] == 2
        with pytest.raises(UsageError, match=f'process {os.getpid()} on .* trains in {path.parent}\n  fix: wait for it'):
            Lock(path).held().__enter__()
        assert one.read()['beat'] == 2
    assert one.read() is None
    assert path.stat().st_size == 0
    with one.held(pytest.fail):  # the same object again
        assert one.read()['pid'] == os.getpid()
    with Lock(path).held(pytest.fail) as other:
        assert other.earlier is None


def test_it_is_given_back_after_an_error(path):
    with pytest.raises(ZeroDivisionError), Lock(path).held():
        raise ZeroDivisionError
    with Lock(path).held(pytest.fail):
        pass


def test_another_process_of_this_machine(path):
    with owner(path) as process:
        started = time.monotonic()
        with pytest.raises(UsageError, match=f'process {process.pid} on '):
            Lock(path).held().__enter__()
        assert time.monotonic() - started < 0.3  # the kernel knows: nothing to watch
        process.stdin.close()
        process.wait(10)
        with Lock(path).held(pytest.fail) as mine:
            assert mine.earlier is None


def test_a_killed_owner_is_followed_at_once(path):
    said = []
    with owner(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    started = time.monotonic()
    with Lock(path).held(said.append) as mine:
        assert time.monotonic() - started < 0.3
        assert mine.earlier['pid'] == process.pid
    assert len(said) == 1
    assert said[0].startswith(f'took over {path.parent}: process {process.pid} on ')


def test_a_frozen_owner_of_this_machine_still_holds_it(path):
    with owner(path) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(UsageError):
            Lock(path).held().__enter__()
        process.send_signal(signal.SIGCONT)


def test_of_processes_that_start_together_one_gets_it(path):
    code = OWNER.replace('sys.stdin.readline()', 'time.sleep(1.0)')
    started = [
        subprocess.Popen([sys.executable, '-c', code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    said = [process.communicate(timeout=30) for process in started]
    assert sorted(process.returncode for process in started) == [0, 1, 1, 1]
    assert sum(b'held' in out for out, _ in said) == 1
    assert sum(b'UsageError' in error for _, error in said) == 3


def test_a_dead_owner_of_another_machine_is_followed_after_watching(path):
    stranger(path)
    said = []
    started = time.monotonic()
    with Lock(path).held(said.append) as mine:
        assert 0.4 <= time.monotonic() - started < 1.5
        assert mine.earlier['pid'] == 4711
        assert mine.read()['pid'] == os.getpid()
    assert said == [
        f'{path.parent} was held by process 4711 on far (boot 12345678): watching for 0 s whether it is alive',
        f'took over {path.parent}: process 4711 on far (boot 12345678) is gone',
    ]


def test_before_a_restart_of_this_machine_its_processes_were_others(path):
    """The same host name in another boot: its process numbers say nothing, so the sign of life is watched."""
    stranger(path, host=lock._host().rpartition('(')[0] + '(boot 00000000)', pid=os.getpid())
    said = []
    with Lock(path).held(said.append):
        assert len(said) == 2


@pytest.mark.parametrize('change', [{'beat': 8}, {'token': 'of a third'}, None])
def test_a_living_owner_of_another_machine_is_left_alone(path, change):
    stranger(path)
    write = threading.Timer(0.15, lambda: stranger(path, **change) if change else path.write_text(''))
    write.start()
    said = []
    with pytest.raises(UsageError, match='trains in'):
        Lock(path).held(said.append).__enter__()
    write.join()
    assert len(said) == 1
    assert change is None or json.loads(path.read_text())['token'] != 'mine'
    assert os.getpid() not in json.loads(path.read_text() or '{}').values()


def test_its_clock_is_not_compared(path):
    """An owner whose clock is a year ahead, and one whose clock stands, are dead as well."""
    stranger(path, time=time.time() + 3e7)
    with Lock(path).held(lambda _: None) as mine:
        assert mine.earlier['pid'] == 4711


def test_without_flock_the_sign_of_life_decides_on_this_machine_too(path, monkeypatch):
    with flock_fails(monkeypatch), Lock(path).held() as mine:
        stop = threading.Event()

        def live():
            while not stop.wait(0.05):
                mine.beat()

        thread = threading.Thread(target=live)
        thread.start()
        try:
            with pytest.raises(UsageError, match=f'process {os.getpid()} on '):
                Lock(path).held(lambda _: None).__enter__()
        finally:
            stop.set()
            thread.join()
        with pytest.raises(StorageError, match='has taken over'), Lock(path).held(lambda _: None):  # it beats no more
            mine.beat()


def test_the_owner_notices_that_another_took_over(path):
    with Lock(path).held() as mine:
        stranger(path)
        with pytest.raises(StorageError, match=r'process 4711 on far .* has taken over .*\n  fix: look at its run'):
            mine.beat()
        assert json.loads(path.read_text())['pid'] == 4711
    assert json.loads(path.read_text())['pid'] == 4711  # and does not give back what is not its own


def test_the_owner_notices_that_another_took_over_and_has_finished(path):
    with Lock(path).held() as mine:
        path.write_text('')
        with pytest.raises(StorageError, match='another process has taken over'):
            mine.beat()


@pytest.mark.parametrize('content', ['', '{"host": "far", "pi', 'null', '[]', '\0' * 64, '{"pid": 1}'])
def test_an_empty_or_damaged_file_is_nobodys(path, content):
    path.write_text(content)
    with Lock(path).held(pytest.fail) as mine:
        assert mine.earlier is None
        assert mine.read()['pid'] == os.getpid()


def test_a_beat_after_the_end_changes_nothing(path):
    """The thread that beats may be in the middle of it when the run ends."""
    with Lock(path).held() as mine:
        pass
    mine.beat()
    assert path.read_text() == ''


def test_whoever_reads_sees_whole_records(path):
    stop, seen = threading.Event(), []

    def look():
        while not stop.is_set():
            seen.append(path.read_text())

    with Lock(path).held() as mine:
        thread = threading.Thread(target=look)
        thread.start()
        for _ in range(500):
            mine.beat()
        stop.set()
        thread.join()
    assert len(seen) > 5
    assert all(json.loads(text)['pid'] == os.getpid() for text in seen)


def test_a_full_disk_ends_no_run(path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patched:
        patched.setattr(os, 'pwrite', full)
        with Lock(path).held() as mine:
            mine.beat()
            mine.beat()
            assert path.read_text() == ''
    with Lock(path).held(pytest.fail) as mine:
        with monkeypatch.context() as patched:
            patched.setattr(os, 'pwrite', full)
            mine.beat()
        mine.beat()
        assert mine.read()['beat'] == 3
    assert path.read_text() == ''


def test_a_lock_file_that_was_removed_is_made_again(path):
    with Lock(path).held() as mine:
        path.unlink()
        mine.beat()
        assert mine.read()['pid'] == os.getpid()
