"""Bad numbers: back to the last good checkpoint, leave the batches out that led there, at most `train.max_rollbacks` times.

    history = [{'at': 400, 'count': 57, 'step': 457, 'reason': 'the loss has jumped ...'}]        # rollbacks.json

After the checkpoint of step 400 the 57 batches up to step 457 are left out: step 401 trains on what step 458 would have had.
The plan stays arithmetic: batch k of the run is batch k + (sum of the counts whose `at` <= k) of the plan (PaLM's recipe for
loss spikes, Chowdhery et al. 2022, section 5.1). The history is on disk before anything else happens, so that a run that dies
at any moment goes on in the same way. When it is not enough, `failure/bundle.json` says what to look at, and `--mode=replay`
runs the step again under NaN debugging.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from research.core import files
from research.core.errors import NumericalError
from research.core.redact import redact
from research.data.plan import Plan, plan_of
from research.parallel import hosts
from research.train.checkpoint import NUMBERS_FIX, Checkpoints
from research.train.numbers import BadNumbersError
from research.train.run import Run
from research.train.state import TrainState

History = list[dict[str, Any]]
LOST = ('data', 'train', 'evaluate', 'save')


class Shifted:
    """A plan from which batches are left out."""

    def __init__(self, plan: Plan, history: History):
        self.plan, self.history = plan, history

    @property
    def batch_size(self) -> int:
        """B, as in the plan."""
        return self.plan.batch_size

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(indices, epochs, mask) of one step of the run."""
        return self.plan.batch(shifted(step, self.history))


def shifted(step: int, history: History) -> int:
    """The plan's number of the batch that the run has at `step`."""
    return step + sum(entry['count'] for entry in history if entry['at'] <= step)


def training_plan(run: Run) -> Plan:
    """The order of training, without what is left out."""
    plan = plan_of(run.splits['train'], run.experiment.data.batch_size, run.experiment.seed)
    return Shifted(plan, run.windows) if run.windows else plan


def read_history(path: pathlib.Path) -> History:
    """What was left out so far."""
    return hosts.share(files.read_json(path) if hosts.is_main() and path.exists() else [])


def drop_discarded(checkpoints: Checkpoints, history: History) -> None:
    """Deletes checkpoints of a course that a rollback has ended, where a death came between the two."""
    if not hosts.is_main():
        return
    for step in checkpoints.steps():
        known = checkpoints.meta(step).get('rollbacks', len(history))
        if any(entry['at'] < step for entry in history[known:]):
            checkpoints.drop_after(step - 1)
            return


def until_done(
    run: Run,
    checkpoints: list[Checkpoints],
    restore: Callable[[int], tuple[TrainState, dict[str, Any]]],
    steps: Callable[[TrainState, dict[str, Any]], TrainState],
    state: TrainState,
    meta: dict[str, Any],
) -> TrainState:
    """Runs `steps` from `state`; where the numbers go bad, from the last good state, without the batches between.

    Args:
      run: gets the windows, and events of them.
      checkpoints: the periodic ones, then others whose later steps must go with the course.
      restore: the newest good state that is not newer than a step, and the meta data of its checkpoint.
      steps: the steps that are left, from a state and its meta data; raises BadNumbersError.
      state: to begin with.
      meta: of its checkpoint.

    Raises:
      NumericalError: it went back `train.max_rollbacks` times, and the numbers are bad again; or all checkpoints that are kept
        are from after they went bad.
    """
    while True:
        try:
            return steps(state, meta)
        except BadNumbersError as bad:
            until = _target(bad, checkpoints[0])
            if until is None or len(run.windows) >= run.experiment.train.max_rollbacks:
                raise _given_up(run, bad, checkpoints[0], is_too_late=until is None) from bad
            state, meta = _back(run, bad, until, checkpoints, restore)


def _target(bad: BadNumbersError, checkpoints: Checkpoints) -> int | None:
    """The newest step to go back to; None where there are checkpoints, but none from before the numbers went bad."""
    checkpoints.wait()
    oldest = hosts.share(min(checkpoints.steps(), default=0))
    return bad.since if oldest <= bad.since else oldest if bad.is_harmless else None


def _back(
    run: Run,
    bad: BadNumbersError,
    until: int,
    checkpoints: list[Checkpoints],
    restore: Callable[[int], tuple[TrainState, dict[str, Any]]],
) -> tuple[TrainState, dict[str, Any]]:
    """The last good state, with the history on disk and what came after it gone."""
    with run.clock.phase('restore'):
        state, meta = restore(until)
        at = int(state.step)
        run.windows.append({'at': at, 'count': bad.step - at, 'step': bad.step, 'reason': bad.reason})
        if hosts.is_main():
            files.write_json(run.directory.rollbacks, run.windows)
        run.reporter.say(
            f'warning: {bad.reason} at step {bad.step}: back to step {at}, without the {bad.step - at} batches between'
        )
        for kept in checkpoints:
            kept.drop_after(at)
        run.writer.keep_until(at)
        kept, earlier = meta.get('seconds', {}), run.earlier.get('seconds', {})
        run.clock.lose({name: max(kept.get(name, 0.0), earlier.get(name, 0.0)) for name in LOST}, LOST)
        run.remember(at)
        run.directory.event('rollback', step=bad.step, to=at, reason=bad.reason, seconds=run.clock.own())
    return state, meta


def _given_up(run: Run, bad: BadNumbersError, checkpoints: Checkpoints, is_too_late: bool) -> NumericalError:
    """Writes the bundle, and says where it is."""
    plan, path = training_plan(run), run.directory.failure
    steps = range(bad.since, bad.step)
    batches = [(k, *plan.batch(k)) for k in steps]
    bundle = {
        'reason': bad.reason,
        'steps_done': bad.step,
        'checkpoint': max((s for s in checkpoints.steps() if s <= bad.since), default=0),
        'batches': [
            {'step': k, 'batch': shifted(k, run.windows), 'ids': ids.tolist(), 'epochs': epochs.tolist()}
            for k, ids, epochs, _ in batches
        ],
        'randomness': {'seed': run.experiment.seed, 'key': "rng.key(seed, 'dropout', step)"},
        'rollbacks': run.windows,
        **{name: run.record[name] for name in ('config', 'packages', 'devices') if name in run.record},
    }
    if hosts.is_main():
        path.parent.mkdir(exist_ok=True)
        files.write_atomically(path, json.dumps(files.finite(redact(bundle))) + '\n')
    run.directory.event('failure', step=bad.step, reason=bad.reason, bundle=str(path))
    times = f' after {len(run.windows)} rollbacks' if run.windows else ''
    late = ', and no checkpoint from before is kept' if is_too_late else ''
    fix = f'{NUMBERS_FIX} (in another --workdir, or with --allow_config_change)'
    fix += '; raise config.checkpoint.keep' if is_too_late else ''
    return NumericalError(
        f'{bad.reason} at step {bad.step}{times}{late}; what led there is in {path}',
        f'{fix}; --mode=replay --workdir={run.directory.path} shows where',
    )
