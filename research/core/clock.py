"""Where the time goes: seconds by phase ('compile', 'train', 'evaluate', 'save', ...), resumable, on the monotonic clock."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Adds up seconds by phase; phases nest, and a nested phase's seconds do not count in the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside the `with` block as `name`."""
        self._settle()
        self._stack.append(name)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def add(self, seconds: dict[str, float]) -> None:
        """Adds the seconds of an earlier part of the same run."""
        for name, more in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + more

    def total(self) -> float:
        """Seconds in all phases so far, the running one included."""
        self._settle()
        return sum(self.seconds.values())

    def snapshot(self) -> dict[str, float]:
        """Seconds by phase so far, the running one included."""
        self._settle()
        return dict(self.seconds)

    def _settle(self) -> None:
        now = time.monotonic()
        if self._stack:
            self.seconds[self._stack[-1]] = self.seconds.get(self._stack[-1], 0.0) + now - self._since
        self._since = now
