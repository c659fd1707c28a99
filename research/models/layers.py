"""Layers that the families share.

Shape letters: B batch, H height, W width, C channels.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core.errors import UsageError, nearest
from research.models import lowering
from research.models.convolution import convolution

ACTIVATIONS = {
    'relu': nn.relu,
    'relu2': lambda x: jnp.square(nn.relu(x)),  # So et al., 2021
    'gelu': nn.gelu,  # the tanh approximation, as GPT-2
    'gelu_exact': lowering.gelu,
    'silu': nn.silu,
    'tanh': nn.tanh,
}


def activation(name: str):
    """The activation function of that name."""
    if name not in ACTIVATIONS:
        raise UsageError(f'activation {name!r} does not exist', nearest(name, ACTIVATIONS))
    return ACTIVATIONS[name]


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raises a UsageError unless `value` is one of `choices`."""
    if value not in choices:
        raise UsageError(f'{what} {value!r} does not exist', nearest(value, choices))


def check_images(inputs: jax.Array, model: str) -> None:
    """Raises a UsageError unless `inputs` are images (B, H, W, C)."""
    if inputs.ndim != 4:
        raise UsageError(f'model {model!r} reads images (B, H, W, C), not {inputs.shape}', 'use model=mlp for tables')


conv = functools.partial(nn.Conv, conv_general_dilated=convolution)  # nn.Conv in the form that is fast where it is traced


def cropped(x: jax.Array, kernel: int, pool: int) -> jax.Array:
    """x (B, H, W, C) less the rows and columns that only reach outputs of a convolution which `max_pool` would cut."""
    high, wide = ((size - kernel + 1) // pool * pool + kernel - 1 for size in x.shape[1:3])
    return x[:, :high, :wide] if min(high, wide) >= kernel else x  # too small: max_pool says so


def max_pool(x: jax.Array, window: int) -> jax.Array:
    """Non-overlapping max pooling, (B, H, W, C) -> (B, H // window, W // window, C); rows and columns left over are cut.

    The same values as `nn.max_pool(x, (window, window), (window, window))`, but as a reshape and a maximum, whose gradient
    needs no select-and-scatter, which is slow on CPU. Where the maximum of a window is attained twice its gradient is shared
    equally, while select-and-scatter gives it to the first; both are subgradients.
    """
    if window == 1:
        return x
    batch, height, width, channels = x.shape
    h, w = height // window, width // window
    if h == 0 or w == 0:
        raise UsageError(
            f'an image of {height} x {width} cannot be pooled by {window}',
            "pool less often by model.pool, or set model.padding='SAME'",
        )
    x = x[:, : h * window, : w * window]
    if not lowering.on_cpu():
        return jnp.max(x.reshape(batch, h, window, w, window, channels), axis=(2, 4))  # (B, h, w, C)
    x = x.transpose(1, 2, 0, 3).reshape(h, window, w, window, batch, channels)  # as convolution.py has images
    return _largest(x).transpose(2, 0, 1, 3)


@jax.custom_jvp
def _largest(x: jax.Array) -> jax.Array:
    """`jnp.max(x, axis=(1, 3))` of (h, window, w, window, B, C), and its gradient, in few passes over x on a CPU."""
    return lowering.materialised(functools.reduce(jnp.maximum, _places(x)))


@_largest.defjvp
def _largest_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (by_x,) = primals, tangents
    found = _largest(x)
    ties = functools.reduce(jnp.add, [(place == found).astype(x.dtype) for place in _places(x)])
    share = lowering.materialised(1 / ties)
    chosen = jnp.where(x == found[:, None, :, None], lowering.materialised(by_x), 0)
    return found, lowering.materialised(chosen.sum((1, 3)) * share)


def _places(x: jax.Array) -> list[jax.Array]:
    """The places of a window, each of all windows: window * window of (h, w, B, C)."""
    return [x[:, row, :, column] for row in range(x.shape[1]) for column in range(x.shape[3])]


def norm(kind: str, x: jax.Array, train: bool, *, name: str | None = None, scale: float = 1.0) -> jax.Array:
    """Normalises x (B, ..., C) by 'batch' (Ioffe and Szegedy, 2015), 'group' (Wu and He, 2018; up to 32 groups) or 'none'.

    By 'rms' an example is divided by the root mean square of all its numbers (Zhang and Sennrich, 2019, of the whole image as
    Ba et al., 2016, have it): nothing is subtracted, and the learned scale stands alone.

    Call it inside a module's compact method: the normalisation becomes a child of that module, called `name` if given, whose
    learned scale starts at `scale`.
    """
    scale_init = nn.initializers.constant(scale)
    if kind == 'batch':
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, scale_init=scale_init, name=name)(x)
    if kind == 'group':
        return nn.GroupNorm(num_groups=_groups(x.shape[-1]), scale_init=scale_init, name=name)(x)
    if kind == 'rms':
        return ExampleRMSNorm(scale_init, name=name)(x)
    check_choice('norm', kind, ('none', 'batch', 'group', 'rms'))
    return x


