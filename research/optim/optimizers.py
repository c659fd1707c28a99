"""Optimisers: update directions without learning rate and sign; the run's schedule brings both (see build.py).

Each takes `decay`, the decoupled weight decay (already masked; `optax.identity()` for none), and puts it where its paper
does. The new parameter is p - learning_rate * direction, so the decay is multiplied by the learning rate (as in PyTorch and
optax).

Shape letters: I fan-in, O fan-out.

Adam's first direction for a gradient of 0.5 is 0.5 / (sqrt(0.25) + 1e-8) = 1; with a decay of 0.1 and a parameter of 2 it
is 1.2.
"""

import math
from typing import Any

import jax
import optax

from research.core import leaves
from research.optim.clip import fan_in_axes

ADAM_NAMES = ('.*embed.*', '(.*/)?head/.*')


def sgd(decay: optax.GradientTransformation, /) -> optax.GradientTransformation:
    """g + decay."""
    return decay


def momentum(decay: optax.GradientTransformation, /, *, decay_rate: float = 0.9) -> optax.GradientTransformation:
    """m = decay_rate * m + g; direction m + decay (SGDW: Loshchilov & Hutter 2019, algorithm 1)."""
    return optax.chain(optax.trace(decay_rate), decay)


def nesterov(decay: optax.GradientTransformation, /, *, decay_rate: float = 0.9) -> optax.GradientTransformation:
    """m = decay_rate * m + g; direction g + decay_rate * m + decay (Sutskever et al. 2013, in PyTorch's form)."""
    return optax.chain(optax.trace(decay_rate, nesterov=True), decay)


def adam(
    decay: optax.GradientTransformation, /, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam with bias correction (Kingma & Ba 2015, algorithm 1), then decay (AdamW: Loshchilov & Hutter 2019, algorithm 2)."""
    return optax.chain(optax.scale_by_adam(b1=b1, b2=b2, eps=eps), decay)


def adamw(
    decay: optax.GradientTransformation, /, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """The same direction as `adam`: the name that people look for; it differs in `build.DEFAULT_WEIGHT_DECAY`, 1e-4."""
    return adam(decay, b1=b1, b2=b2, eps=eps)


def nadamw(
    decay: optax.GradientTransformation, /, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam with Nesterov momentum (Dozat 2016, algorithm 2, without its extra factor b2 at the second moment), then decay."""
    return optax.chain(optax.scale_by_adam(b1=b1, b2=b2, eps=eps, nesterov=True), decay)


def lion(decay: optax.GradientTransformation, /, *, b1: float = 0.9, b2: float = 0.99) -> optax.GradientTransformation:
    """sign(b1 * m + (1 - b1) * g), then decay (Chen et al. 2023, algorithm 2).

    Wants a learning rate 3 to 10 times smaller than AdamW's and a weight decay as many times larger (section 5).
    """
    return optax.chain(optax.scale_by_lion(b1=b1, b2=b2), decay)


def adafactor(
    decay: optax.GradientTransformation,
    /,
    *,
    decay_rate: float = 0.8,
    clipping_threshold: float = 1.0,
    momentum: float | None = None,
    multiply_by_parameter_scale: bool = True,
    min_dim_size_to_factor: int = 128,
) -> optax.GradientTransformation:
    """Adafactor: second moments as row and column means of kernels (Shazeer & Stern 2018, algorithms 4 and 5), then decay.

    Left out: the paper's own learning rate min(0.01, 1 / sqrt(t)) (algorithm 6), whose place the run's schedule takes. Unlike
    in optax.adafactor, the learning rate multiplies the weight decay too, and stands after the momentum.

    Args:
      decay: the decoupled weight decay.
      decay_rate: the second moment is averaged with 1 - t ** -decay_rate (section 7.2).
      clipping_threshold: the RMS of a leaf's update is at most this (section 6).
      momentum: decay rate of a running mean of the updates; None: no memory for it.
      multiply_by_parameter_scale: multiply each leaf's update by max(RMS(parameter), 1e-3) (section 8).
      min_dim_size_to_factor: leaves whose second-largest axis is smaller keep a full second moment.
    """
    parts = [
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor),
        optax.clip_by_block_rms(clipping_threshold),
        optax.scale_by_param_block_rms() if multiply_by_parameter_scale else optax.identity(),
        optax.identity() if momentum is None else optax.ema(momentum, debias=False),
    ]
    return optax.chain(*parts, decay)


