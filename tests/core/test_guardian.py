"""The guardian in processes of its own: every signal in every kind of phase, every kind of hang, and what closing leaves."""

import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from research.core import guardian

ROOT = pathlib.Path(__file__).parents[2]
SIGNALS = ('SIGTERM', 'SIGINT', 'SIGUSR1', 'SIGHUP')
# Bounds are short, and a child that nothing ends is over after 20 seconds.
CHILD = """
import contextlib, ctypes, faulthandler, hashlib, os, signal, sys, threading, time
from research.core import guardian
from research.core.errors import Interrupted, StorageError

guardian.TICK_S, guardian.SLACK_S, guardian.START_GRACE_S, guardian.LAST_WORDS_S = 0.05, 0.3, 0.4, 0.6
say = lambda *words: os.write(1, (' '.join(map(str, words)) + '\\n').encode())    # whole, from any thread
stacks = sys.argv[1]

def in_c():                                   # C code that no signal interrupts and that leaves Python's lock to others
    hashlib.pbkdf2_hmac('sha256', b'', b'', 10 ** 8)

def holding_the_lock():
    ctypes.PyDLL(None).sleep(20)

with guardian.watching() as watch:
    watch.stacks_to(stacks)
    watch.limits = dict.fromkeys(watch.limits, 20.0)
    watch.grace = 20.0
    watch.on_stop = lambda name: say('on_stop', name)
    watch.last_words = lambda status, code: say('last words', status, code)
"""


def child(tmp_path, body, *signals, setup='', stderr=subprocess.PIPE):
    """Runs `body` inside the `with` block; sends each signal 0.2 s after a line of its output. -> code, out, err, seconds."""
    lines = [f'    {line}' for line in body.strip().split('\n')]
    code = CHILD.replace('with guardian', setup + '\nwith guardian', 1) + '\n'.join(lines)
    command = [sys.executable, '-c', code, str(tmp_path / 'stacks.txt')]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        try:
            first = []
            for name in signals:
                first.append(process.stdout.readline())
                time.sleep(0.2)
                process.send_signal(getattr(signal, name))
            started = time.monotonic()
            out, err = process.communicate(timeout=25)
        finally:
            process.kill()
    seconds = time.monotonic() - started
    return types.SimpleNamespace(code=process.returncode, out=''.join(first) + out, err=err or '', seconds=seconds)


@pytest.mark.parametrize('phase', ['start', 'restore', 'compile', 'data'])
@pytest.mark.parametrize('name', SIGNALS)
def test_a_signal_leaves_a_phase_that_has_nothing_to_lose(tmp_path, phase, name):
    body = f"""
heard = threading.Event()
watch.on_stop = lambda name: (say('on_stop', name), heard.set())
guardian.START_GRACE_S = 10.0
watch.enter({phase!r})
try:
    say('ready')
    time.sleep(20)
except Interrupted as error:
    say('interrupted', error.name, watch.stopped)
    heard.wait(5)          # else this may be over before the guardian's thread has had its turn
"""
    found = child(tmp_path, body, name)
    assert found.code == 0, found.err
    assert found.seconds < 5
    assert f'interrupted {name} {name}' in found.out
    assert f'on_stop {name}' in found.out
    assert f'{name}: stopping after this step' in found.err
    assert 'last words' not in found.out


@pytest.mark.parametrize(
    ('phase', 'name'), [('train', 'SIGTERM'), ('evaluate', 'SIGINT'), ('save', 'SIGUSR1'), ('data', 'SIGTERM')]
)
def test_a_signal_only_asks_where_something_can_be_lost(tmp_path, phase, name):
    body = f"""
watch.enter({phase!r})
watch.alone = False        # 'data' of one process of several: all of them stop at the same step
say('ready')
while watch.stopped is None:
    time.sleep(0.01)
time.sleep(0.5)            # the step ends, and is saved
say('saved', watch.stopped)
"""
    found = child(tmp_path, body, name)
    assert found.code == 0, found.err
    assert f'on_stop {name}\n' in found.out
    assert f'saved {name}\n' in found.out
    assert 'last words' not in found.out


@pytest.mark.parametrize(('first', 'second'), [('SIGINT', 'SIGINT'), ('SIGTERM', 'SIGUSR1'), ('SIGUSR1', 'SIGTERM')])
@pytest.mark.parametrize('where', ['time.sleep(20)', 'in_c()'])
def test_a_second_signal_ends_at_once(tmp_path, first, second, where):
    found = child(tmp_path, f"watch.enter('train')\nsay('ready')\n{where}", first, second)
    assert found.code == 75
    assert found.seconds < 5
    assert 'last words KeyboardInterrupt 75' in found.out
    assert 'error: ended at once' in found.err


