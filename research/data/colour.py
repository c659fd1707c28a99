"""Colour operations on images, and `colour_jitter`.

Shape letters: B batch, H height, W width, C channels (1 or 3).

The operations take one image (H, W, C) uint8 and give one; `jax.vmap` makes them serve a batch. All arithmetic is on
integers, rounded half to even at the end, so that the result is the same bit for bit jitted or not and on every device.
Factors and hue shifts are therefore integers in steps of 1 / 1024:

    brightness(image, 1536)      # 1536 / 1024 = 1.5: the levels 100, 101 and 200 become 150, 152 (151.5 to even) and 255

The definitions are Pillow's (`ImageOps`, `ImageEnhance`), which AutoAugment and RandAugment were built on, except that
Pillow truncates where we round; so results differ from its by at most one level.
"""

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import UsageError
from research.core.threefry import straight
from research.data.augment import Augmentation, check_range, on_images

STEPS = 1024
GREY_WEIGHTS = (19595, 38470, 7471)  # ITU-R 601 luma (0.299, 0.587, 0.114) in steps of 1 / 65536, as in Pillow


def colour_jitter(*, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.0) -> Augmentation:
    """Random brightness, contrast, saturation and hue, always in this order (torchvision: a random order).

    The arguments mean what torchvision's mean: the factors are uniform over [max(0, 1 - x), 1 + x] and the hue shift is
    uniform over [-hue, hue] turns of the colour circle; 0 leaves that property alone. One-channel images only change in
    brightness and contrast. The dtype is kept; float32 images are rounded to whole levels.
    """
    for name, value in (('brightness', brightness), ('contrast', contrast), ('saturation', saturation)):
        check_range(f'colour_jitter.{name}', value, 0)
    check_range('colour_jitter.hue', hue, 0, 0.5)

    def transform(keys: jax.Array, images: jax.Array) -> jax.Array:
        amounts = _jitter_amounts(keys, brightness, contrast, saturation, hue)
        return jax.vmap(_jitter)(levels(images), amounts).astype(images.dtype)

    return on_images(transform)


def _jitter_amounts(keys: jax.Array, brightness: float, contrast: float, saturation: float, hue: float) -> jax.Array:
    """Three factors in steps of 1 / 1024 and a hue shift in steps of 1 / 1024 sextant, (B, 4) int32."""
    spreads = np.array([brightness, contrast, saturation])
    low = np.round([*np.maximum(1 - spreads, 0) * STEPS, -6 * hue * STEPS]).astype(np.int32)
    high = np.round([*(1 + spreads) * STEPS, 6 * hue * STEPS]).astype(np.int32)
    return jax.vmap(lambda key: jax.random.randint(key, (4,), low, high + 1))(straight(keys))


def _jitter(image: jax.Array, amounts: jax.Array) -> jax.Array:
    image = contrast(brightness(image, amounts[0]), amounts[1])
    return hue(saturation(image, amounts[2]), amounts[3])


def levels(images: jax.Array) -> jax.Array:
    """Images as uint8: float values are rounded half to even and clipped to 0..255."""
    return images if images.dtype == jnp.uint8 else jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8)


def brightness(image: jax.Array, factor: jax.Array | int) -> jax.Array:
    """Between black (factor 0) and the image (factor 1024), and beyond."""
    return blend(jnp.int32(0), image, factor)


def contrast(image: jax.Array, factor: jax.Array | int) -> jax.Array:
    """Between the image's mean grey level (factor 0) and the image (factor 1024), and beyond."""
    total = jnp.sum(grey(image), dtype=jnp.uint32)  # exact up to 4096 x 4096 pixels
    mean = divide_to_even(total, image.shape[0] * image.shape[1])
    return blend(mean.astype(jnp.int32), image, factor)


def saturation(image: jax.Array, factor: jax.Array | int) -> jax.Array:
    """Between the grey image (factor 0) and the image (factor 1024), and beyond; the identity for one channel."""
    return blend(grey(image), image, factor)


def sharpness(image: jax.Array, factor: jax.Array | int) -> jax.Array:
    """Between the smoothed image (factor 0) and the image (factor 1024), and beyond; border pixels stay.

    The smoothing is Pillow's `SMOOTH`: the 3 x 3 neighbourhood with weight 5 for the centre and 1 around it, over 13.
    """
    wide = image.astype(jnp.int32)
    rows = wide[:-2] + wide[1:-1] + wide[2:]  # (H - 2, W, C)
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * wide[1:-1, 1:-1]  # (H - 2, W - 2, C)
    return blend(wide.at[1:-1, 1:-1].set(divide_to_even(sums, 13)), image, factor)


