"""One run, from the experiment to the summary. Read this file from top to bottom and you have understood the program.

mesh -> data -> task(model) -> facts -> optimiser -> abstract state -> compile -> first state -> steps with hooks -> final
evaluation -> summary. Features are components, wrappers of the step (`step.py`) or hooks (`hooks.py`); none lives here.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from research.core import files, guardian
from research.core.clock import Clock
from research.core.errors import StoppedError, StorageError, UsageError
from research.core.guardian import Guardian
from research.core.schema import Experiment
from research.core.terms import Packed
from research.data.build import build_augmentation, build_splits
from research.data.pipeline import Prefetcher, make_feed
from research.data.plan import evaluation_plan_of
from research.data.source import Source, fingerprint
from research.parallel import cache, hosts, memory
from research.parallel import mesh as meshes
from research.parallel.votes import Votes
from research.tasks.base import Task
from research.train import build, care, faults, flops, rollback, start
from research.train.adapters import describe_size
from research.train.audit import Audit
from research.train.checkpoint import Checkpoints
from research.train.evaluate import Evaluator
from research.train.hooks import (
    CheckpointHook,
    EarlyStopHook,
    EvaluateHook,
    Hook,
    LogHook,
    best_mode,
    best_step,
    check_watched,
    history,
)
from research.train.in_flight import InFlight
from research.train.progress import Reporter
from research.train.provenance import provenance
from research.train.run import Run
from research.train.run_directory import RunDirectory, digest, finished
from research.train.state import TrainState
from research.train.step import CompiledStep
from research.train.writer import Writer


def train(
    experiment: Experiment,
    workdir: str | pathlib.Path,
    overrides: list[str] | None = None,
    allow_change: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains, evaluates and saves one experiment in `workdir`, resuming what is there. Returns the summary.

    Raises:
      FulcrumError: with the exit code of the process; `StoppedError` after Ctrl-C or SIGTERM, when the state is saved.
    """
    faults.install()
    directory = RunDirectory(workdir)
    if (summary := finished(experiment, directory, allow_change)) is not None:
        return summary
    directory.create()
    memory.keep_freed()
    with guardian.watching() as watch, contextlib.ExitStack() as stack:
        clock = Clock(watch.enter, watch.since)
        stack.enter_context(clock.phase('start'))
        stack.enter_context(care.bounded(experiment, directory, watch))
        hosts.start(experiment.parallel.distributed)
        watch.alone = hosts.is_alone()
        reporter = stack.enter_context(Reporter(experiment.log.plain_every, quiet or not hosts.is_main()))
        # First of all: it says in one line if jax cannot start.
        mesh = meshes.make_mesh(experiment.parallel.devices, experiment.parallel.model_axis)
        votes = stack.enter_context(care.watched(directory, watch, clock, reporter.say))
        kept = {'config': digest(experiment), 'say': reporter.say, 'event': directory.event}
        checkpoints = stack.enter_context(Checkpoints(directory.checkpoints, experiment.checkpoint.keep, **kept))
        best = stack.enter_context(Checkpoints(directory.best, **kept)) if experiment.checkpoint.best else None
        writer = stack.enter_context(Writer(directory, experiment.log.tensorboard, reporter.say))
        begin = build.compiling if watch.owned else build.compiled_when_asked
        prepared = _prepare(experiment, mesh, directory, reporter, writer, clock, votes, overrides or [], allow_change, begin)
        return _train(*prepared, checkpoints, best, watch)


def _prepare(
    experiment: Experiment,
    mesh: Mesh,
    directory: RunDirectory,
    reporter: Reporter,
    writer: Writer,
    clock: Clock,
    votes: Votes,
    overrides: list[str],
    allow_change: bool,
    begin: Callable[[build.Parts, Experiment, Mesh], Callable[[], CompiledStep]],
) -> tuple[Run, build.Parts, Callable[[], CompiledStep]]:
    """Everything before the first array: data, task, facts, abstract state, the step (whose compilation begins), run.json."""
    if (warning := cache.enable()) is not None:
        reporter.say(warning)
    start.clear_other(experiment, directory, reporter.say)
    bad_records = start.bad_records(experiment, directory, reporter.say)
    splits, spec = build_splits(experiment.data, bad_records)
    data_fingerprint = fingerprint(splits['train'])
    start.check_fingerprint(directory, data_fingerprint, allow_change)
    task = build.make_task(experiment, spec)
    facts = build.measure(experiment, task, spec, splits['train'])
    rate = build.learning_rate(experiment.optimizer, facts)
    parts = build.make_parts(experiment, task, spec, mesh, rate)
    evaluator = Evaluator(task, build_augmentation(experiment.data.preprocess), mesh)
    feeds = evaluation_feeds(experiment, splits, mesh)
    check_watched(experiment, evaluator.names(parts.abstract.variables, parts.batch))
    step = begin(parts, experiment, mesh)
    record = start.record(experiment, overrides, data_fingerprint, {'class_names': spec.class_names, **provenance()})
    run = Run(
        experiment,
        directory,
        mesh,
        clock,
        votes,
        reporter,
        writer,
        facts,
        splits,
        evaluator,
        feeds,
        rate,
        record,
        spec.tokenizer,
        bad_records,
    )
    _introduce(run, task, parts)
    return run, parts, step


