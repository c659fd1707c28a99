"""The contract of a task, and what supervised tasks share: calling the module, precision, padding, model state.

Shape letters: B batch, K outputs.

A module is called as `module(inputs, train=..., **more)`; `more` is what the batch has of `EXTRAS`, under the names that all
models share. A supervised task's module returns (B, K). A task is pure and holds no arrays:

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
from research.core.registry import call
from research.core.terms import Terms
from research.data.source import DataSpec
from research.tasks.losses import unmasked
from research.tasks.states import Metric

Variables = Mapping[str, Any]
Batch = Mapping[str, Any]
Keys = dict[str, jax.Array]

# What a module is given beside its inputs, where the batch has it: the batch's key -> the module's keyword argument.
EXTRAS = {
    'segment': 'segments',  # (B, T) int32: 0 is padding, 1, 2, ... number the documents of a row
    'position': 'positions',  # (B, T) int32: place in its document
    'audio_length': 'lengths',  # (B,) int32: samples that are not padding
    'category': 'categories',  # (B, G) int32: categorical columns
}


class Task(Protocol):
    """What is learned. Pure: every method is a function of its arguments and can be jitted."""

    @property
    def module(self) -> nn.Module:
        """The network."""
        ...

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The evaluation metrics by name."""
        ...

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """What the module is called with: 'inputs', which it takes first, and its other keyword arguments but `train`."""
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
class ModuleTask:
    """A task over one module; brings the module, its initialisation and its application. Subclasses give the rest.

    Attributes:
      model: `model(num_outputs=K)` makes the module; `vocabulary_size` and `cardinalities` go to fields of that name.
      data: what the data look like.
      dtype: the type the module computes in. Parameters, their gradients, model state and outputs are float32 all the same.
      inputs: the key of the batch that the module reads first.
      metrics: names of metrics; once constructed, the metrics themselves by name. A program may pass such a dict instead.
    """

    model: Callable[..., nn.Module]
    data: DataSpec
    dtype: Any = jnp.float32
    inputs: str
    metrics: tuple[str, ...] | dict[str, Metric]

    @property
    def num_outputs(self) -> int:
        """How many outputs the module has: for one example, or for one place of a sequence."""
        raise NotImplementedError

    @functools.cached_property
    def module(self) -> nn.Module:
        """The module, with as many outputs as the data ask for."""
        return make_module(self.model, self.data, self.num_outputs)

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """'inputs' and those of `EXTRAS` that the batch has; zeros in masked rows, floats in `dtype`."""
        extras = {argument: batch[key] for key, argument in EXTRAS.items() if key in batch}
        return self.ready({'inputs': batch[self.inputs], **extras}, batch)

    def ready(self, arguments: dict[str, Any], batch: Batch) -> dict[str, Any]:
        """`arguments` with zeros in masked rows and floats in `dtype`: subclasses that override `arguments` end with it."""
        return cast({name: unmasked(value, batch['mask']) for name, value in arguments.items()}, self.dtype)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh variables for batches like `batch`; `rng` is one key."""
        arguments = self.arguments(batch)
        return self.module.init(rng, arguments.pop('inputs'), train=False, **arguments)

    def apply(
        self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool, method: str | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """The module's outputs, floats in float32, and its new state, which differs from the old one only if `train`.

        Parameters and inputs of floating type are cast to `dtype` on the way in, so the gradient with respect to float32
        parameters is float32. Integer inputs (raw bytes, token ids) reach the module as they are. `method`: another method of
        the module with the same arguments, such as 'features'.
        """
        state = {name: collection for name, collection in variables.items() if name != 'params'}
        arguments = self.arguments(batch)
        inputs = arguments.pop('inputs')
        outputs, changed = self.module.apply(
            self.ready_variables(variables),
            inputs,
            train=train,
            rngs=rngs,
            mutable=list(state) if train else [],
            method=method,
            **arguments,
        )
        return cast(outputs, jnp.float32), {**state, **changed}

    def ready_variables(self, variables: Variables) -> Variables:
        """`variables` as the module computes with them: parameters in `dtype`, but single numbers as they are.

        They cost nothing, and a logit scale near 100 would move in steps of 1 in bfloat16.
        """
        return {**variables, 'params': jax.tree.map(lambda x: cast(x, self.dtype) if x.ndim else x, variables['params'])}


def make_module(model: Callable[..., nn.Module], data: DataSpec, num_outputs: int) -> nn.Module:
    """The module that `model` makes for these data; it is told of the data what it has fields for."""
    vocabulary_size = 0 if data.tokenizer is None else data.tokenizer.vocabulary_size
    return call(model, num_outputs=num_outputs, vocabulary_size=vocabulary_size, cardinalities=data.cardinalities)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Supervised(ModuleTask):
    """A task whose loss compares outputs (B, K) with labels of the batch; subclasses give `num_outputs` and `terms`.

    Attributes:
      labels: the key of the batch that holds the targets.
    """

    labels: str

    def terms(self, outputs: jax.Array, batch: Batch) -> Terms:
        """The terms of float32 `outputs` (B, K)."""
        raise NotImplementedError

    def apply(
        self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool, method: str | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """As `ModuleTask.apply`; outputs that are not (B, K) are refused."""
        outputs, state = super().apply(variables, batch, rngs, train, method)
        if method is None and outputs.shape[1:] != (self.num_outputs,):
            raise UsageError(
                f'the model gives outputs of shape {outputs.shape}, not (batch, {self.num_outputs})',
                'flatten or pool its last layer, and let it have num_outputs units',
            )
        return outputs, state

    def loss(self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool) -> tuple[Terms, dict[str, Any]]:
        """The terms of one batch and the new model state; `rngs` is a dict such as {'dropout': key}."""
        outputs, state = self.apply(variables, batch, rngs, train)
        return self.terms(outputs, batch), state

    def predict(self, variables: Variables, batch: Batch) -> jax.Array:
        """Outputs (B, K) float32 as in evaluation."""
        return self.apply(variables, batch, None, train=False)[0]


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
