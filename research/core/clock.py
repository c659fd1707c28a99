"""Where the time goes: seconds by phase ('compile', 'train', 'evaluate', 'save', ...), resumable, on the monotonic clock."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Clock:
    """Adds up seconds by phase; phases nest, and a nested phase's seconds do not count in the outer one.

    `listener` is told the name of the phase whenever it changes. `since`, a time of `time.monotonic`, is when the first phase
    began, if that was before the clock was made.
    """

    def __init__(self, listener: Callable[[str], None] | None = None, since: float | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._earlier: dict[str, float] = {}
        self._listener = listener
        self._stack: list[str] = []
        self._since = time.monotonic() if since is None else since
        self._is_new = since is not None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside the `with` block as `name`."""
        if not self._is_new:
            self._settle()
        self._is_new = False
        self._stack.append(name)
        self._tell()
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()
            self._tell()

    def add(self, seconds: dict[str, float]) -> None:
        """Adds the seconds of an earlier part of the same run."""
        for name, more in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + more
            self._earlier[name] = self._earlier.get(name, 0.0) + more

    def lose(self, kept: dict[str, float], phases: tuple[str, ...]) -> None:
        """Turns what `phases` took since the snapshot `kept` into 'lost': their work was thrown away."""
        self._settle()
        for name in phases:
            lost = self.seconds.get(name, 0.0) - kept.get(name, 0.0)
            self.seconds[name] = self.seconds.get(name, 0.0) - lost
            self.seconds['lost'] = self.seconds.get('lost', 0.0) + lost

    def total(self) -> float:
        """Seconds in all phases so far, the running one included."""
        self._settle()
        return sum(self.seconds.values())

    def snapshot(self) -> dict[str, float]:
        """Seconds by phase so far, the running one included."""
        self._settle()
        return dict(self.seconds)

    def own(self) -> dict[str, float]:
        """Seconds by phase so far without what was added of earlier parts."""
        return {name: seconds - self._earlier.get(name, 0.0) for name, seconds in self.snapshot().items()}

    def _tell(self) -> None:
        if self._listener is not None and self._stack:
            self._listener(self._stack[-1])

    def _settle(self) -> None:
        now = time.monotonic()
        if self._stack:
            self.seconds[self._stack[-1]] = self.seconds.get(self._stack[-1], 0.0) + now - self._since
        self._since = now
