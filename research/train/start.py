"""How a run starts: own checkpoint > `init_from` > scratch; and when it must not start.

* The same command goes on where it stopped (`run_directory.finished` answers for a run that is complete, and refuses a config
  that changed in a way that matters).
* A checkpoint that exists but cannot be read is an error, never a reason to begin anew over it.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from research.core import fields
from research.core.errors import StorageError, UsageError
from research.core.schema import Experiment
from research.train.build import Parts
from research.train.checkpoint import Checkpoints
from research.train.run_directory import RunDirectory
from research.train.state import TrainState


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


def first_state(parts: Parts, experiment: Experiment, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any], str]:
    """The state to begin with, what its checkpoint says beside (empty if there is none), and where it came from, in words."""
    step = checkpoints.latest()
    if step is not None:
        state, meta = checkpoints.restore(step, parts.abstract)
        return state, meta, f'resumed from step {step}'
    if experiment.init_from is not None:
        return _from_other(parts, pathlib.Path(experiment.init_from)), {}, f'parameters from {experiment.init_from}'
    return parts.init(), {}, 'started from scratch'


def _from_other(parts: Parts, path: pathlib.Path) -> TrainState:
    """A fresh state with the newest parameters of another run, in the average too where one is kept."""
    folder = RunDirectory(path).checkpoints
    if not folder.is_dir():
        raise UsageError(f'config.init_from={str(path)!r} holds no checkpoints', 'give the --workdir of a run')
    with Checkpoints(folder, writable=False) as source:
        step = source.latest()
        if step is None:
            raise UsageError(
                f'config.init_from={str(path)!r} holds no checkpoint', 'give the --workdir of a run that saved one'
            )
        try:
            model = source.restore_model(step, parts.abstract)
        except StorageError as error:
            raise UsageError(f'config.init_from={str(path)!r} cannot be used: {error.message}', 'use the same model') from error
    fresh = parts.init()
    extra = {**fresh.extra, **({'ema': jax.tree.map(jnp.copy, model.params)} if 'ema' in fresh.extra else {})}
    return dataclasses.replace(fresh, params=model.params, model_state=model.model_state, extra=extra)


def record(experiment: Experiment, overrides: list[str], fingerprint: str, more: dict[str, Any]) -> dict[str, Any]:
    """What `run.json` says."""
    plain = fields.to_plain(experiment)
    return {'config': plain, 'overrides': overrides, 'seed': experiment.seed, 'data_fingerprint': fingerprint, **more}