def test_in_compiled_code_the_guardian_ends_a_phase_that_has_nothing_to_lose(tmp_path):
    """Python's own handler would only run when the compilation is over."""
    found = child(tmp_path, "watch.enter('compile')\nsay('ready')\nin_c()", 'SIGTERM')
    assert found.code == 75
    assert 0.3 < found.seconds < 5
    assert 'on_stop SIGTERM\nlast words StoppedError 75' in found.out
    assert 'error: stopped by SIGTERM; nothing was lost' in found.err


@pytest.mark.parametrize('where', ['in_c()', 'while True: time.sleep(0.01)'])
def test_the_grace_ends_a_run_that_cannot_save(tmp_path, where):
    found = child(tmp_path, f"watch.enter('train')\nwatch.grace = 1.0\nsay('ready')\n{where}", 'SIGTERM')
    assert found.code == 75
    assert 0.9 < found.seconds < 8
    assert 'last words StoppedError 75' in found.out
    assert 'nothing could be saved within 1 s (train)' in found.err
    assert 'config.train.grace_seconds' in found.err


def test_a_request_of_another_process_is_a_first_signal(tmp_path):
    """It starts the grace, interrupts nothing, and the signal that comes to this process later is the first one here."""
    body = """
watch.enter('train')
watch.request('SIGTERM')
watch.grace = 1.5
say('ready')
while True:
    time.sleep(0.01)
"""
    found = child(tmp_path, body, 'SIGINT')
    assert found.code == 75
    assert found.seconds > 0.9
    assert 'stopped by SIGTERM, but nothing could be saved' in found.err
    assert 'on_stop SIGINT' in found.out


def test_the_listener_survives_what_it_tells(tmp_path):
    """The callback raises; nobody reads standard error: the second signal still ends the process."""
    body = """
watch.enter('train')
watch.on_stop = lambda name: 1 / 0
say('ready')
while watch.stopped is None:
    time.sleep(0.01)
say('stopping')
time.sleep(20)
"""
    found = child(tmp_path, body, 'SIGTERM', 'SIGTERM')
    assert found.code == 75
    assert 'warning: ZeroDivisionError: division by zero' in found.err
    read, write = os.pipe()
    os.close(read)
    found = child(tmp_path, body, 'SIGTERM', 'SIGTERM', stderr=write)
    os.close(write)
    assert found.code == 75
    assert found.seconds < 5


def test_a_hang_ends_with_the_stacks_of_every_thread(tmp_path):
    body = """
def hanging():
    time.sleep(20)
def other():
    time.sleep(20)
threading.Thread(target=other, daemon=True).start()
watch.limits['train'] = 1.0
watch.enter('train')
hanging()
"""
    started = time.monotonic()
    found = child(tmp_path, body)
    assert found.code == 124
    assert 0.9 < time.monotonic() - started < 10
    stacks = (tmp_path / 'stacks.txt').read_text()
    assert "phase 'train' at 20" in stacks
    assert 'in hanging' in stacks
    assert 'in other' in stacks
    assert f"no progress for 1 s in phase 'train'; the stack of every thread is in {tmp_path}/stacks.txt" in found.err
    assert 'config.watchdog.train is the bound' in found.err
    assert 'last words WatchdogError 124' in found.out


@pytest.mark.parametrize('wait', ['', 'time.sleep(0.3)'])  # armed by `enter` itself; armed by the guardian's thread
def test_a_hang_that_holds_pythons_lock_ends_too(tmp_path, wait):
    """The guardian cannot run, so C writes the stacks and ends the process."""
    body = f"""
watch.enter('train')
time.sleep(0.2)
watch.limits['evaluate'] = 0.8
watch.enter('evaluate')
{wait or 'pass'}
holding_the_lock()
"""
    started = time.monotonic()
    found = child(tmp_path, body)
    assert found.code == 124
    assert time.monotonic() - started < 15
    stacks = (tmp_path / 'stacks.txt').read_text()
    assert 'in holding_the_lock' in stacks
    assert 'Timeout' in stacks
    assert 'last words' not in found.out


def test_the_stacks_follow_the_file(tmp_path):
    """The timers of C, too, write to the file that was named last; the one before is closed."""
    body = f"""
watch.limits['start'] = 0.8
watch.enter('start')
time.sleep(0.2)
before = watch._stacks
watch.stacks_to({str(tmp_path / 'second.txt')!r})
assert before.closed
holding_the_lock()
"""
    assert child(tmp_path, body).code == 124
    assert 'in holding_the_lock' in (tmp_path / 'second.txt').read_text()
    assert (tmp_path / 'stacks.txt').read_text() == ''


