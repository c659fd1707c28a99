"""The contract of a task, and what supervised tasks share: calling the module, precision, padding, model state.

Shape letters: B batch, K outputs.

A module is called as `module(inputs, train=...)` and returns (B, K). A task is pure and holds no arrays:

    variables = task.init(rng.key(0, 'init'), batch)                # {'params': ..., 'batch_stats': ...}
    terms, state = task.loss(variables, batch, {'dropout': key}, train=True)
    variables = {'params': variables['params'], **state}            # state: every collection but 'params'

Masked rows influence nothing but, in training, the batch statistics of a module that takes any (it sees zeros there):
train such a module on full batches.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core.errors import UsageError, nearest
from research.core.terms import Terms
from research.data.source import DataSpec
from research.tasks.losses import unmasked
from research.tasks.states import Metric

Variables = Mapping[str, Any]
Batch = Mapping[str, Any]
Keys = dict[str, jax.Array]


class Task(Protocol):
    """What is learned. Pure: every method is a function of its arguments and can be jitted.

    Attributes:
      inputs: the key of the batch that the module reads.
    """

    inputs: str

    @property
    def module(self) -> nn.Module:
        """The network."""
        ...

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The evaluation metrics by name."""
        ...

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh variables, float32, for batches like `batch`."""
        ...

    def loss(self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool) -> tuple[Terms, dict[str, Any]]:
        """Terms with at least 'loss', and the new model state (all collections but 'params'; changed only in training)."""
        ...

    def predict(self, variables: Variables, batch: Batch) -> Any:
        """The outputs that the metrics read."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Supervised:
    """A task whose loss compares outputs (B, K) with labels of the batch; subclasses give `num_outputs` and `terms`.

    Attributes:
      model: `model(num_outputs=K)` makes the module.
      data: what the data look like.
      dtype: the type the module computes in. Parameters, their gradients, model state and outputs are float32 all the same.
      inputs: the key of the batch that the module reads.
      labels: the key of the batch that holds the targets.
      metrics: names of metrics; once constructed, the metrics themselves by name. A program may pass such a dict instead.
    """

    model: Callable[..., nn.Module]
    data: DataSpec
    dtype: Any = jnp.float32
    inputs: str
    labels: str
    metrics: tuple[str, ...] | dict[str, Metric]

    @property
    def num_outputs(self) -> int:
        """How many outputs the module has for one example."""
        raise NotImplementedError

    def terms(self, outputs: jax.Array, batch: Batch) -> Terms:
        """The terms of float32 `outputs` (B, K)."""
        raise NotImplementedError

    @functools.cached_property
    def module(self) -> nn.Module:
        """The module, with as many outputs as the data ask for."""
        return self.model(num_outputs=self.num_outputs)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh variables for batches like `batch`; `rng` is one key."""
        return self.module.init(rng, self._module_inputs(batch), train=False)

    def apply(self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool) -> tuple[jax.Array, dict[str, Any]]:
        """The module's outputs (B, K) float32 and its new state, which differs from the old one only if `train`.

        Parameters and inputs of floating type are cast to `dtype` on the way in, so the gradient with respect to float32
        parameters is float32. Integer inputs (raw bytes, token ids) reach the module as they are.
        """
        state = {name: collection for name, collection in variables.items() if name != 'params'}
        cast_variables = {**state, 'params': cast(variables['params'], self.dtype)}
        outputs, changed = self.module.apply(
            cast_variables, self._module_inputs(batch), train=train, rngs=rngs, mutable=list(state) if train else []
        )
        if outputs.shape[1:] != (self.num_outputs,):
            raise UsageError(
                f'the model gives outputs of shape {outputs.shape}, not (batch, {self.num_outputs})',
                'flatten or pool its last layer, and let it have num_outputs units',
            )
        return jnp.asarray(outputs, jnp.float32), {**state, **changed}

    def loss(self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool) -> tuple[Terms, dict[str, Any]]:
        """The terms of one batch and the new model state; `rngs` is a dict such as {'dropout': key}."""
        outputs, state = self.apply(variables, batch, rngs, train)
        return self.terms(outputs, batch), state

    def predict(self, variables: Variables, batch: Batch) -> jax.Array:
        """Outputs (B, K) float32 as in evaluation."""
        return self.apply(variables, batch, None, train=False)[0]

    def _module_inputs(self, batch: Batch) -> jax.Array:
        return cast(unmasked(batch[self.inputs], batch['mask']), self.dtype)


def cast(tree: Any, dtype: Any) -> Any:
    """`tree` with its floating arrays in `dtype` and all others untouched."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def check_keys(data: DataSpec, keys: Sequence[str]) -> None:
    """Checks that examples have all `keys`.

    Raises:
      UsageError: they do not.
    """
    for key in keys:
        if key not in data.examples:
            raise UsageError(f'the examples of this data set have no {key!r}', nearest(key, data.examples))
