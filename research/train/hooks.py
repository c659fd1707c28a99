"""Hooks: what happens beside the steps. Each is called after every step as `hook(step, state, terms)`, in the order listed.

The order is log, evaluate, checkpoint, early stop: a checkpoint is judged by an evaluation of the same step. No hook keeps
anything that a restart would lose: what they must know of the past stands in `metrics.jsonl` or in the checkpoint. After a
restart at step k all but the log are called for step k again: what a death cut short there is completed, what was done is not
done twice.
"""

import math
import time
from typing import Any, Protocol

import jax
import numpy as np

from research.core.errors import NumericalError, StorageError, UsageError, nearest
from research.core.schema import Experiment
from research.core.terms import Packed, fetched
from research.parallel import hosts
from research.parallel.hardware import utilisation
from research.train.checkpoint import NUMBERS_FIX, PERMANENT, TEMPORARY, Checkpoints
from research.train.numbers import BadNumbersError, Losses
from research.train.run import Run, shown
from research.train.state import TrainState

RETRY_S = 5.0  # before the first new attempt of a save that failed; twice as long before each that follows


class Hook(Protocol):
    """Something that looks at a run after each step."""

    def __call__(self, step: int, state: TrainState, terms: Packed) -> None:
        """`step` steps are done; `state` and `terms` are those of the last."""
        ...


class LogHook:
    """Collects the terms of every step on the device; fetches, averages, records and judges them at log steps only.

    `earlier` is the meta data of the checkpoint of `step` that the run goes on from.
    """

    def __init__(self, run: Run, earlier: dict[str, Any], step: int):
        self.run = run
        self._terms: list[Packed] = []
        self.losses = Losses(run.experiment.train.spike_sigmas, earlier.get('losses'))
        earlier = earlier.get('log', {})  # steps since the last record, done before a restart
        self._sums = {name: np.array(sums) for name, sums in earlier.items()}
        self._steps, self._seconds, self.recorded = 0, self._paced(), step

    def __call__(self, step: int, state: TrainState, terms: Packed) -> None:
        self._terms.append(terms)
        self._steps += 1
        if self.run.is_due(self.run.experiment.log.every, step) or step == self.run.total_steps:
            loss = self._record(step, state)
            self._check_numbers(step, state, loss)
        self.run.reporter.advance(step)

    def unrecorded(self) -> dict[str, list[float]]:
        """The [sum, weight] of each term since the last record: what a checkpoint must hold for the next one to be whole."""
        if self._terms:
            names = self._terms[0].names
            rows = fetched(self._terms)  # (steps, n, 2)
            total, weight = rows[:, names.index('loss')].T
            self.losses.add(np.divide(total, weight, out=np.full_like(total, math.nan), where=weight != 0).tolist())
            earlier = np.stack([self._sums.get(name, np.zeros(2)) for name in names])
            # One after the other, as if a checkpoint had been made in between.
            sums = np.add.accumulate(np.concatenate([earlier[None], rows]))[-1]
            self._sums |= dict(zip(names, sums, strict=True))
            self._terms = []
        return {name: sums.tolist() for name, sums in self._sums.items()}

    def _record(self, step: int, state: TrainState) -> float:
        """Writes the means over the steps since the last record, the pace and the learning rate; returns the loss."""
        sums = sorted(self.unrecorded().items())
        values: dict[str, Any] = {name: total / weight if weight else float('nan') for name, (total, weight) in sums}
        seconds = self._paced() - self._seconds
        pace = self._pace(self._steps, seconds)
        self._sums, self._steps, self._seconds = {}, 0, self._seconds + seconds
        skips = int(state.extra['skips']['total']) if 'skips' in state.extra else 0  # a skipped step moves no schedule
        values |= {'learning_rate': float(jax.jit(self.run.learning_rate)(max(step - 1 - skips, 0))), **pace}  # not 20 programs
        self.run.writer.write(step, 'train', self.run.clock.total(), values)
        mfu = 'unknown' if pace['mfu'] is None else f'{100 * pace["mfu"]:.1f}%'
        losses = shown({k: values[k] for k in ('loss', 'accuracy') if k in values})
        unit = 'tokens' if 'tokens_per_second' in pace else 'examples'
        self.run.reporter.figures(losses, f'{pace[f"{unit}_per_second"]:,.0f} {unit}/s', f'MFU {mfu}')
        return values['loss']

    def _paced(self) -> float:
        """Seconds of training so far, waiting for data included."""
        return sum(self.run.clock.snapshot().get(phase, 0.0) for phase in ('train', 'data'))

    def _pace(self, steps: int, seconds: float) -> dict[str, Any]:
        facts, mesh = self.run.facts, self.run.mesh
        rate = steps / max(seconds, 1e-9)
        mfu = None
        if facts.step_flops is not None:
            mfu = utilisation(facts.step_flops * rate, list(mesh.devices.flat), self.run.experiment.train.precision)
        pace = {'examples_per_second': rate * facts.batch_size, 'mfu': mfu}
        if facts.example_tokens is not None:
            pace['tokens_per_second'] = pace['examples_per_second'] * facts.example_tokens
        return pace

    def _check_numbers(self, step: int, state: TrainState, loss: float) -> None:
        """Stops steps that come to nothing: a spike, too many skipped steps in a row, or, without the guard, a bad loss.

        Raises:
          BadNumbersError: so it is.
          NumericalError: the run is over, and most of its steps were skipped.
        """
        if 'skips' not in state.extra:
            if not math.isfinite(loss):
                raise BadNumbersError(self.recorded, step, 'the loss is not finite')
        else:
            in_a_row, total = (int(state.extra['skips'][name]) for name in ('in_a_row', 'total'))
            if in_a_row >= self.run.experiment.train.max_skips:
                raise BadNumbersError(step - in_a_row, step, f'the last {in_a_row} steps are not finite', is_harmless=True)
            if step == self.run.total_steps and total > step / 2:
                raise NumericalError(f'{total} of {step} steps are not finite', NUMBERS_FIX)
        self.losses.check(step)
        self.recorded = step


