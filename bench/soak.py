"""Every fault in every phase, then seeded random ones until so many have struck; every run must end as if nothing had happened.

`python -m bench.soak --faults=200 --corruptions=300 --seed=1` prints its seed, a line for each run, and the tables of
BENCHMARKS.md; it exits with 1 if anything was lost. About 75 minutes on two cores; `--no-matrix --faults=10` is a taste.

A *course* is one run of the small digits experiment (`bench/fault_runs.py`) that is hit by one to four faults in a row, each in
a life of its own, and then goes on until it is done. Lost means: another final or best state, another record, other results,
other examples in a step, a step recorded twice, something temporary left over, an exit code that does not say what happened, or
a life that did not end in time.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import random
import re
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable

from bench import corruptions, fault_matrix
from bench.fault_runs import Course, Life, newest, struck
from bench.report import cpu_name

PHASES = ('start', 'restore', 'compile', 'data', 'train', 'evaluate', 'save')
STOPS = ('term', 'int', 'usr1', 'hup')
WITHIN_S = 10.0  # from a signal to the end
SIGNAL = 'signal in a phase'


@dataclasses.dataclass
class Fault:
    """One way to hit a course: its kind, what it does (giving the life, or whether it struck between two), how it may end."""

    kind: str
    strike: Callable[[Course, random.Random, float], Life | bool]
    codes: tuple[int, ...]


def kill_at_a_time(course: Course, rng: random.Random, seconds: float) -> Life:
    """SIGKILL to one process at a random moment, from its first import to its exit."""
    # Several processes that have not found each other yet wait for jax' 300 s: that is not promised, and not tried.
    first = 0.1 if course.processes == 1 else 0.45 * seconds
    return course.life(kill_after=rng.uniform(first, seconds), victim=_any(course, rng))


def kill_at_a_place(course: Course, rng: random.Random, seconds: float) -> Life:
    """SIGKILL at the n-th entry of a phase, or between the parts of a commit."""
    del seconds
    place = rng.choice([*_phases(course), 'manifest', 'rename'])
    most = {'data': 250, 'manifest': 12, 'rename': 12, 'save': 12, 'evaluate': 5}.get(place, 1)
    return course.life(
        f'kill@{place}:{rng.randint(1, most)}', victim=0 if place in ('manifest', 'rename') else _any(course, rng)
    )


def stop(course: Course, rng: random.Random, seconds: float) -> Life:
    """A signal in a phase: gone within ten seconds, and nothing done is lost."""
    del seconds
    place = rng.choice(_phases(course))
    most = {'data': 250, 'save': 12, 'evaluate': 5}.get(place, 1)
    life = course.life(f'{rng.choice(STOPS)}@{place}:{rng.randint(1, most)}', victim=_any(course, rng))
    for moment in struck(life):
        assert max(life.ended) - moment <= WITHIN_S, f'gone only {max(life.ended) - moment:.1f} s after a signal'
    return life


def hang(course: Course, rng: random.Random, seconds: float) -> Life:
    """A process stands still, asleep or holding Python's lock: the watchdog ends it."""
    del seconds
    place = rng.choice(('data', 'train', 'evaluate', 'save'))
    most = {'data': 250, 'train': 1, 'save': 12, 'evaluate': 5}[place]
    kept = course.arguments
    course.arguments = (*kept, *(f'--config.watchdog.{phase}=4' for phase in ('data', 'train', 'evaluate', 'save')))
    life = course.life(f'{rng.choice(("hang", "gil"))}@{place}:{rng.randint(1, most)}', victim=_any(course, rng))
    course.arguments = kept
    return life


def full_disk(course: Course, rng: random.Random, seconds: float) -> Life:
    """No file may grow; sometimes there is room again before the time to try is over."""
    del seconds
    at = rng.randint(1, 8)
    kept = course.arguments
    course.arguments = (*kept, '--config.checkpoint.retry_minutes=0.05')
    life = course.life(f'full@save:{at}' + (f',room@save:{at + 1}' if rng.random() < 0.5 else ''), victim=_any(course, rng))
    course.arguments = kept
    return life


def damage(course: Course, rng: random.Random, seconds: float) -> bool:
    """The newest checkpoint is damaged between two lives, if there is one before it."""
    del seconds
    folder = course.workdir / 'checkpoints'
    if folder.is_dir() and sum(path.name.isdigit() for path in folder.iterdir()) > 1:
        paths = sorted(path for path in newest(folder).rglob('*') if path.is_file())
        if paths:
            rng.choice(corruptions.DAMAGES)(rng.choice([p for p in paths if p.stat().st_size]), rng)
            return True
    return False


def _phases(course: Course) -> tuple[str, ...]:
    return PHASES if course.processes == 1 else PHASES[1:]  # in `start` they have not found each other


def _any(course: Course, rng: random.Random) -> int:
    return rng.randrange(course.processes)


FAULTS = (
    Fault('kill -9 at a random time', kill_at_a_time, (0, -9, 134, -6)),
    Fault('kill -9 in a phase or commit', kill_at_a_place, (0, -9, 134, -6)),
    Fault(SIGNAL, stop, (0, 75)),
    Fault('hang', hang, (0, 124, 134, -6)),
    Fault('disk full', full_disk, (0, 74, 134)),
    Fault('damaged checkpoint', damage, ()),
)
WEIGHTS = (4, 3, 3, 1, 1, 2)
COURSE = re.compile(r'^course \d+ \((\d) processes, (\d+) lives\): (.*?): (exact$|\[)', re.MULTILINE)


