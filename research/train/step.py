"""The train step, and the wrappers that features are made of.

    gradients(variables, batch, rngs) -> (gradient of the loss *sum*, Terms, model_state)
    step(state, batch)                -> (state, Terms)

Features wrap one of the two: `accumulate` and `all_reduce` the gradients; `augmented`, `averaged` (EMA), `counted` (bad
records) and `guarded` (non-finite numbers) the step. Sums are divided by their weights once, in `make_step`, so that
microbatches, padding and devices cannot change the result. Shape letters: B batch, n microbatches.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.core import rng, terms
from research.core.terms import Packed, Terms
from research.models import lowering
from research.train.state import TrainState

Batch = dict[str, jax.Array]
Gradients = Callable[[Any, Batch, dict[str, jax.Array]], tuple[Any, Terms, Any]]
Step = Callable[[TrainState, Batch], tuple[TrainState, Terms]]
CompiledStep = Callable[[TrainState, Batch], tuple[TrainState, Packed]]
Augmentation = Callable[[jax.Array, Batch], Batch]

CONSTANT = ('base', 'teacher')  # collections that no step changes: what an adapter froze, and the teacher's variables


def gradients_of(task: Any) -> Gradients:
    """The gradient of the task's loss sum with respect to the parameters."""

    def loss_sum(params: Any, model_state: Any, batch: Batch, rngs: Any) -> tuple[jax.Array, Any]:
        found, new_model_state = task.loss({'params': params, **model_state}, batch, rngs, train=True)
        return found['loss'][0], (found, new_model_state)

    def gradients(variables: Any, batch: Batch, rngs: dict[str, jax.Array]) -> tuple[Any, Terms, Any]:
        model_state = {k: v for k, v in variables.items() if k != 'params'}
        grads, (found, new_model_state) = jax.grad(loss_sum, has_aux=True)(variables['params'], model_state, batch, rngs)
        return grads, found, new_model_state

    return gradients


def accumulate(gradients: Gradients, count: int) -> Gradients:
    """The same gradients from `count` microbatches of B / count examples, one after the other: less memory, equal sums.

    Microbatch i holds the rows i, i + count, i + 2 * count, ...: every device keeps its own rows. The model state (running
    statistics) passes through the microbatches in order.
    """
    if count == 1:
        return gradients

    def accumulated(variables: Any, batch: Batch, rngs: dict[str, jax.Array]) -> tuple[Any, Terms, Any]:
        split = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)  # (n, B/n, ...)

        def body(carry: Any, one: Any) -> tuple[Any, None]:
            grads, found, model_state = carry
            index, microbatch = one
            keys = {name: jax.random.fold_in(key, index) for name, key in rngs.items()}
            with lowering.inside_loop():
                more, also, model_state = gradients({'params': variables['params'], **model_state}, microbatch, keys)
            return (jax.tree.map(jnp.add, grads, more), terms.add(found, also), model_state), None

        model_state = {k: v for k, v in variables.items() if k != 'params'}
        first = jax.tree.map(lambda x: x[0], split)
        shapes = jax.eval_shape(gradients, variables, first, rngs)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[:2])
        carry, _ = jax.lax.scan(body, (*zeros, model_state), (jnp.arange(count), split))
        return carry

    return accumulated


def all_reduce(gradients: Gradients, axis_name: str | None) -> Gradients:
    """Under pmap: sums gradients and terms over the devices and averages the model state; without an axis, nothing."""
    if axis_name is None:
        return gradients

    def reduced(variables: Any, batch: Batch, rngs: dict[str, jax.Array]) -> tuple[Any, Terms, Any]:
        # Devices must not drop the same units; under jit one mask covers the global batch.
        keys = {name: jax.random.fold_in(key, jax.lax.axis_index(axis_name)) for name, key in rngs.items()}
        grads, found, model_state = gradients(variables, batch, keys)
        constant = {name: variables[name] for name in CONSTANT if name in variables}  # the mean of equals may be off by a bit
        averaged = jax.lax.pmean({k: v for k, v in model_state.items() if k not in CONSTANT}, axis_name)
        return *jax.lax.psum((grads, found), axis_name), {**averaged, **constant}

    return reduced


