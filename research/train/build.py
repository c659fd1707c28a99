"""From an experiment to the parts of its step: task, facts, optimiser, abstract state, compiled step.

Nothing here makes an array: shapes first (`eval_shape`), then shardings, then compilation.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sized
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from research.core import guardian, registry, rng
from research.core.durations import Facts
from research.core.errors import UsageError
from research.core.schema import Experiment, Optimizer, Train
from research.data.build import build_augmentation
from research.data.source import DataSpec, kinds_of
from research.optim import build as optim
from research.optim import schedules
from research.parallel import compile as compilation
from research.parallel import hardware
from research.parallel import mesh as meshes
from research.parallel.rules import partition
from research.tasks.base import Task
from research.train import adapters, flops, microbatches, partial, step, teacher
from research.train import state as states
from research.train.state import TrainState
from research.train.step import CompiledStep, Step


def make_task(experiment: Experiment, spec: DataSpec) -> Task:
    """The task with its model, for data like `spec`, in its adapter if there is one."""
    supplied = {
        'model': experiment.model.bound(),
        'data': spec,
        'dtype': jnp.dtype(experiment.train.precision),
        'restore': functools.partial(teacher.restore, experiment, spec),
    }
    task = registry.call(experiment.task.bound(), **supplied)
    return task if experiment.adapter is None else experiment.adapter.build(task)


def abstract_batch(spec: DataSpec, size: int, sharding: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `size` examples as shapes, as the pipeline delivers it."""
    entries = {**spec.examples, 'mask': ((), jnp.float32), 'id': ((), jnp.int32), 'epoch': ((), jnp.int32)}
    return {
        key: jax.ShapeDtypeStruct((size, *shape), jax.dtypes.canonicalize_dtype(dtype), sharding=sharding)
        for key, (shape, dtype) in entries.items()
    }


def preprocessed(experiment: Experiment, batch: Any, augment: bool = False) -> Any:
    """The abstract `batch` after preprocessing: what task and model see, in training (`augment`) or evaluation."""
    data = experiment.data
    preprocess = build_augmentation((*data.augment, *data.preprocess) if augment else data.preprocess)
    keys = jax.eval_shape(lambda b: rng.example_keys(rng.key(0, 'evaluate'), b['id'], b['epoch']), batch)
    return jax.eval_shape(preprocess, keys, batch)


def measure(experiment: Experiment, task: Task, spec: DataSpec, train: Sized) -> Facts:
    """The facts that durations are counted in: FLOPs of a step and, from the training duration, the total steps.

    Args:
      experiment: the resolved config.
      task: its task.
      spec: what the data look like.
      train: the training split. Of one in buckets a step's FLOPs are the mean over the shapes of its batches.
    """
    size = experiment.data.batch_size
    seen = preprocessed(experiment, abstract_batch(spec, size))
    variables = jax.eval_shape(lambda batch: task.init(rng.key(0, 'init'), batch), seen)
    rngs = {'dropout': jax.eval_shape(lambda: rng.key(0, 'dropout'))}
    step_flops: float | None = 0.0
    for share, examples in kinds_of(train, spec):
        batch = abstract_batch(dataclasses.replace(spec, examples=examples), size)
        counted = flops.count(step.gradients_of(task), variables, preprocessed(experiment, batch, augment=True), rngs)
        step_flops = None if counted is None or step_flops is None else step_flops + share * counted
    facts = Facts(size, len(train), step_flops, example_tokens=spec.example_tokens)
    return dataclasses.replace(facts, total_steps=experiment.train.duration.to_steps(facts))


def learning_rate(optimizer: Optimizer, facts: Facts) -> Callable[[Any], jax.Array]:
    """The learning rate as a function of the steps done."""
    assert facts.total_steps is not None
    warmup = optimizer.schedule.warmup.to_steps(facts)
    shape = optimizer.schedule.component.build(max(facts.total_steps - warmup, 1))
    return schedules.learning_rate(optimizer.learning_rate, shape, warmup)


def make_optimizer(optimizer: Optimizer, rate: Callable[[Any], jax.Array], params: Any) -> optax.GradientTransformation:
    """The update rule of an experiment for (abstract) parameters."""
    decay = optimizer.weight_decay
    return optim.build(
        params,
        optimizer.component.build,
        rate,
        weight_decay=optim.DEFAULT_WEIGHT_DECAY.get(optimizer.name, 0.0) if decay is None else decay,
        decay=optimizer.decay,
        decay_rules=optimizer.decay_rules,
        rate_rules=optimizer.rate_rules,
        layer_decay=optimizer.layer_decay,
        clip=None if optimizer.clip is None else optimizer.clip.build(),
    )


@dataclasses.dataclass(frozen=True)
class Parts:
    """What one run trains with.

    Attributes:
      init: makes the first state, laid out over the devices; takes nothing.
      abstract: the state as shapes with shardings.
      step: the plain step, to be compiled by `compile`.
      batch: the batch as shapes with shardings.
      microbatches: how many a step adds up.
    """

    init: Callable[[], TrainState]
    abstract: TrainState
    step: Step
    batch: dict[str, jax.ShapeDtypeStruct]
    microbatches: int


