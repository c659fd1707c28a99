"""Where the processor time of a step of the loop goes, on one core: the profile behind the figures of `bench.loop_overhead`.

    python -m bench.loop_profile
    python -m bench.loop_profile --most=2        # without bursts, see train/in_flight.py

The loop is that of config `cifar10_cnn` with all its hooks (`bench/reference_cnn.py`); the first `WARM` steps do not count.
Processor time of each thread by Linux' own count, to 10 ms in all; that of a part of the loop by the clock of its thread, the
clock itself (under a microsecond) included. A part that stands further in is also in the one above it.

The last lines are of the wall clock: how long the main thread waits for batches, which `events.jsonl` calls 'data wait', and
how much of that ended with no step left to do. Only then has the device waited too, for at most so long.
"""

import argparse
import collections
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from bench.arms import PINNED
from bench.paced import EnoughError
from bench.reference_cnn import experiment, write_images
from bench.report import Report
from research.data import pipeline
from research.train import hooks, in_flight, loop, progress, writer

WARM = 100
PARTS = (  # of the loop: what it is called here, where it stands, its name there
    ('wait for a batch', pipeline.Prefetcher, '__call__'),
    ('wait for steps', in_flight.InFlight, 'add'),
    ('records', hooks.LogHook, '__call__'),
    ('  a record', hooks.LogHook, '_record'),
    ('    fetch of terms', hooks.LogHook, 'unrecorded'),
    ('    line of the record', writer.Writer, 'write'),
    ('  spikes', hooks.LogHook, '_check_numbers'),
    ('  progress', progress.Reporter, 'advance'),
    ('evaluations', hooks.EvaluateHook, '__call__'),
    ('checkpoints', hooks.CheckpointHook, '__call__'),
    ('early stop', hooks.EarlyStopHook, '__call__'),
    ('feed, in a thread', pipeline.HostFeed, '__call__'),
)


class Profile:
    """Seconds of processor time by part, counted between two steps of a run."""

    def __init__(self, batch: int, steps: int, report: Report):
        self.batch, self.steps, self.report = batch, steps, report
        self.spent: dict[str, float] = collections.defaultdict(float)
        self.before: dict[str, float] = {}
        self.since = self.waited = self.stalled = 0.0
        self.newest: Any = None  # result of the newest step

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts as that of `name`."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[name] += time.thread_time() - begin

        return inner

    def waiting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose wall time counts as a wait for a batch."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            found = function(*args, **kwargs)
            waited = time.perf_counter() - begin
            self.waited += waited
            if self.newest is not None and self.newest.is_ready():
                self.stalled += waited
            return found

        return inner

    def look(self, step: int, state: Any, terms: Any) -> None:
        """Begins after `WARM` steps, ends and tells after `steps` more."""
        self.newest = terms.array
        if step == WARM:
            jax.block_until_ready(state)
            self.spent.clear()
            self.waited = self.stalled = 0.0
            self.since, self.before = time.perf_counter(), thread_seconds()
        elif step == WARM + self.steps:
            jax.block_until_ready(state)
            self.tell(time.perf_counter() - self.since, thread_seconds())
            raise EnoughError

    def tell(self, seconds: float, threads: dict[str, float]) -> None:
        """The table, in milliseconds of a step."""
        self.report.say(f'batch {self.batch}: {seconds / self.steps * 1e3:.3f} ms a step, {self.steps} steps')
        for name, spent in sorted(threads.items(), key=lambda item: -item[1]):
            if (more := spent - self.before.get(name, 0.0)) > 0.0:
                self.report.say(f'{more / self.steps * 1e3:8.3f} ms  thread {name}')
        for name in ('dispatch of the step', *(part for part, _, _ in PARTS)):
            self.report.say(f'{self.spent[name] / self.steps * 1e3:8.3f} ms  {name}')
        self.report.say(f'{100 * self.waited / seconds:8.2f} %   of the time waits for batches')
        self.report.say(f'{100 * self.stalled / seconds:8.2f} %   at most, of which no step was left to do')


def thread_seconds() -> dict[str, float]:
    """Processor time of each thread of this process."""
    found = {}
    for folder in pathlib.Path('/proc/self/task').iterdir():
        name, _, rest = folder.joinpath('stat').read_text().rpartition(')')
        numbers = rest.split()
        is_main = int(folder.name) == os.getpid()
        told = 'main' if is_main else f'{name.partition("(")[2]} {folder.name}'
        found[told] = (int(numbers[11]) + int(numbers[12])) / os.sysconf('SC_CLK_TCK')
    return found


def main(argv: list[str]) -> None:
    """Runs the loop and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--core', type=int, default=0)
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--steps', type=int, default=1000)
    parser.add_argument('--most', type=int, default=in_flight.MOST, help='steps in flight, at least as many as elsewhere')
    parser.add_argument('--output', type=pathlib.Path)
    options = parser.parse_args(argv)
    if options.most < in_flight.LEAST:
        parser.error(f'--most must be at least {in_flight.LEAST}')
    os.sched_setaffinity(0, {options.core})
    os.environ.update(PINNED)  # before jax looks for its devices
    in_flight.MOST = options.most
    report, steps = Report(), loop._steps
    profile = Profile(options.batch, options.steps, report)
    for name, owner, method in PARTS:
        setattr(owner, method, profile.timed(name, getattr(owner, method)))
    pipeline.Prefetcher.__call__ = profile.waiting(pipeline.Prefetcher.__call__)

    def profiled(run: Any, step: Any, state: Any, those: list[Any]) -> Any:
        def last(step: int, state: Any, terms: Any) -> None:
            profile.look(step, state, terms)

        return steps(run, profile.timed('dispatch of the step', step), state, [*those, last])

    loop._steps = profiled
    with tempfile.TemporaryDirectory() as folder:
        path = f'{folder}/images.npz'
        write_images(pathlib.Path(path))
        try:
            loop.train(experiment(path, 'jit', options.batch), f'{folder}/run', quiet=True)
        except EnoughError:
            report.end(options.output, {'spent': dict(profile.spent)})
        else:
            parser.error('the run was over before --steps')


if __name__ == '__main__':
    main(sys.argv[1:])
