"""The guardian: a thread that watches the main thread. It hears signals, bounds every phase, and gives signs of life.

    with guardian.watching() as watch:           # from the start of the process
        watch.enter('compile')                   # the phase has its own bound; `core.clock.Clock` calls this
        guardian.beat()                          # progress inside a phase

*Signals.* Python runs a signal handler only when the main thread is back from C++, where it may spend minutes (a compilation).
The C-level handler writes a byte into a pipe at once, and the guardian reads it. The first signal asks the run to stop: where
the main thread has nothing to lose (`NOTHING_TO_LOSE`) the process ends: at once if it is `owned` by the command line and alone
(an exception from a signal handler can be swallowed, as in the middle of an import), else after `START_GRACE_S`. Elsewhere it
ends after `grace` seconds unless the main thread has saved and gone before. The second signal ends the process at once.

*Hangs.* Each phase has a bound in seconds (`LIMITS`). When it is over without a beat, every thread's stack goes to the stack
file and the process ends with 124. If the guardian cannot run itself, because something holds Python's lock, two timers of C do
the same some seconds later: `faulthandler` writes the stacks, and a POSIX timer calls `_exit(124)`. (Without `timer_create`, as
on macOS, faulthandler ends the process, with code 1.)
"""

import contextlib
import faulthandler
import math
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO, Any, NoReturn

from research.core import files
from research.core.errors import ExitCode, Interrupted, exit_code
from research.core.exit_timer import ExitTimer

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # the last where nohup has not asked to ignore it
TOOL = 'tool'  # a mode that trains nothing: without a bound, for somebody waits for it
NOTHING_TO_LOSE = ('start', 'restore', 'compile', TOOL)  # no step is done that is not on disk
BACKGROUND = 'background'  # name of a thread whose work is of no use once the process ends
LEAVE_AT_ONCE = ('data',)  # where a single process may be interrupted anywhere without loss
LIMITS = {
    'start': 1800.0,
    'restore': 3600.0,
    'compile': 3600.0,
    'data': 1800.0,
    'train': 1800.0,
    'evaluate': 1800.0,
    'save': 3600.0,
}
START_GRACE_S = 3.0
TICK_S = 0.25
FOREVER_S = 1e8
LAST_WORDS_S = 10.0
SLACK_S = 3.0  # the timers of C come so much later than the guardian


