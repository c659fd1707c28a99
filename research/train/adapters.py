"""Adapters: a task that trains a small part of a large model. LoRA (Hu et al. 2021, "LoRA", section 4.1) for any module.

Shape letters: L layers, R rows and C columns of a kernel as a matrix, r rank; D model, H heads, K head size.

An adapter is a task around a task. Its variables hold in 'params' only what is trained, so gradients, the optimiser's state and
the average exist for nothing else; all other parameters lie in the collection 'base', which no step changes. A rule gives each
leaf of the model one of three fates:

    'lora'     stays in 'base'; its effective value is base + alpha / r * A B, of which A and B are trained
    'train'    is trained as it is
    'freeze'   stays in 'base'

A is random and B is zero, so step 0 is exactly the model that was loaded. A query kernel (D, H, K) = (64, 4, 16) under rank 8
has A = `query/a_kernel` (64, 8) and B = `query/b_kernel` (8, 4, 16): 1,024 numbers for 4,096. Layers stacked by nn.scan have
one pair each. The product is made from the weights, not applied to activations, so that it serves every kind of module; the
price is one more copy of the adapted kernels while a step runs.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core import leaves
from research.core.errors import UsageError
from research.core.leaves import Rules
from research.core.terms import Terms
from research.optim.clip import fan_in_axes
from research.tasks.base import Batch, Keys, Task, Variables
from research.tasks.states import Metric

FATES = ('lora', 'train', 'freeze')
# Attention's query and value kernels, as in the paper (section 4.2); head and pooler, which are new as a rule.
LORA_RULES: Rules = (('.*(query|value)/kernel', 'lora'), ('(.*/)?(head|pooler)/.*', 'train'), ('.*', 'freeze'))


def lora(
    task: Task, /, *, rank: int = 8, alpha: float = 16, rules: tuple[tuple[str, str], ...] | None = None, dropout: float = 0.0
) -> 'Lora':
    """The task with low-rank adapters, see the module's docstring.

    Args:
      task: the task whose model is adapted.
      rank: r.
      alpha: the product is scaled by alpha / rank.
      rules: named-leaf rules with the values 'lora', 'train' and 'freeze'; None: `LORA_RULES`.
      dropout: rate at which the rows of A are left out. One mask serves all examples of a step (the paper draws per example).

    Raises:
      UsageError: a value out of range or an unknown fate.
    """
    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise UsageError(
            f'adapter lora: rank={rank}, alpha={alpha}, dropout={dropout} is out of range',
            'for example rank=8, alpha=16, dropout=0',
        )
    for pattern, fate in rules or ():
        if fate not in FATES:
            raise UsageError(f'config.adapter.rules: {pattern!r} has {fate!r}', f'give {", ".join(map(repr, FATES))}')
    return Lora(task, rank, alpha, rules, dropout)


@dataclasses.dataclass(frozen=True, eq=False)
class Lora:
    """`task` with low-rank adapters; made by `lora`."""

    task: Task
    rank: int
    alpha: float
    rules: Rules | None
    dropout: float

    @property
    def module(self) -> nn.Module:
        """The network, without adapters."""
        return self.task.module

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics of the task."""
        return self.task.metrics

    @property
    def whole_batch(self) -> bool:
        """Whether the task compares examples with each other."""
        return getattr(self.task, 'whole_batch', False)

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """What the module is called with."""
        return self.task.arguments(batch)

    def constants(self) -> dict[str, Any]:
        """Those of the task."""
        return constants_of(self.task)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh variables: 'params' (what is trained), 'base' and the module's other collections."""
        return self.split(self.task.init(rng, batch), rng)

    def loss(self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool) -> tuple[Terms, dict[str, Any]]:
        """The task's loss of the adapted model."""
        key = rngs['dropout'] if rngs and train and self.dropout else None
        found, state = self.task.loss(self.merge(variables, key), batch, rngs, train)
        return found, {**state, 'base': variables['base']}

    def predict(self, variables: Variables, batch: Batch) -> Any:
        """The task's outputs of the adapted model."""
        return self.task.predict(self.merge(variables), batch)

    def split(self, variables: Variables, rng: jax.Array) -> dict[str, Any]:
        """The variables of a whole model as this task's, with fresh factors drawn from the key `rng`.

        Raises:
          UsageError: rules that do not fit the leaves, or a leaf that has no matrix of this rank.
        """
        flat = leaves.flat(variables['params'])
        fates = self._fates(flat)
        trained = {name: leaf for name, leaf in flat.items() if fates[name] == 'train'}
        for name in (name for name in flat if fates[name] == 'lora'):
            trained |= self._factors(name, flat[name].shape, jax.random.fold_in(rng, zlib.crc32(name.encode())))
        base = {name: leaf for name, leaf in flat.items() if fates[name] != 'train'}
        return {**variables, 'params': leaves.nested(trained), 'base': leaves.nested(base)}

    def merge(self, variables: Variables, key: jax.Array | None = None) -> dict[str, Any]:
        """The variables of the whole model that `variables` of this task stand for; `key` draws dropout.

        Merged variables give the same outputs without the adapter: export and other programs need know nothing of it.
        """
        trained, whole = leaves.flat(variables['params']), leaves.flat(variables['base'])
        for name in list(whole):
            a, b = (trained.pop(factor, None) for factor in factor_names(name))
            if a is not None and b is not None:
                whole[name] = whole[name] + self.alpha / self.rank * product(self._dropped(a, name, key), b, name)
        others = {collection: tree for collection, tree in variables.items() if collection not in ('params', 'base')}
        return {**others, 'params': leaves.nested({**whole, **trained})}

    def _fates(self, flat: dict[str, Any]) -> dict[str, str]:
        """What becomes of each leaf."""
        rules = LORA_RULES if self.rules is None else self.rules
        fates = leaves.match(rules, flat, 'config.adapter.rules', allow_unused=self.rules is None)
        if 'lora' not in fates.values():
            raise UsageError(
                'config.adapter.rules adapt no leaf', f"give one of these 'lora': {', '.join(n for n in flat if 'kernel' in n)}"
            )
        return fates

    def _factors(self, name: str, shape: tuple[int, ...], key: jax.Array) -> dict[str, jax.Array]:
        """A fresh pair for a leaf: A normal with standard deviation R^-1/2, B zero."""
        layers, rows, columns = matrix(name, shape)
        if min(math.prod(rows), math.prod(columns)) < self.rank or not rows:
            raise UsageError(
                f'config.adapter.rank={self.rank} is more than {name} of shape {shape} has as a matrix',
                f"lower the rank, or let config.adapter.rules give {name!r} 'train' or 'freeze'",
            )
        a, b = factor_names(name)
        draw = jax.random.normal(key, (*layers, *rows, self.rank)) / math.prod(rows) ** 0.5
        return {a: draw, b: jnp.zeros((*layers, self.rank, *columns))}

    def _dropped(self, a: jax.Array, name: str, key: jax.Array | None) -> jax.Array:
        """A with rows left out at the rate `dropout`."""
        if key is None:
            return a
        keep = jax.random.bernoulli(jax.random.fold_in(key, zlib.crc32(name.encode())), 1 - self.dropout, (*a.shape[:-1], 1))
        return jnp.where(keep, a / (1 - self.dropout), 0.0)