def make_parts(experiment: Experiment, task: Task, spec: DataSpec, mesh: Mesh, rate: Callable[[Any], jax.Array]) -> Parts:
    """The abstract state, its initialiser and the step of an experiment."""
    size = experiment.data.batch_size
    meshes.check_divisible(mesh, size, experiment.train.accumulate or 1)
    batch = abstract_batch(spec, size, meshes.batch_sharding(mesh))
    seen = preprocessed(experiment, batch)
    optimizer_of = functools.partial(make_optimizer, experiment.optimizer, rate)
    extras = make_extras(experiment.train)

    def init() -> TrainState:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), seen)
        return states.init(task, optimizer_of, extras, experiment.seed, zeros)

    shapes = jax.eval_shape(init)
    layout = partition(mesh, experiment.parallel.rules, task.module, shapes, experiment.parallel.fsdp)
    abstract = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout)
    over = 1 if experiment.parallel.compile == 'pmap' else mesh.size
    count = experiment.train.accumulate or 1
    if experiment.train.accumulate is None and over == 1:
        in_training, cores = preprocessed(experiment, batch, augment=True), hardware.cpu_cores()
        count = microbatches.chosen(task, shapes.variables, in_training, meshes.data_size(mesh), cores)
    the_step = step.divided(make_step(experiment, task, optimizer_of(shapes.params), count), over)
    first = compilation.run_once(init, mesh, layout)
    return Parts(lambda: with_constants(first(), task), abstract, the_step, batch, count)


def with_constants(state: TrainState, task: Task) -> TrainState:
    """A first state with the collections that the task reads from elsewhere (a teacher's variables) in their place."""
    found = {}
    for name, weights in adapters.constants_of(task).items():
        loaded, report = partial.load_into(partial.named(state.model_state[name]), weights, partial.EVERYTHING, resize=False)
        report.check(f'the {name} of config.task', 'it must have been trained with the same classes or vocabulary')
        found[name] = partial.renewed(state.model_state[name], loaded)
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), found, {k: state.model_state[k] for k in found})
    return dataclasses.replace(state, model_state={**state.model_state, **placed})


def make_extras(train: Train) -> dict[str, Callable[[Any], Any]]:
    """The first state of each wrapper of the step, by wrapper."""
    extras: dict[str, Callable[[Any], Any]] = {}
    if train.ema:
        extras['ema'] = lambda params: jax.tree.map(jnp.copy, params)
    if train.skip_nonfinite:
        extras['skips'] = step.no_skips
    return extras


def make_step(experiment: Experiment, task: Task, optimizer: optax.GradientTransformation, count: int) -> Step:
    """The whole step, inside out: gradients, `count` microbatches, devices; update, augmentation, average, count, guard."""
    train, seed = experiment.train, experiment.seed
    if count > 1 and getattr(task, 'whole_batch', False):
        raise UsageError(
            f'config.train.accumulate={count} would split the batch within which task {experiment.task.name!r} compares',
            'set config.train.accumulate=1',
        )
    gradients = step.accumulate(step.gradients_of(task), count)
    gradients = step.all_reduce(gradients, compilation.axis_name(experiment.parallel.compile))
    result = step.make_step(gradients, optimizer, seed)
    augment, preprocess = build_augmentation(experiment.data.augment), build_augmentation(experiment.data.preprocess)
    result = step.augmented(result, augment, preprocess, seed)
    result = step.averaged(result, train.ema) if train.ema else result
    if experiment.data.on_bad_record == 'skip':
        result = step.counted(result, compilation.axis_name(experiment.parallel.compile))
    return step.guarded(result) if train.skip_nonfinite else result


def compile_parts(parts: Parts, experiment: Experiment, mesh: Mesh) -> CompiledStep:
    """Compiles the step for its shapes and devices, by jit or pmap."""
    return compilation.compile_step(parts.step, mesh, experiment.parallel.compile, parts.batch, parts.abstract)


def compiled_when_asked(parts: Parts, experiment: Experiment, mesh: Mesh) -> Callable[[], CompiledStep]:
    """`compile_parts`, but later: where a notebook, say, goes on after an error, and has settings of jax for its own thread."""
    return functools.partial(compile_parts, parts, experiment, mesh)


def compiling(parts: Parts, experiment: Experiment, mesh: Mesh) -> Callable[[], CompiledStep]:
    """`compile_parts`, traced here and compiled in a thread that begins now, for there is more to do before the first step.

    The result waits for the thread. Settings of jax that hold for one thread only do not hold there. A process that ends before
    the thread does must neither wait for it nor let Python take down what it uses: `guardian.leave`.
    """
    finish = compilation.lower_step(parts.step, mesh, experiment.parallel.compile, parts.batch, parts.abstract)
    found: futures.Future[CompiledStep] = futures.Future()

    def work() -> None:
        try:
            found.set_result(finish())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            found.set_exception(error)

    threading.Thread(target=work, name=guardian.BACKGROUND, daemon=True).start()
    return found.result