class Guardian:
    """Watches from `start` to `close`. One at a time in a process, made by `watching`.

    Attributes:
      stopped: name of the first signal; None as long as none came.
      alone: this process may stop without asking others.
      owned: it may be ended where nothing is lost by that; False where a notebook, say, has more to do than to train.
      grace: seconds from the first signal to the end, saved or not.
      on_stop: called in the guardian's thread with the name of the first signal.
      last_words: called with (status, exit code) before the guardian ends the process.
    """

    def __init__(self, since: float | None = None, owned: bool = False) -> None:
        self.owned = owned
        self.since = time.monotonic() if since is None else since
        self.stopped: str | None = None
        self.alone, self.grace = True, 25.0
        self.limits = dict(LIMITS)
        self.phase = 'start'
        self._has_begun = False  # steps are taken
        self.on_stop: Callable[[str], None] | None = None
        self.last_words: Callable[[str, int], None] | None = None
        self._beat = time.monotonic()
        self._stopped_at: float | None = None
        self._signals = 0
        self._tasks: list[_Task] = []
        self._stacks: IO[str] = sys.__stderr__ or sys.stderr
        self._close = threading.Event()
        self._thread = threading.Thread(target=self._work, name='guardian', daemon=True)
        self._before: dict[int, Any] = {}
        self._timer = ExitTimer()
        self._armed = 0.0

    def start(self) -> None:
        """Takes the signals, if this is the main thread, and begins to watch."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        if threading.current_thread() is threading.main_thread():
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            wanted = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in wanted}
        self._thread.start()

    def close(self) -> None:
        """Gives the signals back and ends the thread and its timers."""
        self.let_go(self._wakeup if self._before else -1)  # first: a signal must not raise Interrupted in the middle of this
        self._close.set()
        os.write(self._write, b'\0')  # wakes the thread: no signal has this number
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._timer.cancel()
        os.close(self._read)
        os.close(self._write)
        self._close_stacks()

    def let_go(self, wakeup: int = -1) -> None:
        """Gives the signals back to those who had them, and the writing of their numbers to the descriptor `wakeup`."""
        if self._before:
            signal.set_wakeup_fd(wakeup)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was set by C

    def enter(self, phase: str) -> None:
        """The main thread is in `phase` now."""
        now = time.monotonic()
        self._beat = now
        self._has_begun |= phase == 'train'
        self.phase = phase  # in this order: a new, shorter bound must not meet the old beat in the guardian's thread
        if now + self._limit() < self._armed - TICK_S:  # else the guardian has the time to do it, and steps stay cheap
            self._arm(now + self._limit())

    def beat(self) -> None:
        """The main thread has come a step further."""
        self._beat = time.monotonic()

    def every(self, seconds: float, task: Callable[[], None]) -> None:
        """Calls `task` in the guardian's thread every so many seconds; an exception of it ends the process by its code."""
        self._tasks.append(_Task(seconds, task))

    def forget(self) -> None:
        """Drops tasks and callbacks: what they belong to is over."""
        self._tasks, self.on_stop, self.last_words, self.alone = [], None, None, True

    def stacks_to(self, path: str | os.PathLike[str] | None) -> None:
        """Stacks go to this file from now on; None: to standard error."""
        new = sys.__stderr__ or sys.stderr if path is None else open(path, 'a', encoding='utf-8')  # noqa: SIM115 - it stays open
        before, self._stacks = self._stacks, new
        self._arm(self._beat + self._limit())  # the timers hold the old file
        self._close_stacks(before)

    def end(self, status: str, code: int, message: str) -> None:
        """Ends the process without the main thread, which may be stuck: last words, then `_exit`."""
        self._timer.cancel()
        ExitTimer(code).arm(LAST_WORDS_S)  # they may need what the main thread holds, or a disk or a reader that has gone away
        with contextlib.suppress(Exception):
            if sys.stdout.isatty():
                sys.stdout.write('\x1b[?25h')  # the progress bar hid the cursor
            sys.stderr.write(f'\nerror: {message}\n')
            sys.stdout.flush()
            sys.stderr.flush()
        with contextlib.suppress(Exception):
            if self.last_words is not None:
                self.last_words(status, code)
        os._exit(code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, as soon as it runs Python again."""
        del frame
        self._first(signal.Signals(number).name)
        if self.alone and (self.phase in LEAVE_AT_ONCE or (self._can_leave() and not self.owned)):
            raise Interrupted(signal.Signals(number).name)

    def request(self, name: str) -> None:
        """As if the first signal had come to this process: another one of the run got it."""
        if self.stopped is None:
            self._first(name)
            self._stopped_at = time.monotonic() - START_GRACE_S + 1.0  # where there is nothing to lose, before the other ends

    def _first(self, name: str) -> None:
        if self.stopped is None:
            self.stopped, self._stopped_at = name, time.monotonic()

    def _work(self) -> None:
        while not self._close.is_set():
            ready, _, _ = select.select([self._read], [], [], TICK_S)
            for number in os.read(self._read, 64) if ready else b'':
                if number in self._before:
                    self._hear(signal.Signals(number).name)
            self._check_grace()
            self._check_progress()
            self._run_tasks()

    def _hear(self, name: str) -> None:
        self._signals += 1
        if self._signals > 1:
            self.end(
                'KeyboardInterrupt', ExitCode.STOPPED, 'ended at once\n  fix: the same command goes on from the last checkpoint'
            )
        self._first(name)
        if self.owned and self.alone and self._can_leave():
            self._leave()
        files.tell(f'\n{name}: stopping after this step, and saving; once more to quit at once\n')
        try:
            if self.on_stop is not None:
                self.on_stop(name)
        except Exception as error:  # noqa: BLE001 - the thread must live to hear the next signal
            files.tell(f'\nwarning: {type(error).__name__}: {error}\n')

    def _check_grace(self) -> None:
        if self._stopped_at is None:
            return
        waited = time.monotonic() - self._stopped_at
        if self._can_leave() and waited > START_GRACE_S:
            self._leave()
        if waited > self.grace:
            fix = 'the same command goes on from the last checkpoint; config.train.grace_seconds gives more time'
            told = f'stopped by {self.stopped}, but nothing could be saved within {self.grace:.0f} s ({self.phase})'
            self.end('StoppedError', ExitCode.STOPPED, f'{told}\n  fix: {fix}')

    def _leave(self) -> None:
        """Ends the process where there is nothing to lose."""
        told = f'stopped by {self.stopped}; nothing was lost'
        self.end('StoppedError', ExitCode.STOPPED, f'{told}\n  fix: the same command goes on')

    def _check_progress(self) -> None:
        limit, beat = self._limit(), self._beat
        left = beat + limit - time.monotonic()
        if left <= 0:
            self._dump()
            where = getattr(self._stacks, 'name', 'standard error')
            self.end(
                'WatchdogError',
                ExitCode.WATCHDOG,
                f'no progress for {limit:.0f} s in phase {self.phase!r}; the stack of every thread is in {where}\n'
                f'  fix: the same command goes on from the last checkpoint; config.watchdog.{self.phase} is the bound',
            )
        if abs(beat + limit - self._armed) > TICK_S:
            self._arm(beat + limit)

    def _can_leave(self) -> bool:
        """Whether there is nothing to lose: once steps were taken, the way out (a last save) is left to the main thread."""
        return self.phase in NOTHING_TO_LOSE and not self._has_begun

    def _limit(self) -> float:
        return self.limits.get(self.phase, math.inf)

    def _arm(self, deadline: float) -> None:
        """Sets the timers of C a little behind `deadline`."""
        self._armed = deadline
        left = min(max(deadline - time.monotonic(), 0.0), FOREVER_S) + SLACK_S  # C has no infinity
        faulthandler.dump_traceback_later(left, file=self._stacks, exit=not self._timer.exists)
        self._timer.arm(left + 1.0)

    def _dump(self) -> None:
        with contextlib.suppress(Exception):
            self._stacks.write(f'\nphase {self.phase!r} at {time.strftime("%Y-%m-%dT%H:%M:%S%z")}\n')
            self._stacks.flush()
            faulthandler.dump_traceback(file=self._stacks, all_threads=True)

    def _close_stacks(self, file: IO[str] | None = None) -> None:
        file = file or self._stacks
        if file is not (sys.__stderr__ or sys.stderr):
            file.close()

    def _run_tasks(self) -> None:
        tasks = self._tasks  # the main thread may forget them meanwhile
        for task in tasks:
            if self._tasks is tasks and time.monotonic() >= task.due:
                task.due = time.monotonic() + task.seconds
                try:
                    task.run()
                except Exception as error:  # noqa: BLE001 - there is nobody above this thread to catch it
                    if self._tasks is tasks:  # else what it belongs to was over first
                        self.end(type(error).__name__, exit_code(error), str(error))


class _Task:
    """What the guardian's thread does every `seconds`."""

    def __init__(self, seconds: float, run: Callable[[], None]) -> None:
        self.seconds, self.run = seconds, run
        self.due = time.monotonic() + seconds


_current: Guardian | None = None


@contextlib.contextmanager
def watching(since: float | None = None, owned: bool = False) -> Iterator[Guardian]:
    """The guardian of this process: the one that watches already, or a new one for the `with` block.

    `since`: when the process began, in the time of `time.monotonic`; None: now. `owned`: see `Guardian`.
    """
    global _current
    if _current is not None:
        yield _current
        return
    mine = Guardian(since, owned)
    mine.start()
    _current = mine
    try:
        yield mine
    finally:
        mine.close()
        _current = None


def _in_child() -> None:
    """After a fork: Ctrl-C reaches the child too, and must not count as the parent's second signal."""
    global _current
    if _current is not None:
        _current.let_go()
        _current = None


os.register_at_fork(after_in_child=_in_child)


def beat() -> None:
    """The main thread has come a step further, if somebody watches."""
    if _current is not None:
        _current.beat()


def process_start() -> float:
    """When this process began, in the time of `time.monotonic`; now, where the system does not say."""
    try:
        with open('/proc/self/stat', encoding='ascii', errors='replace') as file:
            ticks = int(file.read().rpartition(')')[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')
    except (OSError, ValueError, AttributeError, IndexError):
        return time.monotonic()
    return time.monotonic() - max(age, 0.0)


def run(main: Callable[[list[str]], int], argv: list[str]) -> NoReturn:
    """Ends the process with the code of `main(argv)`; what nobody expected is told in full, and leaves in the same way."""
    try:
        code = main(argv)
    except Exception:  # noqa: BLE001 - whatever a user's component raises
        traceback.print_exc()
        code = 1
    leave(code)


def leave(code: int) -> NoReturn:
    """Ends the process with `code`, its output settled, without waiting for a thread that still works for nobody."""
    files.settle_output()
    if any(thread.name == BACKGROUND for thread in threading.enumerate()):
        os._exit(code)
    sys.exit(code)
