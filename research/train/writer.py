"""Records go to `metrics.jsonl`, the source of truth, and to TensorBoard for those who like to look at curves.

Neither ever stops the training. A record that the disk does not take waits, and no checkpoint is made while one waits
(`flush`). TensorBoard is written by a thread of its own: it may fail, or hang, and costs its curves alone.
"""

import contextlib
import math
import queue
import threading
from collections.abc import Callable
from typing import Any

from research.core.journal import Journal
from research.train.run_directory import RunDirectory

BOARD_QUEUE = 10_000  # scalars that may wait for TensorBoard; more are dropped
BOARD_CLOSE_S = 5.0  # how long the end of a run waits for TensorBoard


class Writer:
    """Appends records; each line is written at once, so that a killed process loses none. A context manager."""

    def __init__(self, directory: RunDirectory, tensorboard: bool, say: Callable[[str], None] = print):
        self._directory = directory
        self._journal = None if directory.is_silent else Journal(directory.metrics)
        self._board = Board(directory, say) if tensorboard and not directory.is_silent else None
        self._say, self._problem = say, None

    def write(self, step: int, split: str, seconds: float, values: dict[str, Any]) -> None:
        """Appends {"step", "split", "time": seconds, **values}; lists stay out of TensorBoard."""
        if self._journal is None:
            return
        self._journal.append({'step': step, 'split': split, 'time': round(seconds, 3), **values})
        self.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self._board.add(f'{split}/{name}', value, step)

    def records(self) -> list[dict[str, Any]]:
        """All records of the run, those that wait for the disk too."""
        waiting = [] if self._journal is None else self._journal.waiting()
        return self._directory.read_metrics() + waiting

    def keep_until(self, step: int) -> None:
        """Drops the records after `step`, on disk and waiting."""
        if self._journal is not None:
            self._journal.keep(lambda record: record['step'] <= step)
            self._directory.keep_metrics_until(step)

    def flush(self, sync: bool = False) -> str | None:
        """Writes what waits; says, and returns, why that is impossible. `sync`: down to the disk, against a power cut."""
        problem = None if self._journal is None else self._journal.flush(sync)
        if problem is not None and self._problem is None:
            self._say(f'warning: {problem}; the records wait in memory and training goes on')
        self._problem = problem
        return problem

    def __enter__(self) -> 'Writer':
        return self

    def __exit__(self, *_: Any) -> None:
        self.flush()
        if self._board is not None:
            self._board.close()


class Board:
    """TensorBoard's event files, written by a daemon thread from a queue that drops rather than waits."""

    def __init__(self, directory: RunDirectory, say: Callable[[str], None]):
        self._folder, self._say = str(directory.tensorboard), say
        self._queue: queue.Queue[tuple[str, float, int] | None] = queue.Queue(BOARD_QUEUE)
        self._thread = threading.Thread(target=self._work, name='tensorboard', daemon=True)
        self._thread.start()

    def add(self, name: str, value: float, step: int) -> None:
        """Queues one scalar."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait((name, value, step))

    def close(self) -> None:
        """Waits for the rest, but not for ever."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(BOARD_CLOSE_S)

    def _work(self) -> None:
        try:
            writer = None
            while (item := self._queue.get()) is not None:
                writer = writer or _tensorboard(self._folder)  # at the first scalar: before, the start needs the processor
                writer.add_scalar(*item)
            if writer is not None:
                writer.close()
        except Exception as error:  # noqa: BLE001 - curves are not worth a run
            self._say(f'warning: TensorBoard is off ({type(error).__name__}: {error}); metrics.jsonl has every record')
            while self._queue.get() is not None:
                pass


def _tensorboard(folder: str) -> Any:
    from tensorboardX import SummaryWriter  # imported late: only who asks for it waits for it

    return SummaryWriter(folder)
