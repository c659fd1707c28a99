"""How a run starts: own checkpoint > `init_from` > scratch; and when it must not start.

* The same command goes on where it stopped (`run_directory.finished` answers for a run that is complete, and refuses a config
  that changed in a way that matters).
* `init_from` takes the weights of another run or of a Hugging Face folder, as far as `init_rules` say; `init_report.txt` tells
  what became of each leaf.
* A checkpoint that exists but cannot be read is an error, never a reason to begin anew over it.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.core import fields, files
from research.core.errors import UsageError
from research.core.leaves import Rules
from research.core.redact import redact
from research.core.schema import Experiment
from research.data.bad_records import BadRecords
from research.parallel import hosts
from research.train import partial
from research.train.build import Parts
from research.train.checkpoint import Checkpoints
from research.train.run import Run
from research.train.run_directory import RunDirectory, changes_of
from research.train.state import TrainState
from research.train.weights import read

FIX = (
    'the usual causes are another model, size, vocabulary or number of classes; to load a part, for example '
    "config.init_rules=(('head/.*', False), ('.*', True))"
)


def bad_records(experiment: Experiment, directory: RunDirectory, say: Callable[[str], None]) -> BadRecords | None:
    """Where the records that cannot be read are counted; None where the first one stops the run."""
    if experiment.data.on_bad_record == 'stop':
        return None
    return BadRecords(directory.bad_records, experiment.data.max_bad_share, hosts.index(), say)


def clear_other(experiment: Experiment, directory: RunDirectory, say: Callable[[str], None]) -> None:
    """Deletes what a run with another config has left here, if it saved nothing: it is not this run's past."""
    run = directory.read_run()
    if run is not None and not directory.has_progress() and changes_of(experiment, run) and hosts.is_main():
        directory.clear()
        say(f'begun anew: the run in {directory.path} had another config, and has saved nothing')


def check_fingerprint(directory: RunDirectory, fingerprint: str, allow_change: bool) -> None:
    """Refuses to go on with a run on other data than it began with.

    Raises:
      UsageError: the training data are not the same.
    """
    run = directory.read_run()
    is_other = run is not None and directory.has_progress() and run['data_fingerprint'] != fingerprint
    if is_other and not allow_change:
        raise UsageError(
            f'the training data are not those that the run in {directory.path} began with',
            'restore the data, or go on with the new data by --allow_config_change',
        )


def first_state(
    parts: Parts, experiment: Experiment, checkpoints: Checkpoints, until: int | None = None
) -> tuple[TrainState, dict[str, Any], str]:
    """The state to begin with, what its checkpoint says beside (empty if there is none), and where it came from, in words.

    `until`: of no newer step than this.
    """
    found = checkpoints.newest(parts.abstract, until)
    if found is not None:
        step, state, meta = found
        return state, meta, f'resumed from step {step}'
    if experiment.init_from is not None:
        report = checkpoints.folder.parent / 'init_report.txt'
        state, origin = _from_other(
            parts.init(), pathlib.Path(experiment.init_from).expanduser(), experiment.init_rules, report
        )
        return state, {}, origin
    return parts.init(), {}, 'started from scratch'


def go_on(run: Run, step: int, origin: str, best: Checkpoints | None, since: float) -> None:
    """Takes up the record of the run at `step`, and writes down that this process does.

    Raises:
      UsageError: the run is beyond its end.
    """
    if step > run.total_steps:
        raise UsageError(f'the run is at step {step}, beyond its {run.total_steps} steps', 'raise train.duration')
    run.clock.add(run.earlier.get('seconds', {}))
    if best is not None:
        best.drop_after(step)
    run.directory.keep_metrics_until(step)
    run.remember(step)
    if hosts.is_main():
        run.directory.summary.unlink(missing_ok=True)
    run.write_record()
    alive = None if run.directory.lock.earlier is None else run.directory.lock.earlier.get('time')
    began = time.time() - (time.monotonic() - since)
    run.directory.event(
        'start', origin=origin, step=step, began=began, previous_alive=alive, seconds=run.clock.own(), argv=redact(sys.argv)
    )
    run.reporter.say(origin)


def _from_other(fresh: TrainState, path: pathlib.Path, rules: Rules, report_file: pathlib.Path) -> tuple[TrainState, str]:
    """A fresh state with the weights in `path`, in the average too where one is kept; what was done goes to `report_file`.

    Raises:
      UsageError: there are no weights, or they do not fit.
    """
    weights, origin = read(path, 'config.init_from')
    loaded, report = partial.load_into(partial.named(fresh.variables), weights, rules)
    if hosts.is_main():
        files.write_atomically(report_file, f'{origin}\n{report.text()}')
    report.check(f'config.init_from={str(path)!r}', FIX, f' (all of it: {report_file})')
    variables = jax.tree.map(_placed, partial.renewed(fresh.variables, loaded), fresh.variables)
    params = variables.pop('params')
    extra = {**fresh.extra, **({'ema': jax.tree.map(jnp.copy, params)} if 'ema' in fresh.extra else {})}
    state = dataclasses.replace(fresh, params=params, model_state=variables, extra=extra)
    return state, f'{origin}: {report.summary()}'


def _placed(new: Any, old: jax.Array) -> jax.Array:
    """`new` laid out as `old`."""
    return new if new is old else jax.device_put(new, old.sharding)


def record(experiment: Experiment, overrides: list[str], fingerprint: str, more: dict[str, Any]) -> dict[str, Any]:
    """What `run.json` says."""
    plain = fields.to_plain(experiment)
    return {'config': plain, 'overrides': overrides, 'seed': experiment.seed, 'data_fingerprint': fingerprint, **more}
