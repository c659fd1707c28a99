"""`--mode=evaluate`: the newest (or best) checkpoint of any run on any split, with the config that the run recorded."""

import json
import pathlib
from typing import Any

import jax

from research.core import files, schema
from research.core.errors import UsageError
from research.data.build import build_augmentation, build_splits
from research.parallel import cache, memory
from research.parallel import mesh as meshes
from research.train import build
from research.train.checkpoint import Checkpoints
from research.train.evaluate import Evaluator
from research.train.loop import evaluation_feeds
from research.train.open_run import recorded
from research.train.run_directory import RunDirectory


def report(workdir: pathlib.Path, overrides: list[str], trust: bool) -> None:
    """Prints the results as JSON and writes them to `evaluation.json` in the run directory."""
    results = evaluate_run(workdir, overrides, trust)
    files.write_json(workdir / 'evaluation.json', results)
    print(json.dumps(files.finite(results), indent=2))


def evaluate_run(workdir: pathlib.Path, overrides: list[str], trust: bool = False) -> dict[str, Any]:
    """Results on the splits `config.evaluate.final` of each kept state: 'newest' and, where it was kept, 'best'.

    Args:
      workdir: the run directory.
      overrides: see `recorded`.
      trust: see `recorded`.

    Raises:
      UsageError: there is no run, or no checkpoint, in `workdir`; or it names components that are not trusted.
    """
    memory.keep_freed()
    cache.enable()
    directory, experiment = recorded(workdir, overrides, trust)
    return _evaluate(experiment, directory)


def _evaluate(experiment: schema.Experiment, directory: RunDirectory) -> dict[str, Any]:
    mesh = meshes.make_mesh(experiment.parallel.devices, experiment.parallel.model_axis)
    splits, spec = build_splits(experiment.data)
    task = build.make_task(experiment, spec)
    facts = build.measure(experiment, task, spec, splits['train'])
    parts = build.make_parts(experiment, task, spec, mesh, build.learning_rate(experiment.optimizer, facts))
    evaluator = Evaluator(task, build_augmentation(experiment.data.preprocess), mesh)
    feeds = evaluation_feeds(experiment, splits, mesh)
    results = {}
    for name, folder in (('newest', directory.checkpoints), ('best', directory.best)):
        if folder.is_dir():
            with Checkpoints(folder, writable=False) as checkpoints:
                found = checkpoints.newest(parts.abstract)
            if found is None:
                continue
            step, state, _ = found
            metrics = {s: evaluator(state.evaluation_variables, *feeds[s]) for s in experiment.evaluate.final}
            results[name] = {'step': step, 'devices': f'{mesh.size} x {jax.devices()[0].device_kind}', 'metrics': metrics}
    if not results:
        raise UsageError(f'{directory.path} holds no checkpoint', 'give the --workdir of a run that saved one')
    return results
