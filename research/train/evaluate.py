"""Evaluation: exact over any number of examples, batches and devices, because every metric is a mergeable state."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from research.core import guardian, rng
from research.data.pipeline import Feed
from research.models import lowering
from research.parallel.mesh import replicated
from research.tasks.base import Task
from research.tasks.metrics import summarise
from research.train.step import Augmentation

IN_FLIGHT = 2


def chosen(num_batches: int, limit: int | None) -> list[int]:
    """All batches, or `limit` of them, evenly spaced: 10 batches with a limit of 3 give 0, 3, 6."""
    count = num_batches if limit is None else min(limit, num_batches)
    return [i * num_batches // count for i in range(count)]


class Evaluator:
    """Evaluates variables on batches; compiled once for each shape of their batches, of which padding buckets have several."""

    def __init__(self, task: Task, preprocess: Augmentation, mesh: Mesh):
        self.task = task

        def batch_states(variables: Any, batch: Any) -> tuple[Any, Any]:
            keys = rng.example_keys(rng.key(0, 'evaluate'), batch['id'], batch['epoch'])  # (B,)
            batch = preprocess(keys, batch)
            with lowering.divided(mesh.size):
                terms, _ = task.loss(variables, batch, {}, train=False)
                outputs = task.predict(variables, batch)
            return terms['loss'], {name: metric.batch(outputs, batch) for name, metric in task.metrics.items()}

        self._batch_states = jax.jit(batch_states, out_shardings=replicated(mesh))

    def __call__(
        self,
        variables: Any,
        feed: Feed,
        num_batches: int,
        limit: int | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Loss and metrics over the batches 0 ... num_batches - 1: floats, and lists for metrics by class.

        `limit`: only so many of the batches, evenly spaced. `between` is called before each: it may leave by an exception.
        """
        loss, states = np.zeros(2), None
        waiting: collections.deque[Any] = collections.deque()
        for batch in chosen(num_batches, limit):
            guardian.beat()
            between()
            waiting.append(self._batch_states(variables, feed(batch)))
            if len(waiting) > IN_FLIGHT:
                loss, states = self._merge(loss, states, jax.device_get(waiting.popleft()))
        for found in waiting:
            loss, states = self._merge(loss, states, jax.device_get(found))
        assert states is not None
        return {'loss': float(loss[0] / loss[1]) if loss[1] else float('nan'), **summarise(self.task.metrics, states)}

    def names(self, variables: Any, batch: Any) -> list[str]:
        """The single numbers that an evaluation of (abstract) variables on such batches gives, without evaluating."""
        _, shapes = jax.eval_shape(self._batch_states, variables, batch)
        empty = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
        results = summarise(self.task.metrics, empty)
        return ['loss', *(name for name, result in results.items() if isinstance(result, float))]

    def _merge(self, loss: np.ndarray, states: Any, found: Any) -> tuple[np.ndarray, Any]:
        """Adds one batch to what is known so far, in float64."""
        term, new = found
        merged = new if states is None else {n: m.merge(states[n], new[n]) for n, m in self.task.metrics.items()}
        return loss + np.asarray(term, np.float64), merged
