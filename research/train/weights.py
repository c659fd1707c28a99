"""Weights by leaf name, from a run directory or a Hugging Face folder: what `init_from` and teachers are read from.

A run gives its newest parameters, averaged (EMA) where the run kept an average, since that is what it was evaluated with; an
adapter is merged, so that the weights are those of a whole model. Nothing of the run's optimiser is read.
"""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.core import leaves, registry
from research.core.errors import UsageError
from research.train import pretrained
from research.train.checkpoint import Checkpoints
from research.train.partial import Weights, named
from research.train.run_directory import RunDirectory


def read(path: pathlib.Path, what: str) -> tuple[Weights, str]:
    """The weights in `path`, and where they are from in words; `what` names the config's key in errors.

    Raises:
      UsageError: there are none.
    """
    if pretrained.is_hugging_face(path):
        return pretrained.read_folder(path), f'parameters from the Hugging Face folder {path}'
    return read_run(path, what)


def read_run(path: pathlib.Path, what: str, state: str = 'newest') -> tuple[Weights, str]:
    """The weights of a run, and where they are from in words; `state`: 'newest', or 'best' where the run kept its best.

    Raises:
      UsageError: `path` is no run directory, holds no checkpoint, or names an adapter that is not Fulcrum's own.
    """
    directory = RunDirectory(path)
    folder = directory.checkpoints if state == 'newest' else directory.best
    if not folder.is_dir():
        raise UsageError(f'{what}={str(path)!r} holds no checkpoints', 'give the --workdir of a run, or a Hugging Face folder')
    with Checkpoints(folder, writable=False) as source:
        step = source.latest()
        if step is None:
            raise UsageError(f'{what}={str(path)!r} holds no checkpoint', 'give the --workdir of a run that saved one')
        model, average = source.read(step)
    variables = {'params': model['params'] if average is None else average, **model.get('model_state', {})}
    if 'base' in variables:
        variables = _merged(directory, variables)
    kind = '' if average is None else ', averaged'
    return {name: np.asarray(leaf) for name, leaf in named(variables).items()}, f'parameters of step {step} from {path}{kind}'


def _merged(directory: RunDirectory, variables: dict[str, Any]) -> dict[str, Any]:
    """The variables of a run with an adapter as those of a whole model, by the adapter that the run recorded."""
    run = directory.read_run()
    recorded = None if run is None else run['config'].get('adapter')
    if recorded is None or ':' in recorded['name']:
        raise UsageError(f'{directory.path} was trained with an adapter of its own', 'give a run without adapter, or with lora')
    adapter = registry.component('adapter', recorded, 'config.adapter').build(None)
    as_arrays = {name: {k: jnp.asarray(v) for k, v in leaves.flat(variables[name]).items()} for name in ('params', 'base')}
    return {**variables, **adapter.merge(as_arrays), 'base': {}}