def hue(image: jax.Array, shift: jax.Array | int) -> jax.Array:
    """Turns every colour by `shift` / 1024 sextants of the HSV circle (6144 is a full turn); the identity for one channel.

    With value v = max(r, g, b), chroma c = v - min(r, g, b) and the hue h in sextants, a channel is
    v - c * clip(min(k, 4 - k), 0, 1), k = (n + h) mod 6, with n = 5, 3, 1 for red, green and blue; here times c * 1024.
    """
    if image.shape[2] == 1:
        return image
    red, green, blue = jnp.split(image.astype(jnp.int32), 3, axis=2)  # (H, W, 1) each
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    others = jnp.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    hues = jnp.where(value == red, green - blue, others)  # h * c
    k = STEPS * (hues + np.array([5, 3, 1]) * chroma) + shift * chroma  # (H, W, 3)
    k = k % (6 * STEPS * jnp.maximum(chroma, 1))
    lost = jnp.clip(jnp.minimum(k, 4 * STEPS * chroma - k), 0, STEPS * chroma)
    return divide_to_even(STEPS * value - lost, STEPS).astype(jnp.uint8)


def autocontrast(image: jax.Array) -> jax.Array:
    """Stretches each channel so that its least level becomes 0 and its greatest 255; a channel of one level stays."""
    least, greatest = (f(image, axis=(0, 1)).astype(jnp.int32) for f in (jnp.min, jnp.max))  # (C,) each
    stretched = divide_to_even((image - least) * 255, jnp.maximum(greatest - least, 1))
    return jnp.where(greatest > least, stretched, image).astype(jnp.uint8)


def equalize(image: jax.Array) -> jax.Array:
    """Maps each channel's levels so that its histogram becomes nearly flat; exactly Pillow's `ImageOps.equalize`."""
    counts = _histograms(image)  # (C, 256)
    below = jnp.cumsum(counts, axis=1) - counts
    step = jnp.max(jnp.where(counts > 0, below, 0), axis=1, keepdims=True) // 255  # (C, 1)
    flat = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    table = jnp.where(step > 0, flat, jnp.arange(256)).astype(jnp.uint8)
    return table[jnp.arange(image.shape[2]), image]


def _histograms(image: jax.Array) -> jax.Array:
    """How often each level occurs in each channel, (C, 256) int32."""
    channels = image.shape[2]
    bins = image.astype(jnp.int32) + 256 * jnp.arange(channels)  # one scatter, not one per channel
    return jnp.zeros(256 * channels, jnp.int32).at[bins.reshape(-1)].add(1).reshape(channels, 256)


def posterize(image: jax.Array, bits: int) -> jax.Array:
    """Keeps the `bits` highest bits of every value; `bits` is a Python integer in 0..8."""
    return image & np.uint8(256 - 2 ** (8 - bits))


def solarize(image: jax.Array, threshold: int) -> jax.Array:
    """Inverts the values from `threshold` (0..256) on."""
    return jnp.where(image.astype(jnp.int32) >= threshold, 255 - image, image)


def grey(image: jax.Array) -> jax.Array:
    """The grey levels (H, W, 1) int32 of an image (H, W, C) uint8.

    Raises:
      UsageError: the image has neither one nor three channels.
    """
    wide = image.astype(jnp.int32)
    if image.shape[2] == 1:
        return wide
    if image.shape[2] != 3:
        raise UsageError(f'the images have {image.shape[2]} channels, but colour operations need 1 or 3', 'leave them out')
    return (jnp.sum(wide * np.array(GREY_WEIGHTS, np.int32), axis=2, keepdims=True) + 2**15) >> 16  # (H, W, 1)


def blend(degenerate: jax.Array, image: jax.Array, factor: jax.Array | int) -> jax.Array:
    """degenerate + factor / 1024 * (image - degenerate), clipped to 0..255, as uint8; `degenerate` is int32."""
    mixed = STEPS * degenerate + factor * (image.astype(jnp.int32) - degenerate)
    return divide_to_even(jnp.clip(mixed, 0, 255 * STEPS), STEPS).astype(jnp.uint8)


def divide_to_even(numerator: jax.Array, denominator: jax.Array | int) -> jax.Array:
    """numerator / denominator of integers, numerator >= 0 and denominator > 0, rounded half to even."""
    quotient = numerator // denominator
    twice = 2 * (numerator - quotient * denominator)
    return quotient + ((twice > denominator) | ((twice == denominator) & (quotient % 2 == 1)))