def lamb(
    decay: optax.GradientTransformation, /, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6
) -> optax.GradientTransformation:
    """Adam plus decay, each leaf scaled to the norm of its parameter (You et al. 2020, algorithm 2, phi the identity).

    The ratio is 1 where either norm is zero. It applies to every leaf, biases and norm scales too.
    """
    return optax.chain(optax.scale_by_adam(b1=b1, b2=b2, eps=eps), decay, optax.scale_by_trust_ratio())


def muon(
    decay: optax.GradientTransformation,
    /,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    rms: float | None = 0.2,
    adam_scale: float = 1.0,
    adam_names: tuple[str, ...] = ADAM_NAMES,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Muon: momentum orthogonalised by Newton-Schulz for kernels, Adam for the rest; decay for both (Jordan et al. 2024).

    A kernel is seen as a matrix (I, O) by `clip.fan_in_axes`: a convolution (h, w, in, out) as (h * w * in, out), as airbench
    does. Embeddings and the output layer belong to Adam (Jordan: Muon hurts them); the first layer is Muon's unless its name is
    given. Layers stacked by `nn.scan` are matrices of their own; other stacks, such as experts', are not: name them for Adam.

    Args:
      decay: the decoupled weight decay.
      beta: decay rate of Muon's momentum.
      nesterov: look ahead by one step of the momentum.
      steps: Newton-Schulz iterations; after 5 the singular values lie within about 0.7 and 1.2.
      rms: scale to this root mean square, so that one learning rate, Adam's, serves both groups (Liu et al. 2025, section 2.2);
        None: Jordan's sqrt(max(1, O / I)), whose learning rates are near 0.02.
      adam_scale: multiplies Adam's directions, e.g. 0.015 with rms=None and a learning rate of 0.02.
      adam_names: regular expressions over whole leaf names; these are Adam's, as is every leaf that is no kernel.
      b1: Adam's first decay rate.
      b2: Adam's second decay rate.
      eps: Adam's epsilon.

    Raises:
      UsageError: at `init`, when one of the given `adam_names` matches no leaf.
    """

    def groups(params: Any) -> Any:
        rules = [(name, 'adam') for name in adam_names] + [(leaves.CATCH_ALL, 'muon')]
        named = leaves.match(rules, params, 'muon.adam_names', allow_unused=tuple(adam_names) == ADAM_NAMES)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf, group: group if fan_in_axes(leaves.name(path), leaf.ndim) else 'adam', params, named
        )

    matrices = optax.contrib.scale_by_muon(ns_steps=steps, beta=beta, nesterov=nesterov, weight_dimension_numbers=_dimensions)
    for_kernels = optax.chain(matrices, optax.stateless(lambda updates, params: _scale_matrices(updates, rms)))
    for_the_rest = optax.chain(optax.scale_by_adam(b1=b1, b2=b2, eps=eps), optax.scale(adam_scale))
    # The decay is masked for the whole tree, so it stands after the two groups are together again.
    return optax.chain(optax.partition({'muon': for_kernels, 'adam': for_the_rest}, groups), decay)


def _dimensions(kernels: Any) -> Any:
    """For each kernel the axes that make up the rows (fan-in) and the columns (fan-out) of its matrix."""

    def split(path: tuple, kernel: jax.Array) -> optax.contrib.MuonDimensionNumbers:
        rows = fan_in_axes(leaves.name(path), kernel.ndim)
        assert rows is not None  # `groups` gave the others to Adam
        return optax.contrib.MuonDimensionNumbers(rows, tuple(range(rows[-1] + 1, kernel.ndim)))

    return jax.tree_util.tree_map_with_path(split, kernels)


def _scale_matrices(updates: Any, rms: float | None) -> Any:
    """Orthogonal updates scaled by their matrix's shape: an orthogonal (I, O) matrix has the RMS 1 / sqrt(max(I, O))."""

    def scaled(path: tuple, update: jax.Array) -> jax.Array:
        axes = fan_in_axes(leaves.name(path), update.ndim)
        assert axes is not None
        rows, columns = math.prod(update.shape[a] for a in axes), math.prod(update.shape[axes[-1] + 1 :])
        return update * (max(1.0, columns / rows) ** 0.5 if rms is None else rms * max(rows, columns) ** 0.5)

    return jax.tree_util.tree_map_with_path(scaled, updates)