def make_step(gradients: Gradients, optimizer: optax.GradientTransformation, seed: int) -> Step:
    """The plain step: gradients of the batch, mean over its weight, one update. Terms gain 'gradient_norm'."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        rngs = {'dropout': rng.key(seed, 'dropout', state.step)}
        grads, found, model_state = gradients(state.variables, batch, rngs)
        weight = jnp.maximum(found['loss'][1], jnp.finfo(jnp.float32).tiny)  # an all-masked batch gives zero, not 0 / 0
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        found = {**found, 'gradient_norm': (optax.tree.norm(grads), jnp.ones(()))}
        new = dataclasses.replace(
            state, step=state.step + 1, params=params, model_state=model_state, optimizer_state=optimizer_state
        )
        return new, found

    return step


def augmented(step: Step, augmentation: Augmentation, preprocess: Augmentation, seed: int) -> Step:
    """The step on augmented and preprocessed batches. An example's keys follow its id and epoch, not its place."""

    def augmented_step(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        keys = rng.example_keys(rng.key(seed, 'augment'), batch['id'], batch['epoch'])  # (B,)
        return step(state, preprocess(keys, augmentation(keys, batch)))

    return augmented_step


def averaged(step: Step, decay: float) -> Step:
    """Keeps an exponential moving average of the parameters in `extra['ema']`.

    The decay grows as (1 + k) / (10 + k) at step k up to `decay`, so that the first parameters are forgotten
    (TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def averaged_step(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        new, found = step(state, batch)
        k = new.step.astype(jnp.float32)
        rate = jnp.minimum(decay, (1 + k) / (10 + k))
        # In this form the average of a frozen leaf is that leaf to the last bit.
        ema = jax.tree.map(lambda old, now: now + (old - now) * rate, state.extra['ema'], new.params)
        return dataclasses.replace(new, extra={**new.extra, 'ema': ema}), found

    return averaged_step


def counted(step: Step, axis_name: str | None) -> Step:
    """Adds the term 'bad_records', whose mean is how many rows of a batch could not be read; `axis_name`: under pmap.

    Batches without 'bad' pass unchanged: their rows were made from text that was read before.
    """

    def counted_step(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        new, found = step(state, batch)
        if 'bad' not in batch:
            return new, found
        bad = jnp.sum(batch['bad'], dtype=jnp.float32)
        bad = bad if axis_name is None else jax.lax.psum(bad, axis_name)
        return new, {**found, 'bad_records': (bad, jnp.ones(()))}

    return counted_step


def divided(step: Step, over: int) -> Step:
    """The step, traced as one program that XLA divides over so many devices."""

    def divided_step(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        with lowering.divided(over):
            return step(state, batch)

    return divided_step


def guarded(step: Step) -> Step:
    """Skips an update whose loss or gradient is not finite: every leaf but the step count stays bit for bit as it was.

    `extra['skips']` counts them in all and in a row. The terms of a skipped step weigh nothing, but 'skipped' tells of it: its
    mean is the share of skipped steps.
    """

    def guarded_step(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        new, found = step(state, batch)
        good = jnp.isfinite(found['loss'][0]) & jnp.isfinite(found['gradient_norm'][0])
        skips = state.extra['skips']
        counts = {'total': skips['total'] + ~good, 'in_a_row': jnp.where(good, 0, skips['in_a_row'] + 1)}
        kept, choice = {}, good
        for part in ('extra', 'params', 'model_state', 'optimizer_state'):  # each is made of those behind it
            kept[part] = jax.tree.map(partial(jnp.where, choice), getattr(new, part), getattr(state, part))
            choice = lowering.known_after(choice, kept[part])
        kept['extra']['skips'] = counts
        found = jax.tree.map(lambda x: jnp.where(good, x, 0.0), found)
        return TrainState(step=new.step, **kept), {**found, 'skipped': ((~good).astype(jnp.float32), jnp.ones(()))}

    return guarded_step


def no_skips(params: Any) -> dict[str, jax.Array]:
    """The first state of `guarded`."""
    del params
    return {'total': jnp.zeros((), jnp.int32), 'in_a_row': jnp.zeros((), jnp.int32)}
