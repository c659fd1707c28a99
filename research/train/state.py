"""The state of a run: everything that a step reads and writes, and nothing else."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from research.core import rng


@flax.struct.dataclass
class TrainState:
    """One pytree: state at step k = f(config, k).

    Attributes:
      step: int32 scalar, steps done; it addresses the randomness of the next step.
      params: float32 parameters.
      model_state: the model's other collections, such as running statistics; an empty dict without any.
      optimizer_state: optax's.
      extra: what the wrappers of the step keep, by wrapper: {'ema': params, 'skips': {...}}.
    """

    step: jax.Array
    params: Any
    model_state: Any
    optimizer_state: Any
    extra: dict[str, Any]

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied to in training."""
        return {'params': self.params, **self.model_state}

    @property
    def evaluation_variables(self) -> dict[str, Any]:
        """What the model is applied to in evaluation: the averaged parameters where they are kept."""
        return {'params': self.extra.get('ema', self.params), **self.model_state}


def init(
    task: Any,
    optimizer_of: Callable[[Any], optax.GradientTransformation],
    extras: dict[str, Callable[[Any], Any]],
    seed: int,
    batch: Any,
) -> TrainState:
    """The state at step 0. Pure: run it under `eval_shape` for the abstract state, under `jit` for the arrays.

    Args:
      task: makes the variables from a key and a batch.
      optimizer_of: the optimiser for given parameters.
      extras: for each wrapper of the step, its first state from the parameters.
      seed: the run's seed.
      batch: one (abstract) training batch.
    """
    variables = task.init(rng.key(seed, 'init'), batch)
    params = variables['params']
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state={k: v for k, v in variables.items() if k != 'params'},
        optimizer_state=optimizer_of(params).init(params),
        extra={name: first(params) for name, first in extras.items()},
    )
