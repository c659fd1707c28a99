"""Ctrl-C and SIGTERM: the first asks the run to stop after this step and save; the second ends the process at once."""

import signal
import sys
from types import FrameType
from typing import Any


class StopRequest:
    """While entered, catches SIGINT and SIGTERM; `name` is the signal that came, None as long as none did."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> 'StopRequest':
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        sys.stderr.write(f'\n{self.name}: stopping after this step, and saving; once more to quit at once\n')
