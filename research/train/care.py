"""The care of one run: its lock, its watchdog, its exit event, and where it may be interrupted."""

import contextlib
import time
from collections.abc import Callable, Iterator

from research.core import files, lock
from research.core.clock import Clock
from research.core.errors import Interrupted, exit_code
from research.core.guardian import Guardian
from research.core.schema import Experiment
from research.parallel import hosts, peers
from research.parallel.votes import Votes
from research.train.ledger import Ledger, ledger
from research.train.run import Run
from research.train.run_directory import RunDirectory


@contextlib.contextmanager
def watched(directory: RunDirectory, watch: Guardian, clock: Clock, say: Callable[[str], None]) -> Iterator[Votes]:
    """Owns the run directory, hears signals for all processes of the run, and records how it ended.

    Raises:
      UsageError: another process trains there.
    """
    directory.is_silent = not hosts.is_main()
    own = directory.lock.held(say) if hosts.is_main() else contextlib.nullcontext()
    with own, _recorded(directory, clock), Votes(watch) as votes, peers.together(watch):

        def last_words(status: str, code: int) -> None:
            directory.event('exit', status=status, code=code, seconds=clock.own())
            if hosts.is_main():
                directory.lock.give_back()
            peers.leave()

        watch.last_words = last_words
        watch.on_stop = lambda name: votes.request('stop')
        if watch.stopped is not None:
            votes.request('stop')
        if hosts.is_main():
            watch.every(lock.BEAT_S, directory.lock.beat)
            for path in directory.path.glob('.*.tmp'):  # a death half-way
                path.unlink(missing_ok=True)
        yield votes


def so_far(directory: RunDirectory, clock: Clock) -> Ledger:
    """Where the time of the run went until now."""
    events = files.read_json_lines(directory.events) if directory.events.exists() else []
    return ledger([*events, {'event': 'exit', 'time': time.time(), 'status': 'completed', 'code': 0, 'seconds': clock.own()}])


@contextlib.contextmanager
def interruptible(run: Run) -> Iterator[None]:
    """The first signal may end the steps inside, where nothing is lost by that; the run knows that they were cut short."""
    try:
        yield
    except Interrupted:
        run.is_cut_short = True


@contextlib.contextmanager
def bounded(experiment: Experiment, directory: RunDirectory, watch: Guardian) -> Iterator[None]:
    """Inside, the guardian watches by the experiment's bounds; its stacks go to the run directory."""
    before = watch.limits, watch.grace
    watch.limits = {**watch.limits, **{name: getattr(experiment.watchdog, name) for name in watch.limits}}
    watch.grace = experiment.train.grace_seconds
    watch.stacks_to(directory.stacks)
    try:
        yield
    finally:
        watch.forget()
        watch.limits, watch.grace = before
        watch.stacks_to(None)
        if hosts.is_main() and directory.stacks.exists() and not directory.stacks.stat().st_size:
            directory.stacks.unlink()  # who finds one shall know that the watchdog was here


@contextlib.contextmanager
def _recorded(directory: RunDirectory, clock: Clock) -> Iterator[None]:
    """Records how the process ended: completed, or by which error and exit code."""
    status, code = 'completed', 0
    try:
        yield
    except BaseException as error:
        status, code = type(error).__name__, exit_code(error)
        raise
    finally:
        directory.event('exit', status=status, code=code, seconds=clock.own())