class Soak:
    """Courses until enough faults have struck; `counts` by kind, `lost` with what was lost."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self.folder, self.rng = folder, random.Random(seed)  # noqa: S311 - no secret
        self.bases = {n: Course(folder / f'base{n}', processes=n).run() for n in (1, 2)}
        self.counts: collections.Counter[str] = collections.Counter()
        self.lost, self.lines = [], []

    def course(self, number: int) -> None:
        """One course, judged."""
        processes = 2 if number % 4 == 3 else 1
        base = self.bases[processes]
        course = Course(self.folder / f'course{number}', processes)
        told = []
        try:
            for fault in self.rng.choices(FAULTS, WEIGHTS, k=self.rng.randint(1, 4)):
                self._hit(course, fault, base.lives[0].seconds, told)
            proof = course.run().proof()
            wrong = [name for name, value in base.proof().items() if proof[name] != value] + course.leftovers()
        except Exception:  # noqa: BLE001 - every failure is a loss, and is told
            wrong = [traceback.format_exc()]
        line = f'course {number} ({processes} processes, {len(course.lives)} lives): {", ".join(told)}: {wrong or "exact"}'
        self.lines.append(line)
        print(line, flush=True)
        if wrong:
            self.lost.append((number, told, wrong))
        else:
            shutil.rmtree(course.workdir)

    def _hit(self, course: Course, fault: Fault, seconds: float, told: list[str]) -> None:
        life = fault.strike(course, self.rng, seconds)
        if isinstance(life, bool):
            has_struck, ended = life, ''
        else:  # it may have been over before, or nearly
            has_struck, ended = bool(struck(life)) or -9 in life.codes, f' {life.codes}'
            has_struck &= fault.kind != SIGNAL or any(life.codes)
        self.counts[fault.kind] += has_struck
        told.append(f'{fault.kind}{ended}{"" if has_struck else " (missed)"}')
        if not isinstance(life, bool):
            assert set(life.codes) <= set(fault.codes), f'{fault.kind}: exit codes {life.codes}\n{life.told[0][-3000:]}'


def main() -> int:
    """Runs the soak; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--faults', type=int, default=200, help='how many must strike')
    parser.add_argument('--matrix', action=argparse.BooleanOptionalAction, default=True, help='every fault in every phase')
    parser.add_argument('--corruptions', type=int, default=300, help='damages to files of a checkpoint')
    parser.add_argument('--seed', type=int, default=None, help='of the random numbers; default: the time')
    parser.add_argument('--output', type=pathlib.Path, default=None, help='a JSON file for the numbers')
    parser.add_argument('--tally', type=pathlib.Path, nargs='+', help='only adds up what runs, ended or not, have printed')
    options = parser.parse_args()
    if options.tally:
        print(tally('\n'.join(path.read_text(encoding='utf-8') for path in options.tally)))
        return 0
    signal.signal(signal.SIGHUP, lambda *_: None)  # a handler is not inherited, but that nohup ignores it would be
    seed = int(time.time()) if options.seed is None else options.seed
    print(f'seed {seed}', flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        damaged = corruptions.corruptions(folder, options.corruptions, seed)
        print(json.dumps(damaged), flush=True)
        cells, lost = fault_matrix.matrix(folder / 'matrix') if options.matrix else ({}, [])
        soak, number = Soak(folder / 'soak', seed), 0
        while soak.counts.total() < options.faults:
            soak.course(number)
            number += 1
    minutes = (time.monotonic() - start) / 60
    print(table(soak, damaged, seed, minutes), fault_matrix.table(cells), sep='\n\n')
    if options.output is not None:
        numbers = {'seed': seed, 'corruptions': damaged, 'faults': dict(soak.counts), 'courses': number, 'lost': soak.lost}
        numbers |= {'matrix': cells, 'lost in the matrix': lost}
        options.output.write_text(json.dumps(numbers, indent=1))
    return 1 if soak.lost or lost or damaged['verified'].get('SILENTLY WRONG') else 0


def tally(printed: str) -> str:
    """The table of the faults that the lines of any number of runs tell of."""
    counts: collections.Counter[str] = collections.Counter()
    exact, lives, lost = collections.Counter(), 0, 0
    for processes, own, told, outcome in COURSE.findall(printed):
        for fault in FAULTS:
            for codes, missed in re.findall(rf'{re.escape(fault.kind)}( \[[^]]*\])?( \(missed\))?', told):
                counts[fault.kind] += not (missed or (fault.kind == SIGNAL and not set(codes) & set('123456789')))
        lives += int(own)
        exact[processes] += outcome == 'exact'
        lost += outcome != 'exact'
    rows = [f'| {kind} | {count} |' for kind, count in counts.most_common()]
    told = (
        f'{exact.total() + lost} courses with {lives} lives: {exact["1"]} of one process and {exact["2"]} of two ended bit '
        f'for bit like the run that nothing happened to, {lost} were lost.'
    )
    return '\n'.join(['| fault | struck |', '|---|---|', *rows, f'| **all** | **{counts.total()}** |', '', told])


def table(soak: Soak, damaged: dict, seed: int, minutes: float) -> str:
    """The tables of BENCHMARKS.md."""
    kinds = sorted({*damaged['verified'], *damaged['orbax alone']})
    outcomes = [f'| {kind} | {damaged["verified"].get(kind, 0)} | {damaged["orbax alone"].get(kind, 0)} |' for kind in kinds]
    lines = '\n'.join(soak.lines)
    told = f'{tally(lines)} Seed {seed}, {minutes:.0f} minutes, {cpu_name()}.'
    head = f'| a restore after one of {damaged["n"]} damages to {damaged["files"]} files | verified | Orbax alone |'
    return '\n'.join([told, '', head, '|---|---|---|', *outcomes])


if __name__ == '__main__':
    raise SystemExit(main())