def test_progress_keeps_a_run_alive_and_a_nested_phase_has_its_own_bound(tmp_path):
    body = """
watch.limits.update(train=0.4, compile=20.0)
watch.enter('train')
for _ in range(8):
    time.sleep(0.1)
    guardian.beat()
watch.enter('compile')
time.sleep(0.8)
watch.enter('train')
time.sleep(0.2)
say('alive')
time.sleep(20)
"""
    found = child(tmp_path, body)
    assert 'alive' in found.out
    assert found.code == 124
    assert "in phase 'train'" in found.err


@pytest.mark.parametrize(
    ('error', 'code'), [("StorageError('gone', 'look')", 74), ("OSError('gone')", 74), ("RuntimeError('gone')", 1)]
)
def test_a_task_that_raises_ends_the_process_by_its_code(tmp_path, error, code):
    body = f"""
watch.enter('train')
calls = []
def task():
    calls.append(0)
    if len(calls) == 3:
        say('calls', len(calls))
        raise {error}
watch.every(0.1, lambda: None)
watch.every(0.1, task)
in_c()
"""
    found = child(tmp_path, body)
    assert found.code == code
    assert 'calls 3' in found.out
    assert f'last words {error.partition("(")[0]} {code}' in found.out
    assert 'error: gone' in found.err


def test_last_words_that_hang_do_not_keep_the_process(tmp_path):
    """They may need what the main thread holds."""
    body = """
held = threading.Lock()
held.acquire()
watch.last_words = lambda status, code: held.acquire()
watch.grace = 0.2
watch.enter('train')
say('ready')
while True:
    time.sleep(0.01)
"""
    found = child(tmp_path, body, 'SIGTERM')
    assert found.code == 75  # what it ends for, not the bound on last words
    assert found.seconds < 8


@pytest.mark.parametrize('phase', ['start', 'restore', 'compile', guardian.TOOL])
def test_a_process_of_the_command_line_ends_at_once_where_nothing_is_lost(tmp_path, phase):
    """Whatever its main thread does: an exception may be swallowed, as by a callback of the garbage collector."""
    body = f"""
watch.owned = True
watch.enter({phase!r})
say('ready')
while True:
    try:
        time.sleep(0.01)
    except BaseException as error:
        say('raised', error)
"""
    found = child(tmp_path, body, 'SIGTERM')
    assert found.code == 75
    assert found.seconds < 2
    assert 'raised' not in found.out
    assert 'last words StoppedError 75' in found.out
    assert found.err.strip().split('\n') == ['error: stopped by SIGTERM; nothing was lost', '  fix: the same command goes on']


def test_what_nohup_ignores_stays_ignored(tmp_path):
    body = """
watch.enter('train')
say('ready')
time.sleep(1)
say('stopped', watch.stopped)
"""
    found = child(tmp_path, body, 'SIGHUP', setup='signal.signal(signal.SIGHUP, signal.SIG_IGN)')
    assert found.code == 0, found.err
    assert 'stopped None' in found.out


def test_a_tool_has_no_bound_and_can_be_left(tmp_path):
    body = """
watch.limits = dict.fromkeys(watch.limits, 0.1)
watch.enter(guardian.TOOL)
time.sleep(0.8)
say('ready')
in_c()
"""
    found = child(tmp_path, body, 'SIGTERM')
    assert 'ready' in found.out
    assert found.code == 75
    assert found.seconds < 5


def test_a_nested_guardian_is_the_same(tmp_path):
    body = """
with guardian.watching() as inner:
    assert inner is watch
assert guardian._current is watch
watch.enter('train')
say('ready')
while watch.stopped is None:
    time.sleep(0.01)
say('heard')
"""
    found = child(tmp_path, body, 'SIGTERM')
    assert found.code == 0, found.err
    assert 'heard' in found.out


def test_closing_leaves_everything_as_it_was(tmp_path):
    code = """
mine = lambda *_: say('mine')
signal.signal(signal.SIGUSR1, mine)
read, write = os.pipe()
os.set_blocking(write, False)
signal.set_wakeup_fd(write)
handlers = lambda: [signal.getsignal(number) for number in guardian.SIGNALS]
before = handlers(), sorted(os.listdir('/proc/self/fd')), threading.active_count()

def check():
    after = handlers(), sorted(os.listdir('/proc/self/fd')), threading.active_count()
    assert before == after, (before, after)
    assert signal.set_wakeup_fd(-1) == write
    assert guardian._current is None
    guardian.beat()                                  # nobody watches: nothing happens
    os.kill(os.getpid(), signal.SIGUSR1)
    for _ in range(20):                              # a timer that is left writes to one of these
        os.open(stacks, os.O_WRONLY | os.O_APPEND)
    time.sleep(2.2)                                  # the bound of 'start' has no say any more, nor have the timers of C
    say('done')
    os._exit(0)

import atexit
atexit.register(check)
"""
    found = child(tmp_path, "watch.limits['start'] = 0.5\nwatch.enter('start')\ntime.sleep(0.2)", setup=code)
    assert found.code == 0, found.err
    assert found.out == 'mine\ndone\n'
    assert (tmp_path / 'stacks.txt').read_text() == ''


