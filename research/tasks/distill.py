"""Distillation: a student learns from a trained teacher's outputs beside the labels (Hinton et al. 2015, section 2).

Shape letters: B batch, T length, K classes, V vocabulary, D features.

    task = Distill(model=MLP, data=spec, restore=restore, teacher='runs/digits_cnn', task='classify', temperature=2.0)

With temperature t and weight w the loss is (1 - w) * L + w * t^2 * KL(teacher || student): L is the loss of the inner task,
both distributions are softmax(logits / t), and t^2 keeps the size of the gradient. For logits (0, 0) of the student and
(2 log 3, 0) of the teacher, t = 2 gives (0.75, 0.25) for the teacher and KL = 0.1308: w = 0.5 adds 0.5 * 4 * 0.1308 = 0.2616.

The teacher's variables lie in the collection 'teacher', which no step changes: a checkpoint holds them, and a run goes on
without the teacher's checkpoint. Teacher and student see the same arrays (Beyer et al. 2022, "Knowledge distillation: A good
teacher is patient and consistent"). Evaluation is the inner task's, its loss too, so that a student compares with a model that
had no teacher.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core import registry
from research.core.errors import UsageError
from research.core.terms import Terms, weighted
from research.data.source import DataSpec
from research.tasks.base import Batch, Keys, Supervised, Variables
from research.tasks.chunked import in_chunks, score
from research.tasks.regress import Regress
from research.tasks.states import Metric
from research.tasks.tokens import TokenTask

Costs = tuple[Terms, tuple[jax.Array, jax.Array], dict[str, Any]]  # the inner task's terms, the term of the KL, the new state


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained model.

    Attributes:
      model: makes its module, as a task's `model`.
      read: reads its weights, arrays by leaf name.
    """

    model: Callable[..., nn.Module]
    read: Callable[[], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Distill:
    """Another task, with a teacher.

    Attributes:
      model: makes the student's module.
      data: what the data look like.
      dtype: the type that student and teacher compute in.
      restore: the teacher of a run directory.
      teacher: the run directory of the teacher.
      task: the task that is distilled, as a config writes it: of one output vector an example, or of tokens.
      temperature: t > 0.
      weight: w in [0, 1], the teacher's share of the loss.

    Raises:
      UsageError: a value out of range; a task that gives no logits, has a loss of its own or weighs classes; a run that is
        no teacher.
    """

    model: Callable[..., nn.Module]
    data: DataSpec
    dtype: Any = jnp.float32
    restore: Callable[[str], Teacher]
    teacher: str
    task: str = 'classify'
    temperature: float = 2.0
    weight: float = 0.5

    def __post_init__(self):
        if not self.temperature > 0 or not 0 <= self.weight <= 1:
            raise UsageError(
                f'task distill: temperature={self.temperature}, weight={self.weight} is out of range',
                'for example temperature=2.0, weight=0.5',
            )
        _ = self.teacher_task  # raises on a task without logits, and on a run that is no teacher

    @functools.cached_property
    def inner(self) -> Supervised | TokenTask:
        """The task that is distilled, with the student's model."""
        component = registry.component('task', self.task, 'config.task.task')
        supplied = {'model': self.model, 'data': self.data, 'dtype': self.dtype, 'restore': self.restore}
        task = registry.call(component.bound(), **supplied)
        if isinstance(task, Regress) or not isinstance(task, (Supervised, TokenTask)):
            raise UsageError(f'task distill cannot take the task {self.task!r}, which gives no logits', "try task='classify'")
        if type(task).loss not in (Supervised.loss, TokenTask.loss):
            raise UsageError(f'task distill would leave out the loss of the task {self.task!r}', "try task='classify'")
        if getattr(task, 'class_weights', None) is not None:
            raise UsageError(
                f'task distill: {self.task} weighs classes, and the teacher weighs all examples alike',
                'leave class_weights out of config.task.task',
            )
        return task

    @functools.cached_property
    def restored(self) -> Teacher:
        """The teacher; its weights are not read yet."""
        return self.restore(self.teacher)

    @functools.cached_property
    def teacher_task(self) -> Supervised | TokenTask:
        """The same task with the teacher's model, which sees what the student sees: no second view."""
        one_view = {'test_time_flip': False} if hasattr(self.inner, 'test_time_flip') else {}
        return dataclasses.replace(self.inner, model=self.restored.model, **one_view)

    @property
    def module(self) -> nn.Module:
        """The student's network."""
        return self.inner.module

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics of the inner task."""
        return self.inner.metrics  # type: ignore[return-value] - a dict once constructed

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """What the student's module is called with."""
        return self.inner.arguments(batch)

    def constants(self) -> dict[str, Any]:
        """The teacher's weights by leaf name, for the collection 'teacher', where `init` leaves zeros."""
        return {'teacher': self.restored.read()}

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh variables of the student, and zeros in the shapes of the teacher's."""
        shapes = jax.eval_shape(self.teacher_task.init, rng, batch)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return {**self.inner.init(rng, batch), 'teacher': zeros}

    def loss(self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool) -> tuple[Terms, dict[str, Any]]:
        """In training the distilled loss, with its parts as 'hard_loss' and 'soft_loss'; else that of the inner task."""
        teacher = variables['teacher']
        if not train:
            found, state = self.inner.loss(_student(variables), batch, rngs, train)
            return found, {**state, 'teacher': teacher}
        costs = _token_costs if isinstance(self.inner, TokenTask) else _costs
        hard, soft, state = costs(self, _student(variables), teacher, batch, rngs)
        loss = jax.tree.map(lambda a, b: (1 - self.weight) * a + self.weight * b, hard['loss'], soft)
        return {**hard, 'loss': loss, 'hard_loss': hard['loss'], 'soft_loss': soft}, {**state, 'teacher': teacher}

    def predict(self, variables: Variables, batch: Batch) -> Any:
        """The student's outputs, as the inner task gives them."""
        return self.inner.predict(_student(variables), batch)


def _costs(task: Distill, variables: Variables, teacher: Variables, batch: Batch, rngs: Keys | None) -> Costs:
    """Of a task with logits (B, K)."""
    inner: Any = task.inner
    logits, state = inner.apply(variables, batch, rngs, train=True)
    taught, _ = task.teacher_task.apply(teacher, batch, None, train=False)
    kl = divergence(taught, logits, task.temperature)  # (B,)
    return inner.terms(logits, batch), weighted(task.temperature**2 * kl, batch['mask']), state


def _token_costs(task: Distill, variables: Variables, teacher: Variables, batch: Batch, rngs: Keys | None) -> Costs:
    """Of a task over tokens; with `chunk`, neither model's logits (B, T, V) exist at once."""
    inner: Any = task.inner
    other: Any = task.teacher_task
    method = 'features' if inner.chunk else None
    targets, weights = inner.targets(batch)
    is_true = weights > 0
    outputs, state = inner.apply(variables, batch, rngs, True, method)  # (B, T, V or D)
    taught, _ = other.apply(teacher, batch, None, False, method)
    arrays = [jnp.where(is_true[..., None], x, 0.0) for x in (outputs, taught)] + [jnp.where(is_true, targets, 0)]

    def cost(x: jax.Array, y: jax.Array, target: jax.Array) -> dict[str, jax.Array]:
        x, y = (inner.head(variables, x), other.head(teacher, y)) if inner.chunk else (x, y)
        found = score(x, target, inner.label_smoothing, inner.z_loss)
        return {**found, 'soft': task.temperature**2 * divergence(y, x, task.temperature)}

    found = in_chunks(cost, inner.chunk, *arrays) if inner.chunk else cost(*arrays)
    hard = {'loss': weighted(found['loss'], weights), 'accuracy': weighted(found['correct'], weights)}
    return hard, weighted(found['soft'], weights), state


def divergence(teacher: jax.Array, student: jax.Array, temperature: float) -> jax.Array:
    """KL(teacher || student) in nats of softmax(logits / temperature); logits (..., K) -> (...) float32, >= 0."""
    log_p = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _student(variables: Variables) -> dict[str, Any]:
    return {name: collection for name, collection in variables.items() if name != 'teacher'}