class ExampleRMSNorm(nn.Module):
    """Divides an example of x (B, ..., C) by the root mean square of its numbers and multiplies by `scale` (C,).

    As `nn.RMSNorm(reduction_axes=(1, ..., -1), feature_axes=-1)`, but worked out with the places first, as convolution.py has
    images: XLA's CPU compiler would turn them round in the midst of its loops.
    """

    scale_init: nn.initializers.Initializer = nn.initializers.ones
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param('scale', self.scale_init, x.shape[-1:])
        wide = jnp.moveaxis(x, 0, -2).astype(jnp.promote_types(x.dtype, jnp.float32))  # (..., B, C)
        others = (*range(x.ndim - 2), -1)
        inverse = jax.lax.rsqrt(jnp.square(wide).mean(others, keepdims=True) + self.epsilon)  # (1, ..., 1, B, 1)
        found = lowering.materialised(wide * inverse * scale)
        return jnp.moveaxis(found, -2, 0).astype(jnp.promote_types(x.dtype, scale.dtype))


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al., 2016, equation 4) of x (..., D), with leaves `scale` and, if asked for, `bias` (D,).

    As `nn.LayerNorm(use_fast_variance=False)`, but x less its mean is one value for both the variance and the result, which
    saves a sum over D and two passes over x in the gradient.
    """

    epsilon: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
        x = jnp.asarray(x)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = lowering.materialised(wide - wide.mean(-1, keepdims=True))
        inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)  # (..., 1)
        found = centred * inverse * scale
        if self.use_bias:
            found = found + self.param('bias', nn.initializers.zeros, x.shape[-1:])
        return found.astype(jnp.promote_types(x.dtype, scale.dtype))


def make_norm(kind: str, epsilon: float, name: str | None = None, bias: bool = True) -> nn.Module:
    """A normalisation of the last axis as a module: 'layer' (Ba et al., 2016) or 'rms' (Zhang and Sennrich, 2019).

    The statistics are float32 at least, the variance the mean of squared differences; the result has the wider of the types of
    input and scale.

    Args:
      kind: 'layer' or 'rms'.
      epsilon: added to the variance or the mean of squares.
      name: of the module.
      bias: whether layer normalisation adds a bias; that by the mean of squares never does.
    """
    check_choice('norm', kind, ('layer', 'rms'))
    if kind == 'layer':
        return LayerNorm(epsilon, bias, name=name)
    return nn.RMSNorm(epsilon=epsilon, name=name)


def patches(x: jax.Array, side: int, width: int) -> jax.Array:
    """Dense layer 'patch' on every patch of side x side pixels, (B, H, W, C) -> (B, H // side, W // side, width).

    Call it inside a module's compact method. The kernel is (side, side, C, width).

    Raises:
      UsageError: the image is no whole number of patches.
    """
    if x.shape[1] % side or x.shape[2] % side:
        raise UsageError(
            f'an image of {x.shape[1]} x {x.shape[2]} is no whole number of patches of {side} x {side}',
            'set model.patch to a common divisor of height and width, or give the data source another size',
        )
    return conv(width, (side, side), (side, side), padding='VALID', name='patch')(x)  # (B, H / side, W / side, width)


def masked_mean(features: jax.Array, segments: jax.Array | None) -> jax.Array:
    """The mean over T of features (B, T, D) where segments (B, T) > 0, in float32; (B, D). None: everywhere."""
    weight = jnp.ones(features.shape[:2]) if segments is None else (segments > 0).astype(jnp.float32)  # (B, T)
    total = jnp.einsum('btd,bt->bd', features.astype(jnp.float32), weight)  # (B, D)
    return (total / jnp.maximum(weight.sum(1, keepdims=True), 1)).astype(features.dtype)


def dropout(rate: float, x: jax.Array, train: bool) -> jax.Array:
    """Dropout of x at `rate`; without a rate no layer at all. Call it inside a module's compact method."""
    return nn.Dropout(rate, deterministic=not train)(x) if rate else x


def _groups(channels: int) -> int:
    """The largest number of groups up to 32 that divides the channels."""
    return max(g for g in range(1, 33) if channels % g == 0)
