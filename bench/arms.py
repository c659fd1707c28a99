"""Comparing programs side by side: persistent worker processes, short blocks in shuffled order, paired ratios, and an A/A arm.

    with Worker([sys.executable, '-m', 'bench.language_model', '--worker'], core=0) as ours, Worker(..., core=0) as peer:
        rounds = interleave({'ours': ours, 'peer': peer}, {'do': 'steps', 'count': 20}, rounds=24)
    compared(rounds, 'peer', 'ours')        # Ratio(median=1.31, low=1.27, high=1.34, minima=1.30, cpu=1.31)

Every worker is pinned to the same core, and only one works at a time, so both see the same machine; a round gives one ratio,
whose noise is that of a few seconds and not of an hour. A ratio above 1 means that the second is faster. It is *conclusive* if
median, minima and CPU time lie on the same side of the target and a program compared with itself stays within 10 % of 1.
"""

import contextlib
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

PINNED = {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'TF_NUM_INTRAOP_THREADS': '1', 'NPROC': '1', 'JAX_PLATFORMS': 'cpu'}
TUNED = {  # what parallel/memory.py does from inside
    'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=2147483647:glibc.malloc.mmap_max=0'
    ':glibc.malloc.arena_max=1'
}
RESAMPLES = 2000
TOLERANCE = 0.10  # of an A/A comparison
Rounds = list[dict[str, dict[str, float]]]


class Worker:
    """A process that answers one JSON line with another; a context manager, whose end ends the process."""

    def __init__(self, command: Sequence[str], core: int | None = None, environment: Mapping[str, str] | None = None):
        with _pinned(core):
            self._process = subprocess.Popen(  # noqa: S603
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **(environment or {})},
            )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request.

        Raises:
          RuntimeError: the process has ended; its standard error says why.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + '\n')
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f'{self._process.args} ended with code {self._process.wait()}')
        return json.loads(line)

    def __enter__(self) -> 'Worker':
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()


@contextlib.contextmanager
def _pinned(core: int | None) -> Iterator[None]:
    """Processes that start within run on that core, or where this one does."""
    allowed = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The worker's side: answers each line of standard input on standard output; what is printed meanwhile goes to stderr."""
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line))) + '\n')
        replies.flush()


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """The seconds and CPU seconds of `work()`."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {'seconds': time.perf_counter() - wall, 'cpu': time.process_time() - cpu}


def interleave(workers: Mapping[str, Worker], request: Mapping[str, Any], rounds: int, seed: int = 0) -> Rounds:
    """In each round every worker does `request` once, in an order drawn anew: {'name': {'seconds': ..., 'cpu': ...}}."""
    order, generator, found = list(workers), random.Random(seed), []  # noqa: S311 - an order, no secret
    for _ in range(rounds):
        generator.shuffle(order)
        answers = {name: workers[name].ask(request) for name in order}
        found.append({name: answers[name] for name in workers})
    return found


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How much faster one program is than another: the median of the rounds with its 95 % interval, of minima, of CPU time."""

    median: float
    low: float
    high: float
    minima: float
    cpu: float

    def __str__(self) -> str:
        return f'{self.median:.3f} [{self.low:.3f}, {self.high:.3f}], minima {self.minima:.3f}, CPU {self.cpu:.3f}'


def compared(rounds: Rounds, base: str, other: str, seed: int = 0) -> Ratio:
    """How much faster `other` is than `base`; the interval is the percentile bootstrap of the median of paired ratios."""
    paired = [r[base]['seconds'] / r[other]['seconds'] for r in rounds]
    generator = random.Random(seed)  # noqa: S311
    medians = sorted(statistics.median(generator.choices(paired, k=len(paired))) for _ in range(RESAMPLES))
    low, high = medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1]
    minima = min(r[base]['seconds'] for r in rounds) / min(r[other]['seconds'] for r in rounds)
    cpu = statistics.median(r[base]['cpu'] / r[other]['cpu'] for r in rounds)
    return Ratio(statistics.median(paired), low, high, minima, cpu)


def verdict(ratio: Ratio, same: Ratio, target: float) -> str:
    """'met', 'not met' or 'inconclusive': whether the ratio reaches `target`; `same` compares a program with itself."""
    if max(abs(same.low - 1), abs(same.high - 1)) > TOLERANCE:
        return 'inconclusive'
    sides = {value >= target for value in (ratio.low, ratio.high, ratio.minima, ratio.cpu)}
    if len(sides) > 1:
        return 'inconclusive'
    return 'met' if sides == {True} else 'not met'
