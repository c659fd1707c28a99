"""Records go to `metrics.jsonl`, the source of truth, and to TensorBoard for those who like to look at curves."""

import math
from typing import Any

from research.core import files
from research.train.run_directory import RunDirectory


class Writer:
    """Appends records; each line is flushed, so that a killed process loses none. A context manager."""

    def __init__(self, directory: RunDirectory, tensorboard: bool):
        self._file = open(directory.metrics, 'a', encoding='utf-8', buffering=1)  # noqa: SIM115 - closed by __exit__
        self._board = _tensorboard(directory) if tensorboard else None

    def write(self, step: int, split: str, seconds: float, values: dict[str, Any]) -> None:
        """Appends {"step", "split", "time": seconds, **values}; lists stay out of TensorBoard."""
        self._file.write(files.json_line({'step': step, 'split': split, 'time': round(seconds, 3), **values}))
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self._board.add_scalar(f'{split}/{name}', value, step)

    def __enter__(self) -> 'Writer':
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(directory: RunDirectory) -> Any:
    from tensorboardX import SummaryWriter  # imported late: only who asks for it waits for it

    return SummaryWriter(str(directory.tensorboard))
