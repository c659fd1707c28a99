"""The whole update rule of a run, as one optax transformation in one fixed order.

    freeze( clip -> L2 decay -> algorithm(decoupled decay) -> rate multipliers -> -learning rate )

* freeze outermost: a frozen leaf is seen by nothing inside: no update, no optimiser state, no part in the clipping norm.
* clip before L2 decay: the limit is for what the data says, so it means the same at any weight decay, and clipping a wild
  gradient does not weaken the decay. (PyTorch's clip_grad_norm_ followed by an optimiser's weight_decay is the same order.)
* decoupled decay inside the algorithm, which knows its place; rate multipliers and the learning rate scale it too.

With a learning rate of 0.1, a weight decay of 0.01, plain SGD, a kernel of 2 and a gradient of 3 the update is
-0.1 * (3 + 0.01 * 2) = -0.302; under the rate rule ('.*/kernel', 0.5) it is -0.151, under ('.*/kernel', None) nothing. The rate
multiplier of a leaf is that of its rule times that of its layer (`layerwise.py`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.core import leaves
from research.core.errors import UsageError
from research.core.leaves import Rules
from research.optim import layerwise

# By name and not by rank, which lies for attention biases (H, K) and layers stacked by nn.scan.
DECAY_RULES: Rules = ((r'(.*/)?\w*(kernel|embedding)', 1.0), ('.*', 0.0))
RATE_RULES: Rules = (('.*', 1.0),)

# For a config that leaves the weight decay open; optimisers that are not named here have none.
DEFAULT_WEIGHT_DECAY = {'adamw': 1e-4}

Algorithm = Callable[[optax.GradientTransformation], optax.GradientTransformation]


def build(
    params: Any,
    algorithm: Algorithm,
    learning_rate: Callable[[Any], jax.Array],
    *,
    weight_decay: float = 0.0,
    decay: str = 'decoupled',
    decay_rules: Rules | None = None,
    rate_rules: Rules = RATE_RULES,
    layer_decay: float = 1.0,
    clip: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """The transformation from gradients to the updates that `optax.apply_updates` adds; it counts its own steps.

    Args:
      params: the parameters, concrete or abstract; only names and structure are read.
      algorithm: one of optimizers.py with its arguments bound: decoupled decay -> direction.
      learning_rate: step -> rate, float32; called with the number of updates so far, which the state holds.
      weight_decay: strength, >= 0.
      decay: 'decoupled' (added to the direction, so times the learning rate) or 'l2' (added to the gradient).
      decay_rules: named-leaf rules: the factor of `weight_decay`; None: `DECAY_RULES`, kernels and embeddings only.
      rate_rules: named-leaf rules: the factor of the learning rate, > 0; None freezes the leaf.
      layer_decay: factor on the learning rate from each layer to the one below, in (0, 1], see `layerwise.multipliers`.
      clip: a transformation from clip.py; None: no clipping.

    Raises:
      UsageError: rules that do not fit the leaves, factors out of range, a decay that reaches no leaf, nothing left to train.
    """
    rates = _rates(rate_rules, layer_decay, params)
    if decay not in ('decoupled', 'l2'):
        raise UsageError(f'optimizer.decay is {decay!r}', "write 'decoupled' or 'l2'")
    labels = jax.tree.map(lambda rate: 'frozen' if rate is None else 'train', rates, is_leaf=_is_none)
    strengths = _trained(_strengths(weight_decay, decay_rules, params), labels)
    decayed = _add_decay(strengths) if weight_decay else optax.identity()
    inner = optax.chain(
        clip or optax.identity(),
        decayed if decay == 'l2' else optax.identity(),
        algorithm(decayed if decay == 'decoupled' else optax.identity()),
        _scale(_trained(rates, labels)),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.partition({'train': inner, 'frozen': _keep()}, labels)


def _rates(rules: Rules, layer_decay: float, params: Any) -> Any:
    """The factor on each leaf's learning rate, a tree like `params`; None for a frozen leaf."""
    valid = 'a positive number, or None to freeze'
    rates = _matched(rules, params, 'optimizer.rate_rules', lambda factor: factor is None or factor > 0, valid)
    if all(rate is None for rate in jax.tree.leaves(rates, is_leaf=_is_none)):
        raise UsageError('optimizer.rate_rules freeze every leaf', 'leave one leaf a rate that is not None')
    depths = layerwise.multipliers(params, layer_decay)
    return jax.tree.map(lambda rate, depth: None if rate is None else rate * depth, rates, depths, is_leaf=_is_none)


def _strengths(weight_decay: float, rules: Rules | None, params: Any) -> Any:
    """The weight decay of each leaf, a tree of floats like `params`."""
    factors = _matched(
        DECAY_RULES if rules is None else rules,
        params,
        'optimizer.decay_rules',
        lambda factor: factor is not None and factor >= 0,
        'a number that is at least 0',
        allow_unused=rules is None,
    )
    if weight_decay and not any(jax.tree.leaves(factors)):
        raise UsageError(
            f'optimizer.weight_decay is {weight_decay}, but the rules let no leaf decay',
            f'set it to 0, or set optimizer.decay_rules; the leaves are {", ".join(leaves.names(params)[:8])}',
        )
    return jax.tree.map(lambda factor: weight_decay * factor, factors)


def _matched(rules: Rules, params: Any, what: str, valid: Callable[[Any], bool], fix: str, allow_unused: bool = False) -> Any:
    """`leaves.match` with checked values."""
    for pattern, factor in rules:
        if not valid(factor):
            raise UsageError(f'{what}: {pattern!r} has the factor {factor}', f'give {fix}')
    return leaves.match(rules, params, what, allow_unused)


def _trained(tree: Any, labels: Any) -> Any:
    """`tree` with a hole at every frozen leaf, in the form in which `optax.partition` hands trees on."""
    return jax.tree.map(lambda label, leaf: leaf if label == 'train' else optax.MaskedNode(), labels, tree, is_leaf=_is_none)


def _add_decay(strengths: Any) -> optax.GradientTransformation:
    """Adds strength * parameter to each leaf; a leaf of strength 0 passes untouched."""

    def add(strength: float, update: jax.Array, parameter: jax.Array) -> jax.Array:
        return update + strength * parameter if strength else update

    return optax.stateless(lambda updates, params: jax.tree.map(add, strengths, updates, params))


def _scale(factors: Any) -> optax.GradientTransformation:
    """Multiplies each leaf by its factor, a number or an array; a leaf of factor 1 passes untouched."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda f, u: u if np.ndim(f) == 0 and f == 1 else f * u, factors, updates)
    )


def _keep() -> optax.GradientTransformation:
    """Updates that change no bit of a parameter: x + -0.0 is x for every normal x and both zeros; -0.0 + 0.0 is 0.0."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates))


def _is_none(value: Any) -> bool:
    return value is None