class EvaluateHook:
    """Evaluates the periodic splits when they are due."""

    def __init__(self, run: Run):
        self.run = run

    def __call__(self, step: int, state: TrainState, terms: Packed) -> None:
        if self.run.is_due(self.run.experiment.evaluate.every, step):
            for split in self.run.experiment.evaluate.splits:
                self.run.evaluate(split, step, state, whole=step == self.run.total_steps)


class CheckpointHook:
    """Saves when it is due, and the best state apart when an evaluation of this step is the best so far.

    A save that fails is tried again, with the state of then, for `checkpoint.retry_minutes`; then the run ends. Not so the best
    state: it is of one step, and when it cannot be saved the one before stays.
    """

    def __init__(self, run: Run, checkpoints: Checkpoints, best: Checkpoints | None, log: LogHook):
        self.run, self.checkpoints, self.best, self.log = run, checkpoints, best, log
        self._saved_at = time.monotonic()

    def __call__(self, step: int, state: TrainState, terms: Packed) -> None:
        if self.best is not None and self._is_best(step):
            self.save(self.best, step, state)
        if self.run.is_due(self.run.experiment.checkpoint.every, step):
            self.save(self.checkpoints, step, state)
        elif hosts.is_main() and self._is_wanted():
            self.run.votes.request('save')
        if self.run.votes.agreed('save'):
            self.save(self.checkpoints, step, state, TEMPORARY)
        self._check()

    def save(self, checkpoints: Checkpoints, step: int, state: TrainState, kind: str = PERMANENT) -> None:
        """Saves now; the disk is written in the background."""
        self.run.reporter.phase('saving')
        with self.run.clock.phase('save'):
            self._saved_at = time.monotonic()
            meta = {'log': self.log.unrecorded(), 'losses': self.log.losses.to_keep(), 'rollbacks': len(self.run.windows)}
            spent = {'seconds': self.run.clock.snapshot(), 'device_seconds': self.run.device_seconds()}
            if self.best is not None and not hosts.is_alone():  # Orbax' barriers have the same names in both
                self.checkpoints.wait()
                self.best.wait()
            # What a checkpoint says is done must be on record, also after a power cut.
            problem, saved = hosts.share(self.run.writer.flush(sync=True)), False
            try:
                if problem is None:
                    saved = checkpoints.save(step, state, {**spent, **meta}, kind)
                else:
                    checkpoints.refuse(step, problem)
            except NumericalError as error:
                raise BadNumbersError(self.log.recorded, step, str(error).partition('\n')[0]) from error
        if saved:
            self.run.directory.event('save', step=step, folder=checkpoints.folder.name, kind=kind, seconds=self.run.clock.own())
        self.run.reporter.phase('training')

    def finish(self, step: int, state: TrainState, may_retry: bool) -> None:
        """Returns when the state after the last step is on disk.

        Raises:
          StorageError: it cannot be saved; at once, or, if it `may_retry`, after `checkpoint.retry_minutes`.
        """
        while True:
            self.save(self.checkpoints, step, state)
            with self.run.clock.phase('save'):
                self.checkpoints.wait()
            if hosts.all_true(self.checkpoints.failure is None):
                return
            self._check(may_retry)
            with self.run.clock.phase('save'):
                left = 60 * self.run.experiment.checkpoint.retry_minutes - self._tried()
                time.sleep(max(min(self._pause(), left, 60.0), 0.0))

    def _is_best(self, step: int) -> bool:
        metric = self.run.experiment.checkpoint.best
        if metric is None or not self.run.is_evaluated(metric, step):
            return False
        return best_step(history(self.run, metric), best_mode(self.run.experiment)) == step

    def _is_wanted(self) -> bool:
        """Whether a temporary checkpoint is due, or a save that failed is to be tried again."""
        failure, minutes = self.checkpoints.failure, self.run.experiment.checkpoint.temporary_minutes
        now = time.monotonic()
        if failure is not None:
            return now - failure.last > self._pause()
        return minutes is not None and now - self._saved_at > 60 * minutes

    def _pause(self) -> float:
        failure = self.checkpoints.failure
        return RETRY_S * 2 ** (min(failure.count, 8) - 1) if failure else 0.0

    def _tried(self) -> float:
        failure = self.checkpoints.failure
        return time.monotonic() - failure.since if failure else 0.0

    def _check(self, may_retry: bool = True) -> None:
        failure, tried = self.checkpoints.failure, self._tried()
        if failure is None or (may_retry and tried < 60 * self.run.experiment.checkpoint.retry_minutes):
            return
        good = self.checkpoints.latest()
        last = 'no step is saved' if good is None else f'the last good one is step {good}'
        raise StorageError(
            f'nothing could be saved in {self.checkpoints.folder} for {tried:.0f} s ({failure.reason}); {last}',
            'make room or mend the disk; the same command goes on from there',
        )


