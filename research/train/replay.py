"""`--mode=replay`: takes the step again whose numbers went wrong, under NaN debugging, and says which operation it was.

A run that gave up left `failure/bundle.json`. Its last good checkpoint is restored, the good steps up to the bad one are taken
as they were, and the bad one without the guard and under `jax_debug_nans`: jax runs it again operation by operation, and stops
at the first that gives NaN or infinity out of none.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import NumericalError, UsageError
from research.data.build import build_splits
from research.data.pipeline import Feed, make_feed
from research.data.plan import plan_of
from research.parallel import cache, memory
from research.parallel import mesh as meshes
from research.train import build, rollback, start
from research.train.checkpoint import NUMBERS_FIX, Checkpoints
from research.train.open_run import recorded
from research.train.state import TrainState
from research.train.step import CompiledStep, Step, divided

HUGE = 1e6  # a parameter beyond it was made by the steps before


def report(workdir: pathlib.Path, overrides: list[str], trust: bool) -> None:
    """Replays the failure of a run and prints what it finds.

    Raises:
      UsageError: the run did not fail by its numbers.
      NumericalError: the failure is there again; it is named.
    """
    memory.keep_freed()
    cache.enable()
    directory, experiment = recorded(workdir, overrides, trust, 'a replay', needs_checkpoint=False)
    if not directory.failure.exists():
        raise UsageError(f'{workdir} has no failure to replay', 'only a run that ended with code 76 has one')
    bundle = json.loads(directory.failure.read_text(encoding='utf-8'))
    print(f'{bundle["reason"]} at step {bundle["steps_done"]}')
    mesh = meshes.make_mesh(experiment.parallel.devices, experiment.parallel.model_axis)
    splits, spec = build_splits(experiment.data)
    task = build.make_task(experiment, spec)
    facts = build.measure(experiment, task, spec, splits['train'])
    rate = build.learning_rate(experiment.optimizer, facts)
    parts = build.make_parts(experiment, task, spec, mesh, rate)
    first = bundle['batches'][0]['step']
    with Checkpoints(directory.checkpoints, writable=False) as checkpoints:
        state, _, origin = start.first_state(parts, experiment, checkpoints, first)
    print(origin)
    plan = plan_of(splits['train'], experiment.data.batch_size, experiment.seed)
    shifted = rollback.Shifted(plan, bundle['rollbacks'])
    feed = make_feed(splits['train'], shifted, meshes.batch_sharding(mesh), experiment.data.placement)
    compiled = build.compile_parts(parts, experiment, mesh)
    for step in range(int(state.step), first):
        state, _ = compiled(state, feed(step))
    bare = dataclasses.replace(
        experiment,
        train=dataclasses.replace(experiment.train, skip_nonfinite=False),
        parallel=dataclasses.replace(experiment.parallel, compile='jit'),
    )
    optimizer = build.make_optimizer(experiment.optimizer, rate, parts.abstract.params)
    unguarded = divided(build.make_step(bare, task, optimizer, parts.microbatches), mesh.size)
    _take(jax.jit(unguarded), compiled, state, feed, bundle['batches'])


def _take(unguarded: Step, guarded: CompiledStep, state: TrainState, feed: Feed, batches: list[Any]) -> None:
    """The bad steps, one by one: first looked at without the guard, then taken with it."""
    for entry in batches:
        step = entry['step']
        batch = feed(step)
        if (ids := np.asarray(batch['id']).tolist()) != entry['ids']:
            raise UsageError(f'step {step} has other examples than in the run', 'restore the data that the run had')
        with _debugging():
            try:
                _, terms = unguarded(state, batch)
                loss, weight = (float(x) for x in terms['loss'])
            except FloatingPointError as error:
                told, largest = ' '.join(str(error).split())[:160], _largest(state)
                if largest > HUGE:
                    fix = f'before it the largest parameter is {largest:.2g} already: {NUMBERS_FIX}'
                else:
                    fix = f'the examples are {ids[:8]}, ...: look at them (rows of the training split)'
                raise NumericalError(f'step {step + 1}: {told}', fix) from error
        print(f'step {step + 1}: loss {loss / max(weight, 1e-30):.6g}, gradient norm {float(terms["gradient_norm"][0]):.4g}')
        state, _ = guarded(state, batch)
    print('every number of these steps is finite: the losses above show the jump')


def _largest(state: TrainState) -> float:
    """The largest magnitude among the parameters."""
    return max(float(jnp.max(jnp.abs(leaf.astype(jnp.float32)), initial=0.0)) for leaf in jax.tree.leaves(state.params))


@contextlib.contextmanager
def _debugging() -> Iterator[None]:
    # jax prints that it takes the step again, operation by operation.
    with jax.debug_nans(True), jax.debug_infs(True), contextlib.redirect_stdout(io.StringIO()):
        yield
