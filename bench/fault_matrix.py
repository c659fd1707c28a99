"""Every kind of fault in every phase, once: the seconds until all processes were gone. Part of `python -m bench.soak`.

Each cell is a run that is hit once and started again until it is done; it must end as the run that nothing happened to, and
with the exit codes and within the seconds that docs/reliability.md promises. Phases at the beginning of a life are hit in a
second life, when there is something to lose.
"""

import dataclasses
import itertools
import pathlib
import shutil
import traceback

from bench.fault_runs import Course, struck

SHORT = ('--config.train.duration=120 steps',)
PLACES = {
    'start': 1, 'restore': 1, 'compile': 1, 'data': 70, 'train': 1, 'evaluate': 2, 'save': 3, 'manifest': 3, 'rename': 3,
}  # fmt: skip
FIRST = ('start', 'restore', 'compile', 'train')  # come once, at the beginning of a life
MAIN_ONLY = ('manifest', 'rename')
BOUND_S = 4  # of each phase, for hangs


@dataclasses.dataclass(frozen=True)
class Column:
    """Faults that are given in turn, where, and how all may end: codes of the process that is hit and of others, seconds."""

    name: str
    faults: tuple[str, ...]
    places: tuple[str, ...]
    code: int
    within: float
    processes: int = 1
    victim: int = 0
    arguments: tuple[str, ...] = ()

    def ends_well(self, codes: list[int]) -> bool:
        """Whether these exit codes say what happened."""
        others = (75,) if self.code == 75 else (134, -6)
        return all(code == self.code if i == self.victim else code in others for i, code in enumerate(codes))


ALL, PAIR = tuple(PLACES), tuple(place for place in PLACES if place != 'start')  # before they have met, two are not promised
SECOND = tuple(place for place in PAIR if place not in MAIN_ONLY)
STOPS = ('term', 'int', 'usr1', 'hup')
BOUNDS = tuple(f'--config.watchdog.{phase}={BOUND_S}' for phase in ('restore', 'compile', 'data', 'train', 'evaluate', 'save'))
HUNG = ('restore', 'compile', 'data', 'train', 'evaluate', 'save')
COLUMNS = (
    Column('kill -9', ('kill',), ALL, -9, 5.0),
    Column('kill -9, main of two', ('kill',), PAIR, -9, 15.0, 2, 0),
    Column('kill -9, other of two', ('kill',), SECOND, -9, 15.0, 2, 1),
    Column('signal', STOPS, ALL, 75, 10.0),
    Column('signal, main of two', STOPS, PAIR, 75, 10.0, 2, 0),
    Column('signal, other of two', STOPS, SECOND, 75, 10.0, 2, 1),
    Column('hang', ('hang',), HUNG, 124, BOUND_S + 5.0, arguments=BOUNDS),
    Column('hang with the lock', ('gil',), HUNG, 124, BOUND_S + 8.0, arguments=BOUNDS),
)


def matrix(folder: pathlib.Path) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Seconds until all were gone, by column and place, and what went wrong."""
    bases = {n: Course(folder / f'base{n}', processes=n, arguments=SHORT).run().proof() for n in (1, 2)}
    found: dict[str, dict[str, float]] = {}
    lost = []
    for column in COLUMNS:
        found[column.name] = {}
        for place, fault in zip(column.places, itertools.cycle(column.faults)):
            course = Course(folder / 'cell', column.processes, arguments=(*SHORT, *column.arguments))
            try:
                seconds = _strike(course, column, place, fault)
                course.run()
                proof = course.proof()
                wrong = [name for name, value in bases[column.processes].items() if proof[name] != value] + course.leftovers()
                assert not wrong, wrong
                found[column.name][place] = seconds
                print(f'{column.name} at {place} ({fault}): gone after {seconds:.1f} s, exact', flush=True)
            except Exception:  # noqa: BLE001 - every failure is a loss, and is told
                lost.append(f'{column.name} at {place} ({fault}): {traceback.format_exc()}')
                print(lost[-1], flush=True)
            shutil.rmtree(course.workdir, ignore_errors=True)
    return found, lost


def _strike(course: Course, column: Column, place: str, fault: str) -> float:
    """Seconds from the fault to the end of the last process."""
    if place in FIRST:
        course.life('term@data:70')
    life = course.life(f'{fault}@{place}:{PLACES[place]}', victim=column.victim)
    moments = struck(life)
    assert len(moments) == 1, f'struck {len(moments)} times'
    seconds = max(life.ended) - moments[0]
    told = '\n'.join(text[-2000:] for text in life.told)
    assert column.ends_well(life.codes), f'exit codes {life.codes} after {seconds:.1f} s\n{told}'
    assert seconds <= column.within, f'gone only after {seconds:.1f} s\n{told}'
    return seconds


def table(found: dict[str, dict[str, float]]) -> str:
    """Rows by place, columns by fault, seconds."""
    head = '| in | ' + ' | '.join(found) + ' |'
    rows = [
        f'| {place} | ' + ' | '.join(f'{cells[place]:.1f}' if place in cells else '' for cells in found.values()) + ' |'
        for place in PLACES
    ]
    return '\n'.join([head, '|---' * (len(found) + 1) + '|', *rows])