def test_closing_does_not_wait_for_the_next_look(tmp_path, monkeypatch):
    monkeypatch.setattr(guardian, 'TICK_S', 5.0)
    started = time.monotonic()
    with guardian.watching():
        time.sleep(0.1)
    assert time.monotonic() - started < 1.0


def test_a_signal_while_it_closes_is_no_interruption(tmp_path):
    """The handlers of before are back first: the exception of ours would leave half of them behind."""
    setup = """
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append('mine'))
def closed():
    say(*heard, signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, threading.active_count())
import atexit
atexit.register(closed)
"""
    body = """
watch.enter('compile')
join = watch._thread.join
def signalled():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    join()
watch._thread.join = signalled
"""
    found = child(tmp_path, body, setup=setup)
    assert found.code == 0, found.err
    assert found.out == 'mine True 1\n'


def test_no_bound_is_a_bound(tmp_path):
    body = """
watch.limits['train'] = float('inf')
watch.enter('train')
time.sleep(0.4)
watch.enter('evaluate')
watch.enter('train')
time.sleep(0.4)
say('ready', watch._thread.is_alive())
while watch.stopped is None:
    time.sleep(0.01)
"""
    found = child(tmp_path, body, 'SIGTERM')
    assert found.code == 0, found.err
    assert 'ready True' in found.out


def test_a_forked_child_has_its_signals_for_itself(tmp_path):
    """Ctrl-C goes to both; what the child hears must not count as the parent's second signal."""
    body = """
watch.enter('train')
child = os.fork()
if child == 0:
    say('default', signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, guardian._current)
    time.sleep(20)
    os._exit(0)
time.sleep(0.3)
os.kill(child, signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
_, status = os.waitpid(child, 0)
time.sleep(0.3)
say('alive', watch.stopped, watch._signals, os.WTERMSIG(status))
"""
    found = child(tmp_path, body)
    assert found.code == 0, found.err
    assert 'default True None\n' in found.out
    assert 'alive SIGTERM 1 15\n' in found.out


def test_a_guardian_that_cannot_start_is_not_the_current_one(monkeypatch):
    def refuse():
        raise OSError(24, 'Too many open files')

    monkeypatch.setattr(guardian.os, 'pipe', refuse)
    with pytest.raises(OSError, match='Too many'), guardian.watching():
        pass
    assert guardian._current is None


def test_a_handler_of_c_is_given_back_as_the_default():
    """Python cannot tell, nor set, what C had installed."""
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with guardian.watching() as watch:
            watch._before[signal.SIGUSR1] = None
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_outside_the_main_thread_it_watches_without_signals(tmp_path):
    setup = """
def aside():
    with guardian.watching() as watch:
        say('before' if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else 'taken')
        watch.limits['train'] = 0.5
        watch.stacks_to(stacks)
        watch.enter('train')
        time.sleep(20)
thread = threading.Thread(target=aside)
thread.start()
thread.join()
"""
    found = child(tmp_path, 'pass', setup=setup)
    assert found.code == 124
    assert found.out == 'before\n'
    assert 'in aside' in (tmp_path / 'stacks.txt').read_text()


def test_tasks_that_are_forgotten_meanwhile_neither_run_nor_end_anything(monkeypatch):
    """The main thread forgets them while the guardian's thread is between two of them."""
    ended, ran = [], []
    watch = guardian.Guardian()
    monkeypatch.setattr(watch, 'end', lambda *words: ended.append(words))

    def first():
        ran.append('first')
        watch.forget()
        raise RuntimeError

    watch.every(0.0, first)
    watch.every(0.0, lambda: ran.append('second'))
    watch._run_tasks()
    watch._run_tasks()
    assert ran == ['first']
    assert not ended
    watch.every(0.0, lambda: ran.append('third'))
    watch._run_tasks()
    assert ran == ['first', 'third']


def test_a_task_runs_no_more_often_than_it_shall(monkeypatch):
    now, ran = [100.0], []
    monkeypatch.setattr(guardian.time, 'monotonic', lambda: now[0])
    watch = guardian.Guardian()
    watch.every(3.0, lambda: ran.append(now[0]))
    for _ in range(40):
        now[0] += 0.25
        watch._run_tasks()
    assert ran == [103.0, 106.0, 109.0]


def test_the_start_of_the_process():
    code = 'import time; from research.core.guardian import process_start; print(time.monotonic() - process_start())'
    before = time.monotonic()
    age = float(subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, check=True).stdout)
    assert 0.0 < age < time.monotonic() - before + 0.02  # /proc tells it in hundredths of a second
