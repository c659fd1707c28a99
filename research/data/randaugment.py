"""RandAugment: a few random operations of one fixed strength per example.

Shape letters: B batch, H height, W width, C channels (1 or 3), L layers, N operations (14).

A naive `lax.switch` under `vmap` computes all 14 operations for every image. Here the five geometric ones are one gather
with a per-example matrix (the identity for the others), and of the rest all but equalize and sharpness are arithmetic on
single pixels, which the compiler fuses.

    randaugment(num_layers=2, magnitude=10)      # strength 10 / 30: rotate by 10 degrees, shear by 0.1, factors 1 +- 0.3
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.core.threefry import straight
from research.data import colour
from research.data.augment import Augmentation, check_range, on_images

OPERATIONS = (
    'identity', 'autocontrast', 'equalize', 'rotate', 'solarize', 'color', 'posterize', 'contrast', 'brightness', 'sharpness',
    'shear_x', 'shear_y', 'translate_x', 'translate_y',
)  # fmt: skip
GREATEST_MAGNITUDE = 30
FIXED = 1 << 16  # coordinates are integers in steps of 1 / 65536 pixel, as in Pillow: exact, and equal on every device


def randaugment(*, num_layers: int = 2, magnitude: int = 10) -> Augmentation:
    """Applies `num_layers` operations, drawn uniformly with replacement from `OPERATIONS`, at strength m = magnitude / 30.

    Cubuk et al. 2019 (arXiv:1909.13719), section 3. The ranges are torchvision's (31 bins, magnitude 0..30):

        rotate 30 m degrees about the centre             shear_x, shear_y 0.3 m from the upper left corner
        translate_x, translate_y 150 / 331 m W or H, in whole pixels
        color, contrast, brightness, sharpness factor 1 +- 0.9 m
        posterize to 8 - round(4 m) bits                 solarize from level 256 (1 - m) on

    Signs are drawn per example and layer. Solarize starts at 256, not at torchvision's 255, so that magnitude 0 inverts
    nothing. Geometry takes the nearest pixel and fills with 0. On one-channel images color is the identity. The dtype is
    kept; float32 images are rounded to whole levels.
    """
    check_range('randaugment.num_layers', num_layers, 1)
    check_range('randaugment.magnitude', magnitude, 0, GREATEST_MAGNITUDE)

    def transform(keys: jax.Array, images: jax.Array) -> jax.Array:
        operations, signs = _draw(keys, num_layers)
        result = colour.levels(images)
        for layer in range(num_layers):
            result = _apply(result, operations[:, layer], signs[:, layer], magnitude)
        return result.astype(images.dtype)

    return on_images(transform)


def _draw(keys: jax.Array, num_layers: int) -> tuple[jax.Array, jax.Array]:
    """The operations (indices into `OPERATIONS`) and the signs (0 is negative, 1 positive), each (B, L) int32."""
    drawn = jax.vmap(lambda key: jax.random.randint(key, (num_layers,), 0, 2 * len(OPERATIONS)))(straight(keys))  # (B, L)
    return drawn // 2, drawn % 2


def _apply(images: jax.Array, operations: jax.Array, signs: jax.Array, magnitude: int) -> jax.Array:
    """One layer: operation `operations` (B,) with `signs` (B,) on `images` (B, H, W, C) uint8."""
    matrices = jnp.asarray(_matrices(magnitude, images.shape[1], images.shape[2]))[operations, signs]  # (B, 6)
    factors = jnp.asarray(_factors(magnitude))[signs]  # (B,)
    return jax.vmap(functools.partial(_recolour, magnitude))(jax.vmap(_warp)(images, matrices), operations, factors)


def _recolour(magnitude: int, image: jax.Array, operation: jax.Array, factor: jax.Array) -> jax.Array:
    """The colour operation on one image (H, W, C); geometric operations leave it as it is."""
    strength = magnitude / GREATEST_MAGNITUDE
    branches: dict[str, Callable[[jax.Array], jax.Array]] = {
        'autocontrast': colour.autocontrast,
        'equalize': colour.equalize,
        'solarize': functools.partial(colour.solarize, threshold=round(256 * (1 - strength))),
        'posterize': functools.partial(colour.posterize, bits=8 - round(4 * strength)),
        'color': functools.partial(colour.saturation, factor=factor),
        'contrast': functools.partial(colour.contrast, factor=factor),
        'brightness': functools.partial(colour.brightness, factor=factor),
        'sharpness': functools.partial(colour.sharpness, factor=factor),
    }
    # The operations without a branch share the last one, so that the compiler selects among nine, not fourteen.
    numbers = [list(branches).index(name) if name in branches else len(branches) for name in OPERATIONS]
    return jax.lax.switch(jnp.array(numbers)[operation], [*branches.values(), lambda image: image], image)


def _factors(magnitude: int) -> np.ndarray:
    """The factors of the two signs in steps of 1 / 1024, (2,) int32."""
    spread = 0.9 * magnitude / GREATEST_MAGNITUDE
    return np.round(np.array([1 - spread, 1 + spread]) * colour.STEPS).astype(np.int32)


def _matrices(magnitude: int, height: int, width: int) -> np.ndarray:
    """Where each operation and sign takes its pixels from, (N, 2, 6) int32 in fixed point.

    The six numbers (a, b, c, d, e, f) mean that output pixel (x, y) shows input pixel (a x + b y + c, d x + e y + f),
    both counted from pixel centres.
    """
    maps = [[_affine(name, sign * magnitude / GREATEST_MAGNITUDE, height, width) for sign in (-1, 1)] for name in OPERATIONS]
    result = np.array(maps)  # (N, 2, 6)
    result[..., 2] += (result[..., 0] + result[..., 1]) / 2  # pixel centres lie at + 0.5
    result[..., 5] += (result[..., 3] + result[..., 4]) / 2
    return np.floor(result * FIXED + 0.5).astype(np.int32)


def _affine(name: str, strength: float, height: int, width: int) -> tuple[float, ...]:
    """The inverse map (a, b, c, d, e, f) of one operation at a signed strength in -1..1, in the sense of `_matrices`."""
    shift = 150 / 331 * strength
    sheared = 0.3 * strength
    maps = {
        'rotate': _rotation(math.radians(30 * strength), width / 2, height / 2),
        'shear_x': (1, sheared, 0, 0, 1, 0),
        'shear_y': (1, 0, 0, sheared, 1, 0),
        'translate_x': (1, 0, int(shift * width), 0, 1, 0),
        'translate_y': (1, 0, 0, 0, 1, int(shift * height)),
    }
    return maps.get(name, (1, 0, 0, 0, 1, 0))


def _rotation(angle: float, x: float, y: float) -> tuple[float, ...]:
    """The inverse map of a counter-clockwise rotation by `angle` radians about (x, y)."""
    cosine, sine = math.cos(angle), math.sin(angle)
    return (cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y)


def _warp(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """The image (H, W, C) seen through the inverse map `matrix` (6,) of `_matrices`; 0 where it looks outside."""
    rows, columns = jnp.arange(image.shape[0])[:, None], jnp.arange(image.shape[1])  # (H, 1), (W,)
    x = (matrix[0] * columns + matrix[1] * rows + matrix[2]) // FIXED  # (H, W)
    y = (matrix[3] * columns + matrix[4] * rows + matrix[5]) // FIXED  # (H, W)
    return image.at[y, x].get(mode='fill', fill_value=0, wrap_negative_indices=False)