class EarlyStopHook:
    """Ends the run when the watched metric has not improved for `patience` evaluations."""

    def __init__(self, run: Run):
        self.run = run
        self.check()

    def __call__(self, step: int, state: TrainState, terms: Packed) -> None:
        settings = self.run.experiment.train.early_stop
        if settings.metric and self.run.is_evaluated(settings.metric, step):
            self.check()

    def check(self) -> None:
        """Looks at the record; also at the start, since a run may have ended there."""
        settings = self.run.experiment.train.early_stop
        if not settings.metric:
            return
        mode = settings.mode or direction(settings.metric)
        waited = evaluations_since_best([v for _, v in history(self.run, settings.metric)], mode, settings.margin)
        if waited >= settings.patience:
            better = {'min': 'fallen', 'max': 'risen'}[mode]
            self.run.stop = f'{settings.metric} has not {better} for {waited} evaluations'


def check_watched(experiment: Experiment, results: list[str]) -> None:
    """Refuses, before anything is trained, to watch a metric that will never be measured.

    Args:
      experiment: watches `train.early_stop.metric` and `checkpoint.best`.
      results: the single numbers that an evaluation gives, such as 'loss' and 'f1_macro'.

    Raises:
      UsageError: a metric is not 'split/name' of a periodic evaluation.
    """
    known = [f'{split}/{name}' for split in experiment.evaluate.splits for name in results]
    watched = {'train.early_stop.metric': experiment.train.early_stop.metric, 'checkpoint.best': experiment.checkpoint.best}
    for key, metric in watched.items():
        if metric is not None and metric not in known:
            raise UsageError(f'config.{key}={metric!r} is not measured', nearest(metric, known))


LESS_IS_BETTER = ('loss', 'mse', 'mae', 'calibration_error', 'perplexity', 'bits_per_byte', 'wer', 'cer')


def direction(metric: str) -> str:
    """'min' for losses and errors, 'max' for all else, by the name after 'split/'."""
    return 'min' if metric.partition('/')[2] in LESS_IS_BETTER else 'max'


def history(run: Run, metric: str) -> list[tuple[int, float]]:
    """(step, value) of 'split/name' in the order of the records; a value that is not finite counts as NaN."""
    split, _, name = metric.partition('/')
    records = {r['step']: r[name] for r in run.writer.records() if r['split'] == split and name in r}
    return [(step, float('nan') if value is None else value) for step, value in hosts.share(list(records.items()))]


def best_mode(experiment: Experiment) -> str:
    """'min' or 'max', for `checkpoint.best`."""
    return experiment.checkpoint.best_mode or direction(str(experiment.checkpoint.best))


def best_step(values: list[tuple[int, float]], mode: str) -> int | None:
    """The step of the first best value; NaN is never best."""
    finite = [(v if mode == 'min' else -v, step) for step, v in values if v == v]
    return min(finite)[1] if finite else None


def evaluations_since_best(values: list[float], mode: str, margin: float) -> int:
    """How many evaluations came after the last that improved on all before it by more than `margin`."""
    best, since = float('inf'), 0
    for value in values:
        cost = value if mode == 'min' else -value
        improved = cost < best - margin
        best, since = (cost, 0) if improved else (best, since + 1)
    return since