def factor_names(name: str) -> tuple[str, str]:
    """The names of A and B for a leaf: 'query/kernel' has 'query/a_kernel' and 'query/b_kernel'."""
    folder, slash, leaf = name.rpartition('/')
    return f'{folder}{slash}a_{leaf}', f'{folder}{slash}b_{leaf}'


def matrix(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The axes of a leaf as (stacked layers, rows, columns): those that a kernel sums over, and its outputs.

    A dense (D, F), convolution (h, w, I, O), query (D, H, K) or out (H, K, D) kernel is cut between inputs and outputs, an
    embedding (V, D) into tokens and features. A leaf of rank 1 has no rows.
    """
    first = int(leaves.is_stacked(name))
    layers, axes = shape[:first], shape[first:]
    cut = len(fan_in_axes(name, len(shape)) or axes[:-1])
    return layers, axes[:cut], axes[cut:]


def product(a: jax.Array, b: jax.Array, name: str) -> jax.Array:
    """A B in the shape of the leaf: (L, R..., r) and (L, r, C...) -> (L, R..., C...), L only where layers are stacked."""
    first, rank = int(leaves.is_stacked(name)), a.shape[-1]
    layers, rows, columns = a.shape[:first], a.shape[first:-1], b.shape[first + 1 :]
    found = a.reshape(*layers, -1, rank) @ b.reshape(*layers, rank, -1)  # (L, R, C)
    return found.reshape(*layers, *rows, *columns)


def constants_of(task: Task) -> dict[str, Any]:
    """The collections that `task.init` leaves as zeros because they are read from elsewhere; most tasks have none."""
    return getattr(task, 'constants', dict)()


def describe_size(params: Any, model_state: Any, rate_rules: Rules) -> str:
    """How large a model is, in words: '1,234,567 parameters', or '12,345 of 1,234,567 parameters trained'.

    Adapter pairs count as parameters; a teacher does not.
    """
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(params)]
    total = sum(sizes) + sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model_state.get('base', {})))
    flat = leaves.flat(params)
    rates = leaves.match(rate_rules, flat, 'config.optimizer.rate_rules')
    trained = sum(math.prod(leaf.shape) for name, leaf in flat.items() if rates[name] is not None)
    return f'{total:,} parameters' if trained == total else f'{trained:,} of {total:,} parameters trained'
