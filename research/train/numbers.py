"""When the numbers of a run have gone wrong: too many skipped steps in a row, a loss that is not finite, or a spike.

A *spike* is judged robustly: the median of the last 8 losses against the median m of the 128 before them, in units of their
scaled median absolute deviation (1.4826 MAD, which is the standard deviation of normal numbers), which counts as at least 1 %
of the run's first loss. With m = 0.50, MAD = 0.02, a first loss of 2.30 and `train.spike_sigmas=30` the run has spiked when the
median of 8 losses is above 0.50 + 30 * 0.030 = 1.39. Medians, so that one bad batch is none.
"""

import math
import statistics
from collections.abc import Sequence

RECENT, BASE, LEAST = 8, 128, 32  # losses that are judged, that they are judged by, and that there must be to judge by
FLOOR = 0.01  # of the first loss


class BadNumbersError(Exception):
    """The numbers have gone wrong: `since` is the last step before it, `step` the newest.

    `is_harmless`: no step since then has changed the state, so that any checkpoint since then is as good.
    """

    def __init__(self, since: int, step: int, reason: str, is_harmless: bool = False):
        super().__init__(reason)
        self.since, self.step, self.reason, self.is_harmless = since, step, reason, is_harmless


class Losses:
    """The newest losses of a run, a number a step (NaN for a skipped one), and whether they spike.

    `kept` is what `to_keep` gave at a checkpoint, so that a resumed run judges as one that was never stopped.
    """

    def __init__(self, sigmas: float | None, kept: dict | None = None):
        kept = kept or {}
        self.sigmas = sigmas
        self.first: float | None = kept.get('first')
        self._values = [math.nan if v is None else v for v in kept.get('values', [])]
        self._judged = kept.get('judged', 0)  # how many of the values have been judged

    def add(self, losses: Sequence[float]) -> None:
        """The losses of the next steps."""
        if self.first is None:
            self.first = next((x for x in losses if math.isfinite(x)), None)
        self._values += losses

    def to_keep(self) -> dict:
        """What a checkpoint keeps."""
        return {'first': self.first, 'values': list(self._values), 'judged': self._judged}

    def check(self, step: int) -> None:
        """Judges the losses since the last check; `step` steps are done.

        Raises:
          BadNumbersError: they spike.
        """
        values, judged = self._values, self._judged
        high = self._high(values)
        for end in range(judged + 1, len(values) + 1):
            if sum(high[max(0, end - RECENT) : end]) < RECENT / 2:  # nearly always: their median is none that spikes
                continue
            if told := self._spike(values[max(0, end - RECENT - BASE) : end]):
                raise BadNumbersError(step - len(values) + end - RECENT, step, told)
        self._values = values[-(RECENT + BASE) :]
        self._judged = len(self._values)

    def _high(self, values: list[float]) -> list[bool]:
        """Which losses are above the lowest by more than `sigmas` of the least deviation.

        A median of recent losses that is not cannot spike: the median it is held against is no less than the lowest.
        """
        if self.sigmas is None:
            return [False] * len(values)
        lowest = min((x for x in values if math.isfinite(x)), default=math.inf)
        return [x > lowest + self.sigmas * FLOOR * abs(self.first or 0.0) for x in values]

    def _spike(self, values: list[float]) -> str | None:
        """What is wrong with the last of these losses, in words."""
        base, recent = ([x for x in part if math.isfinite(x)] for part in (values[:-RECENT], values[-RECENT:]))
        if len(base) < LEAST or len(recent) < RECENT:
            return None
        middle, now, least = statistics.median(base), statistics.median(recent), FLOOR * abs(self.first or 0.0)
        assert self.sigmas is not None
        scale = max(1.4826 * statistics.median([abs(x - middle) for x in base]), least)
        if now <= middle + self.sigmas * scale:
            return None
        return f'the loss has jumped from {middle:.4g} to {now:.4g}, more than {self.sigmas:g} deviations of {scale:.3g}'