def evaluation_feeds(experiment: Experiment, splits: dict[str, Source], mesh: Mesh) -> dict[str, tuple[Any, int]]:
    """For each split that is evaluated: its feed and the number of its batches."""
    wanted = dict.fromkeys((*experiment.evaluate.splits, *experiment.evaluate.final))
    size = -(-experiment.data.evaluation_batch_size // meshes.data_size(mesh)) * meshes.data_size(mesh)
    feeds = {}
    for name in wanted:
        if name not in splits:
            raise UsageError(f'there is no split {name!r} to evaluate', f'this data set has {", ".join(sorted(splits))}')
        plan = evaluation_plan_of(splits[name], size)
        feeds[name] = make_feed(splits[name], plan, meshes.batch_sharding(mesh), experiment.data.placement), len(plan)
    return feeds


def _introduce(run: Run, task: Task, parts: build.Parts) -> None:
    """Says what is about to be done, before anything is paid for."""
    experiment, facts = run.experiment, run.facts
    if experiment.log.model_table:
        arguments = jax.eval_shape(task.arguments, build.preprocessed(experiment, parts.batch))
        run.reporter.say(flops.table(task.module, arguments, run.reporter.table_width))
    size = describe_size(parts.abstract.params, parts.abstract.model_state, experiment.optimizer.rate_rules)
    step_flops = 'unknown' if facts.step_flops is None else f'{facts.step_flops:.3g}'
    sizes = ', '.join(f'{name} {len(run.splits[name]):,}' for name in ('train', 'validation', 'test') if name in run.splits)
    run.reporter.say(f'model  {experiment.model}: {size}')
    run.reporter.say(f'data   {experiment.data.source}: {sizes} examples')
    split = f' in {parts.microbatches} microbatches' if parts.microbatches > 1 else ''
    run.reporter.say(f'run    {run.total_steps:,} steps of {facts.batch_size} examples{split}, {step_flops} FLOPs each')
    if experiment.parallel.compile == 'pmap' and 'batch_stats' in parts.abstract.model_state and run.mesh.size > 1:
        run.reporter.say('note   under pmap each device normalises by its own part of the batch: jit normalises by the whole')
    run.reporter.begin(0, run.total_steps)
    run.reporter.say(f'on     {run.mesh.size} x {jax.devices()[0].device_kind}, recorded in {run.directory.path}')


def _train(
    run: Run,
    parts: build.Parts,
    compiling: Callable[[], CompiledStep],
    checkpoints: Checkpoints,
    best: Checkpoints | None,
    watch: Guardian,
) -> dict[str, Any]:
    """From the first state to the summary."""
    run.windows = rollback.read_history(run.directory.rollbacks)
    rollback.drop_discarded(checkpoints, run.windows)
    with run.clock.phase('restore'):
        state, run.earlier, origin = start.first_state(parts, run.experiment, checkpoints)
    first = int(state.step)
    start.go_on(run, first, origin, best, watch.since)
    run.reporter.phase('compiling')
    with run.clock.phase('compile'):
        compiled = compiling()
        if run.mesh.devices.flat[0].platform == 'cpu':
            memory.close_gaps()
        step = Audit(compiled, run.steps_of(run.experiment.train.audit_every), run.differ)
    run.directory.event('compile', seconds=run.clock.own())

    def steps(state: TrainState, earlier: dict[str, Any]) -> TrainState:
        step.begin(int(state.step))
        log = LogHook(run, earlier, int(state.step))
        saver = CheckpointHook(run, checkpoints, best, log)
        state = _steps(run, step, state, [log, EvaluateHook(run), saver, EarlyStopHook(run)])
        saver.finish(int(state.step), state, may_retry=watch.stopped is None)
        return state

    def restore(until: int) -> tuple[TrainState, dict[str, Any]]:
        return start.first_state(parts, run.experiment, checkpoints, until)[:2]

    kept = [checkpoints] if best is None else [checkpoints, best]
    with run.clock.phase('train'):  # up to the end: between the steps and the last save there is much to lose
        state = rollback.until_done(run, kept, restore, steps, state, run.earlier)
        if run.is_cut_short:
            run.directory.event('signal', name=watch.stopped, step=int(state.step))
            raise StoppedError(f'stopped by {watch.stopped} at step {int(state.step)}', 'the same command goes on from there')
        return _finish(run, state, parts, best, step)


def _steps(run: Run, step: CompiledStep, state: TrainState, hooks: list[Hook]) -> TrainState:
    """The steps that are left, each followed by the hooks."""
    experiment, first = run.experiment, int(state.step)
    votes, plan = run.votes, rollback.training_plan(run)
    plan.batch(run.total_steps - 1)  # a mixture that ends before the run says so now
    feed = make_feed(run.splits['train'], plan, meshes.batch_sharding(run.mesh), experiment.data.placement)
    in_flight = InFlight(run.mesh)
    run.reporter.begin(first, run.total_steps)
    run.reporter.phase('training')
    with (
        run.clock.phase('train'),
        care.interruptible(run),
        Prefetcher(feed, first, experiment.data.prefetch, votes.leave_waiting, in_flight.burst) as batches,
    ):
        for hook in hooks[1:] if first else []:  # what a death cut short at this very step
            hook(first, state, Packed((), None))
        for k in range(first, run.total_steps):
            with run.clock.phase('data'):
                batch = batches(k)
            run.is_cut_short = votes.agreed('stop')
            if run.stop is not None or run.is_cut_short:
                break
            state, terms = step(state, batch)
            in_flight.add(terms, batch)
            for hook in hooks:
                hook(k + 1, state, terms)
    return state


def _finish(run: Run, state: TrainState, parts: build.Parts, best: Checkpoints | None, audit: Audit) -> dict[str, Any]:
    """The final evaluation and the summary."""
    step = int(state.step)
    metrics = {split: run.evaluate(split, step, state) for split in run.experiment.evaluate.final}
    with run.clock.phase('evaluate'):
        best_results = _evaluate_best(run, parts, best)
    summary = {
        'status': 'completed',
        'name': run.experiment.name,
        'step': step,
        'stopped_early': run.stop,
        'metrics': metrics,
        'best': best_results,
        'skipped_steps': int(state.extra['skips']['total']) if 'skips' in state.extra else None,
        'rollbacks': len(run.windows),
        'bad_records': None if run.bad_records is None else run.bad_records.count,
        'audit': {'steps': audit.steps, 'differences': audit.differences} if audit.every else None,
        'budget': run.spent(step),
        'goodput': (spent := care.so_far(run.directory, run.clock)).goodput,
    }
    if hosts.is_main():
        files.write_json(run.directory.summary, summary)
        shutil.rmtree(run.directory.failure.parent, ignore_errors=True)  # of a life that gave up, with another config
    if summary['bad_records']:
        run.reporter.say(f'bad records left out: {summary["bad_records"]}, see {run.directory.bad_records}')
    run.reporter.say(spent.one_line())
    run.reporter.say(f'summary: {run.directory.summary}')
    run.reporter.phase('done')
    return summary


def _evaluate_best(run: Run, parts: build.Parts, best: Checkpoints | None) -> dict[str, Any] | None:
    """The final splits under the best state that was kept."""
    if best is None:
        return None
    try:
        found = best.newest(parts.abstract)
    except StorageError as error:  # the run itself is whole
        run.reporter.say(f'ERROR: the best state is lost: {error}')
        found = None
    if found is None:
        return None
    step, state, _ = found
    values = [
        pair for pair in history(run, str(run.experiment.checkpoint.best)) if run.is_due(run.experiment.evaluate.every, pair[0])
    ]
    wanted = best_step(values, best_mode(run.experiment))
    if step != wanted:
        run.reporter.say(f'warning: the best state, of step {wanted}, could not be saved; the one of step {step} is kept')
    results = {}
    for split in run.experiment.evaluate.final:
        feed, num_batches = run.evaluation_feeds[split]
        results[split] = run.evaluator(state.evaluation_variables, feed, num_batches)
    return {'step': step, 'metric': run.experiment.checkpoint.best, 'metrics': results}
