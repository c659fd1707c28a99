"""Where the wall time of a run went, all its processes together; and `--mode=report`. Needs no jax and writes nothing.

A life is one process of the run. Two of them, in seconds since the first began, the first one killed:

    events.jsonl                                                                      counted
    0   start of step 0;  30  save of step 10 {start 10, compile 5, train 14, save 1}  start 10, compile 5, step 14, save 1
    40  killed: the last sign of life that the next start found in the lock           lost 10
    50  began again from step 10                                                      down 10
    90  exit {start 10, compile 5, train 24, save 1}                                  start 10, compile 5, step 24, save 1

    wall 90 = step 38 + save 2 + start 20 + compile 10 + lost 10 + down 10 + unaccounted 0; goodput 38 / 90 = 42.2 %

Had the second life gone on from step 0, the first one's step 14 and save 1 were lost too. What is done at the step of a
checkpoint (waiting for the disk, the evaluation) before a further step is kept with it: nobody does it again.

The phases come from the monotonic clock, the wall time from the clock on the wall: `unaccounted` is their difference, never
scaled away. More than 1 % of the wall says that seconds are counted twice or not at all, or that the wall clock was set.
"""

import dataclasses
import itertools
import math
import pathlib
import time
from collections.abc import Iterable
from typing import Any

from research.core import files
from research.core.errors import UsageError
from research.train.run_directory import RunDirectory

Event = dict[str, Any]
USEFUL = ('data', 'train', 'evaluate', 'save')  # what is thrown away with the steps that it belongs to
WORDS = {
    'train': 'step',
    'data': 'data wait',
    'evaluate': 'evaluation',
    'save': 'save',
    'start': 'start-up',
    'restore': 'restore',
    'compile': 'compile',
    'lost': 'lost work',
    'down': 'down',
}
CODES = {
    0: 'done',
    1: 'an unexpected error',
    2: 'usage',
    74: 'storage',
    75: 'stopped on request',
    76: 'the numbers went bad',
    77: 'permission',
    124: 'watchdog: no progress',
    134: 'another process was lost',
}


@dataclasses.dataclass
class Ledger:
    """Seconds by phase, of all lives; with `unaccounted` (below 0: more than the wall time was counted) they sum to `wall`."""

    seconds: dict[str, float]
    wall: float
    lives: int
    unaccounted: float

    @property
    def goodput(self) -> float:
        """The share of the wall time that went into steps that were kept; at most 1, also where the clock was set back."""
        return self._share(self.seconds['train'])

    def lines(self) -> list[str]:
        """The table: phase in words, time, share of the wall time."""
        lives = 'one life' if self.lives == 1 else f'{self.lives} lives'
        rows = [(WORDS.get(name, name), seconds) for name, seconds in self.seconds.items()]
        rows.append(('unaccounted', self.unaccounted))
        table = [f'  {name:<12} {_time(seconds):>10}  {100 * self._share(seconds):5.1f} %' for name, seconds in rows]
        if self.unaccounted < -0.05:  # less would be told as 0.0 s
            table.append(f'  {_time(-self.unaccounted)} more than the wall time are counted: was the clock set back?')
        return [f'goodput {100 * self.goodput:.1f} % of {_time(self.wall)} in {lives}', *table]

    def one_line(self) -> str:
        """The phases that matter, in one line."""
        shares = {WORDS.get(name, name): 100 * self._share(seconds) for name, seconds in self.seconds.items()}
        shares['unaccounted'] = 100 * self._share(abs(self.unaccounted))
        told = ', '.join(f'{name} {share:.1f} %' for name, share in shares.items() if share >= 0.05)
        return f'goodput {100 * self.goodput:.1f} % of {_time(self.wall)}' + (f': {told}' if told else '')

    def _share(self, seconds: float) -> float:
        return min(max(seconds, 0.0) / self.wall, 1.0) if self.wall else 0.0


def ledger(events: Iterable[Event]) -> Ledger:
    """The books of a run by its events, in the order of the file."""
    lives = lives_of(events)
    seconds = dict.fromkeys(WORDS, 0.0)
    for life in lives:
        for name, more in life.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + more
    for life, following in itertools.pairwise(lives):
        seconds['down'] += max(following.began - life.end, 0.0)
    wall = max(lives[-1].end - lives[0].began, 0.0) if lives else 0.0
    return Ledger(seconds, wall, len(lives), wall - math.fsum(seconds.values()))


