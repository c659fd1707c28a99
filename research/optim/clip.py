"""Gradient clipping: by the norm of everything, of each leaf, of each output unit, or by value.

Shape letters: C channels (I in, O out), D model, H heads, K head size.

A gradient with leaf norms 3 and 4 has the global norm 5. `global_norm(max_norm=1)` divides both by 5 and keeps the direction;
`block_norm(max_norm=1)` brings each leaf to norm 1. A gradient within the limit comes back bit for bit.
"""

import re

import jax
import jax.numpy as jnp
import optax

from research.core import leaves
from research.core.errors import UsageError


def global_norm(*, max_norm: float = 1.0) -> optax.GradientTransformation:
    """Scales the whole gradient to an L2 norm of at most `max_norm` (Pascanu et al. 2013, algorithm 1)."""
    return optax.clip_by_global_norm(_positive('global_norm', 'max_norm', max_norm))


def block_norm(*, max_norm: float = 1.0) -> optax.GradientTransformation:
    """Scales each leaf by itself, of stacked layers each layer, to an L2 norm of at most `max_norm`.

    `optax.clip_by_block_rms` bounds the RMS instead.
    """
    _positive('block_norm', 'max_norm', max_norm)

    def clip(path: tuple, gradient: jax.Array) -> jax.Array:
        return _shrink(gradient, _norm(gradient, _whole(path, gradient.ndim)), jnp.float32(max_norm))

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(clip, updates))


# Kernels of rank 3 that sum over their first axis alone: attention's projections, and the gates of recurrent layers.
MANY_OUTPUTS = re.compile(r'(^|/)((query|key|value)/\w*kernel|recurrent_kernel|layers_\d+_(forward|backward)/input/\w*kernel)$')


def value(*, limit: float = 1.0) -> optax.GradientTransformation:
    """Clips every element to [-limit, limit]; this changes the gradient's direction."""
    return optax.clip(_positive('value', 'limit', limit))


def adaptive(*, clipping: float = 0.01, epsilon: float = 1e-3) -> optax.GradientTransformation:
    """Adaptive gradient clipping: at most `clipping` * max(|w|, epsilon) for each output unit (Brock et al. 2021, eq. 3).

    A unit is what one output sees: the kernel's slice over `fan_in_axes`, or the whole of any other leaf.
    `optax.adaptive_grad_clip` goes by rank alone and is wrong for 1-D convolutions (norms per input channel), attention's
    output kernels, and kernels (1, 1, 1, O) (one norm for all outputs). The paper leaves the last layer unclipped (section
    4.1); here all are clipped.
    """
    _positive('adaptive', 'clipping', clipping)
    _positive('adaptive', 'epsilon', epsilon)

    def clip(path: tuple, gradient: jax.Array, parameter: jax.Array) -> jax.Array:
        axes = fan_in_axes(leaves.name(path), gradient.ndim) or _whole(path, gradient.ndim)
        limit = clipping * jnp.maximum(_norm(parameter, axes), epsilon)
        return _shrink(gradient, _norm(gradient, axes), limit)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(clip, updates, params))


def fan_in_axes(name: str, rank: int) -> tuple[int, ...] | None:
    """The axes of a linen kernel that are summed over to make one output; None for a leaf that is no kernel.

    A kernel is a leaf of rank >= 2 whose name ends in 'kernel' (attention biases (H, K) and class tokens (1, 1, D) are none).
    Dense (I, O), convolutions (..., I, O) and attention's output (H, K, D) sum over all axes but the last; attention's `query`,
    `key` and `value` kernels (D, H, K) have H * K outputs and sum over D alone, as do those of recurrent gates (D, G, H) and
    (H, G, H), which only the name can tell. In a leaf of stacked layers (L, ...) the first axis is no part of any kernel.
    """
    first = int(leaves.is_stacked(name))
    if rank - first < 2 or not name.endswith('kernel'):
        return None
    count = 1 if rank - first == 3 and MANY_OUTPUTS.search(name) else rank - first - 1
    return tuple(range(first, first + count))


def _whole(path: tuple, rank: int) -> tuple[int, ...]:
    """The axes of a whole leaf; of one of stacked layers, those of a layer."""
    return tuple(range(int(leaves.is_stacked(leaves.name(path))), rank))


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The L2 norm over `axes`, kept with size 1 so that it broadcasts; float32."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))


def _shrink(gradient: jax.Array, norm: jax.Array, limit: jax.Array) -> jax.Array:
    """`gradient` scaled to the norm `limit` where it is above; the factor is exactly 1 elsewhere, also at norm zero."""
    return (gradient * (limit / jnp.maximum(norm, limit))).astype(gradient.dtype)


def _positive(clip: str, argument: str, number: float) -> float:
    if not number > 0:
        raise UsageError(
            f'clip {clip!r}: {argument}={number} is not positive', 'give a positive number, or clip=None to clip nothing'
        )
    return number
