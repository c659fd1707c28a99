"""Layers that the families share.

Shape letters: B batch, H height, W width, C channels.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core.errors import UsageError, nearest

ACTIVATIONS = {'relu': nn.relu, 'gelu': nn.gelu, 'silu': nn.silu, 'tanh': nn.tanh}


def activation(name: str):
    """The activation function of that name."""
    if name not in ACTIVATIONS:
        raise UsageError(f'activation {name!r} does not exist', nearest(name, ACTIVATIONS))
    return ACTIVATIONS[name]


def max_pool(x: jax.Array, window: int) -> jax.Array:
    """Non-overlapping max pooling, (B, H, W, C) -> (B, H // window, W // window, C); rows and columns left over are cut.

    The same values as `nn.max_pool(x, (window, window), (window, window))`, but as a reshape and a maximum, whose gradient
    needs no select-and-scatter, which is slow on CPU. Where the maximum of a window is attained twice its gradient is shared
    equally, while select-and-scatter gives it to the first; both are subgradients.
    """
    batch, height, width, channels = x.shape
    h, w = height // window, width // window
    if h == 0 or w == 0:
        raise UsageError(
            f'an image of {height} x {width} cannot be pooled by {window}',
            "pool less often by model.pool, or set model.padding='SAME'",
        )
    x = x[:, : h * window, : w * window]
    return jnp.max(x.reshape(batch, h, window, w, window, channels), axis=(2, 4))  # (B, h, w, C)


def norm(kind: str, x: jax.Array, train: bool) -> jax.Array:
    """Normalises x (B, ..., C) by 'batch' (Ioffe and Szegedy, 2015), 'group' (Wu and He, 2018; up to 32 groups) or 'none'.

    Call it inside a module's compact method: the normalisation becomes a child of that module.
    """
    if kind == 'batch':
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    if kind == 'group':
        return nn.GroupNorm(num_groups=_groups(x.shape[-1]))(x)
    if kind != 'none':
        raise UsageError(f'norm {kind!r} does not exist', nearest(kind, ('none', 'batch', 'group')))
    return x


def dropout(rate: float, x: jax.Array, train: bool) -> jax.Array:
    """Dropout of x at `rate`; without a rate no layer at all. Call it inside a module's compact method."""
    return nn.Dropout(rate, deterministic=not train)(x) if rate else x


def _groups(channels: int) -> int:
    """The largest number of groups up to 32 that divides the channels."""
    return max(g for g in range(1, 33) if channels % g == 0)