class Life:
    """One process of the run, from its 'start' event on.

    Attributes:
      began, end: seconds since 1970; `end` moves on with the events.
      step: where it went on from.
      seconds: by phase, what was thrown away later as 'lost'. Empty for a life of old, which measured nothing.
      code: exit code; None: there is no exit event, it was killed or it is running.
      attempts: exit events of processes after it that ended before they had started to train.
    """

    def __init__(self, start: Event):
        self.is_measured = 'began' in start
        self.began, self.end, self.step = start.get('began', start['time']), start['time'], start['step']
        self.seconds: dict[str, float] = {}
        self.code: int | None = None
        self.attempts: list[Event] = []
        self._noted = self.end  # when the newest snapshot was taken
        # Until the first one: what came before the event is start-up, however much of it was the restore.
        self._note(start['time'], start.get('seconds', {'start': self.end - self.began}))

    def take(self, event: Event) -> bool:
        """Notes an event down; False if it is not of this life."""
        if self._is_stranger(event):
            self.attempts.append(event)
        if self.code is not None or self.attempts or event['event'] == 'corrupt':  # the next life may have found it, restoring
            return False
        self.end = event['time']
        self._note(self.end, event.get('seconds'))
        if event['event'] == 'exit':  # the first runs recorded no code, and only where they were completed
            self.code = event.get('code', 0)
        return True

    def close(self, start: Event) -> None:
        """The next life has started: where this one left no exit, it was killed, and what came after its last word is lost."""
        if self.code is not None:
            return
        alive = None if self.attempts else start.get('previous_alive')  # else it is a sign of a later process
        if alive is not None:
            self.end = max(self.end, min(alive, start.get('began', start['time'])))
        if self.is_measured:
            self.seconds['lost'] = self.seconds.get('lost', 0.0) + max(self.end - self._noted, 0.0)

    def lose(self, kept: dict[str, float]) -> None:
        """All useful work beyond `kept` was thrown away."""
        for name in USEFUL:
            lost = max(self.seconds.get(name, 0.0) - kept.get(name, 0.0), 0.0)
            self.seconds[name] = self.seconds.get(name, 0.0) - lost
            self.seconds['lost'] = self.seconds.get('lost', 0.0) + lost

    def _note(self, now: float, seconds: dict[str, float] | None) -> None:
        if self.is_measured and seconds is not None:
            self.seconds = {name: max(value, 0.0) for name, value in seconds.items()}
            self._noted = now

    def _is_stranger(self, event: Event) -> bool:
        """Whether it is the exit of a process that began after this life's last word and never came to compile."""
        seconds = event.get('seconds', {})
        never_compiled = event['event'] == 'exit' and bool(seconds) and 'compile' not in seconds
        return never_compiled and event['time'] - sum(seconds.values()) > self.end


@dataclasses.dataclass
class Save:
    """A checkpoint that later lives may go on from: of which life (by number), and what that had done by then."""

    step: int
    life: int
    seconds: dict[str, float]


def lives_of(events: Iterable[Event]) -> list[Life]:
    """The lives of a run, what was thrown away counted as lost."""
    lives: list[Life] = []
    saves: list[Save] = []  # of the course that the run is on, oldest first
    for event in events:
        if event['event'] == 'start':
            if lives:
                lives[-1].close(event)
            lives.append(Life(event))
            _go_back(event['step'], lives, saves)
        elif lives and lives[-1].take(event):
            _follow(event, lives, saves)
    return lives


def _follow(event: Event, lives: list[Life], saves: list[Save]) -> None:
    """Keeps the saves by an event of the newest life."""
    number, seconds = len(lives) - 1, lives[-1].seconds
    if event['event'] == 'save' and event['folder'] == 'checkpoints':
        saves.append(Save(event['step'], number, dict(seconds)))
    elif event['event'] == 'rollback':
        _go_back(event['to'], lives, saves)
    elif saves and saves[-1].life == number and saves[-1].seconds.get('train') == seconds.get('train'):
        saves[-1].seconds = dict(seconds)  # no step since: this still belongs to the save


