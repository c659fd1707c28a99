"""What a person sees: a live bar on a terminal, one plain line every few seconds elsewhere (a log file, a pipe).

The bar covers every phase (starting, compiling, training, evaluating, saving), so the screen never stands still unexplained.
"""

import contextlib
import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

WIDE = 100  # columns from which on the bar has its full width
FIXED_WIDTH = 52  # spinner, phase, bar, share and elapsed time
TABLE_WIDTH = 128
REFRESH_PER_SECOND = 4  # drawing costs about 3 ms a frame on one core


class _Console(Console):
    """A console that falls silent when its reader has gone; rich' own would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):  # a file that is none
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())  # what else is printed, and Python's own flush at the end
            os.close(nowhere)


class Reporter:
    """Shows progress; use as a context manager. `quiet` shows nothing (for programs that call the loop)."""

    def __init__(self, plain_every: float = 5.0, quiet: bool = False):
        self.console = _Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.is_live = self.console.is_terminal and not quiet
        self._plain_every, self._last_line = plain_every, 0.0
        self._phase, self._pace = 'starting', Pace()
        self._figures: list[str] = []
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn('{task.description:<10}'),
            BarColumn(bar_width=24 if self.console.width >= WIDE else 6),
            TaskProgressColumn(),
            TextColumn('{task.completed:.0f}/{task.total:.0f}'),
            TimeElapsedColumn(),
            TextColumn('{task.fields[figures]}'),
            console=self.console,
            refresh_per_second=REFRESH_PER_SECOND,
            disable=not self.is_live,
        )
        self._bar = self._progress.add_task(self._phase, total=1, figures='')

    def __enter__(self) -> 'Reporter':
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone
            self._progress.stop()

    @property
    def table_width(self) -> int:
        """How wide a table may be: the terminal's width, or that of a file."""
        return min(self.console.width, TABLE_WIDTH) if self.is_live else TABLE_WIDTH

    def say(self, text: str) -> None:
        """Prints a line that stays, above the bar. An output that takes nothing (a full disk, a closed pipe) stops no run."""
        with contextlib.suppress(OSError):
            self._progress.console.print(text, markup=False)

    def phase(self, name: str) -> None:
        """Says what is going on: 'compiling', 'training', 'evaluating', 'saving'."""
        self._phase = name
        self._progress.update(self._bar, description=name, refresh=self.is_live)

    def begin(self, step: int, total: int) -> None:
        """The steps begin at `step` of `total`."""
        self._pace = Pace(step, total)
        self._progress.update(self._bar, total=total, completed=step)

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        self._pace.step = step
        if self.is_live:
            self._progress.update(self._bar, completed=step, figures=self._fitting(f'ETA {self._pace.remaining()}'))
        elif time.monotonic() - self._last_line >= self._plain_every or step == self._pace.total:
            self._line()

    def figures(self, *texts: str) -> None:
        """The newest measurements, most important first. Shown with the next step, as many as a terminal has room for."""
        self._figures = list(texts)

    def _line(self) -> None:
        self._last_line = time.monotonic()
        share = 100 * self._pace.step / max(self._pace.total, 1)
        done = f'step {self._pace.step}/{self._pace.total} {share:.0f}%'
        self.say('  '.join([done, f'ETA {self._pace.remaining()}', *self._figures]))

    def _fitting(self, first: str) -> str:
        """`first` and as many figures as fit beside the bar."""
        fixed = (FIXED_WIDTH if self.console.width >= WIDE else FIXED_WIDTH - 18) + len(f'{self._pace.step}/{self._pace.total}')
        room = self.console.width - fixed
        text = first
        for figure in self._figures:
            if len(text) + 2 + len(figure) > room:
                break
            text += f'  {figure}'
        return text


class Pace:
    """How long the rest will take, from the steps of this process so far."""

    def __init__(self, step: int = 0, total: int = 0):
        self.first, self.step, self.total = step, step, total
        self._since = time.monotonic()

    def remaining(self) -> str:
        """'h:mm:ss', or '-:--:--' before the first step."""
        done = self.step - self.first
        if not done:
            return '-:--:--'
        return clock_text((time.monotonic() - self._since) / done * (self.total - self.step))


def clock_text(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = round(max(seconds, 0.0))
    return f'{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}'