def _go_back(step: int, lives: list[Life], saves: list[Save]) -> None:
    """The newest life goes on from `step`: what earlier ones did beyond its save is lost; its own snapshots know of its own."""
    while saves and (saves[-1].step > step or step == 0):
        saves.pop()
    first, kept = (saves[-1].life, saves[-1].seconds) if saves else (0, {})
    for number in range(first, len(lives) - 1):
        lives[number].lose(kept if number == first else {})
    if saves and first == len(lives) - 1:
        saves[-1].seconds = dict(lives[-1].seconds)


def report(workdir: pathlib.Path, overrides: list[str], trust: bool) -> None:
    """Prints what became of a run, and where its time went.

    Raises:
      UsageError: there is no run.
    """
    del trust
    if overrides:
        raise UsageError(f'--config.{overrides[0]} has no use in --mode=report', 'leave it out')
    directory = RunDirectory(workdir)
    run = directory.read_run()
    if run is None:
        raise UsageError(f'{workdir} holds no run', 'give the --workdir of a run that was started')
    events = list(files.read_json_lines(directory.events)) if directory.events.exists() else []
    lives = lives_of(events)
    print(f'{run["config"]["name"]} in {workdir}: {_status(directory, lives)}')
    print(_stand(directory, run, events))
    print('\n'.join(ledger(events).lines()))
    newest = {record['split']: record for record in directory.read_metrics()}
    for split, record in newest.items():
        values = '  '.join(_value(name, v) for name, v in record.items() if name not in ('step', 'split', 'time'))
        print(f'{split:<10}  step {record["step"]}  {values}')
    for number, life in enumerate(lives, 1):
        print(f'life {number}: {_time(life.end - life.began)} from step {life.step}: {_ending(life, life is lives[-1])}')


def _status(directory: RunDirectory, lives: list[Life]) -> str:
    """How the run stands: as its summary says, else by its last life."""
    summary = directory.read_summary()
    if summary is not None:
        return f'{summary["status"]} at step {summary["step"]}'
    sign = directory.lock.read()
    alive = '' if sign is None else f', last sign of life {_time(time.time() - sign["time"])} ago'
    return f'not complete: {_ending(lives[-1], True)}{alive}' if lives else f'no training yet{alive}'


def _stand(directory: RunDirectory, run: dict[str, Any], events: list[Event]) -> str:
    """How far it has come, and what it kept."""
    step = max((record['step'] for record in directory.read_metrics()), default=0)
    saved = directory.checkpoints.iterdir() if directory.checkpoints.is_dir() else ()
    newest = max((int(path.name) for path in saved if path.name.isdigit()), default='none')
    kinds = [event['event'] for event in events]
    words = {'save': 'saves', 'rollback': 'rollbacks', 'save_failed': 'saves that failed', 'corrupt': 'damaged checkpoints'}
    counts = ', '.join(f'{w} {kinds.count(k)}' for k, w in words.items() if k in kinds or k in ('save', 'rollback'))
    return f'step {step} of {run["config"]["train"]["duration"]}, newest checkpoint {newest}; {counts}'


def _ending(life: Life, is_last: bool) -> str:
    """How a life ended, in words."""
    if life.code is None:
        text = 'running, or killed' if is_last and not life.attempts else 'killed'
    else:
        text = f'exit code {life.code} ({CODES.get(life.code, "unknown")})'
    codes = ', '.join(str(event['code']) for event in life.attempts)
    return f'{text}; then {len(life.attempts)} that ended before the first step (exit code {codes})' if codes else text


def _value(name: str, value: Any) -> str:
    """A metric and its value; null, which stands for NaN and infinity in JSON, is told of and not left out."""
    missing = 'unknown' if name == 'mfu' else 'not finite'
    return f'{name} {value:.4g}' if isinstance(value, (int, float)) else f'{name} {missing if value is None else value}'


def _time(seconds: float) -> str:
    """'12.3 s' below a minute, else 'h:mm:ss'; never negative."""
    if seconds < 59.95:
        return f'{max(seconds, 0.0):.1f} s'
    whole = round(seconds)
    return f'{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}'
