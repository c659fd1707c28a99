"""Crops to the size that a model reads: random ones for training, the centre for evaluation.

Shape letters: B batch, H height, W width, C channels, S side of the result.

    config.data.augment = ['random_resized_crop(size=224)', 'flip']
    config.data.preprocess = ['centre_crop(size=224)', 'normalise']

From images of 256 x 256 training sees random parts, scaled to 224 x 224, which `centre_crop` then leaves alone; evaluation sees
the middle 224 x 224. A part of 10 % of the pixels and the aspect 1 has sides of 81 pixels: it is enlarged 2.8 times.
"""

import math

import jax
import jax.numpy as jnp

from research.core.errors import UsageError
from research.core.threefry import straight
from research.data.augment import Augmentation, check_interval, check_range, on_images


def random_resized_crop(
    *, size: int | None = None, area: tuple[float, float] = (0.05, 1.0), aspect: tuple[float, float] = (0.75, 1.3333)
) -> Augmentation:
    """Scales a random part of the image to S x S: the crop of Szegedy et al. 2015 (arXiv:1409.4842), section 6.

    The share of the area is uniform, the logarithm of height / width too, and so is the place. Sides that are longer than the
    image are cut to it (torchvision draws again instead). Bilinear, smoothed where the image shrinks; the dtype is kept.

    Args:
      size: S, in pixels; None: height and width stay as they are.
      area: least and greatest share of the pixels.
      aspect: least and greatest height / width of the part.
    """
    check_range('random_resized_crop.size', 1 if size is None else size, 1)
    check_interval('random_resized_crop.area', area, 1e-4, 1)
    check_interval('random_resized_crop.aspect', aspect, 1e-2, 1e2)

    def transform(keys: jax.Array, images: jax.Array) -> jax.Array:
        height, width = images.shape[1:3]
        shape = (height, width) if size is None else (size, size)
        boxes = _draw_boxes(keys, height, width, area, aspect)
        return jax.vmap(lambda image, box: _resampled(image, box, shape))(images, boxes)  # (B, S, S, C)

    return on_images(transform)


def centre_crop(*, size: int) -> Augmentation:
    """The middle S x S pixels of the image, S = `size`. It draws nothing, so it serves evaluation too.

    Raises:
      UsageError: (when called) the images are smaller.
    """
    check_range('centre_crop.size', size, 1)

    def transform(keys: jax.Array, images: jax.Array) -> jax.Array:
        height, width = images.shape[1:3]
        if min(height, width) < size:
            raise UsageError(
                f'centre_crop.size is {size}, but the images are {height} x {width}', 'give less, or larger images'
            )
        top, left = (height - size) // 2, (width - size) // 2
        return images[:, top : top + size, left : left + size]

    return on_images(transform)


def _draw_boxes(keys: jax.Array, height: int, width: int, area: tuple[float, float], aspect: tuple[float, float]) -> jax.Array:
    """Top, left, height and width of the part of each example in pixels, (B, 4) float32, inside the image."""

    def draw(key: jax.Array) -> jax.Array:
        of_area, of_aspect, *place = jax.random.uniform(key, (4,))
        pixels = height * width * (area[0] + (area[1] - area[0]) * of_area)
        ratio = jnp.exp(math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * of_aspect)
        image_sides = jnp.array([height, width], jnp.float32)
        sides = jnp.minimum(jnp.sqrt(jnp.stack([pixels * ratio, pixels / ratio])), image_sides)  # (2,)
        return jnp.concatenate([jnp.stack(place) * (image_sides - sides), sides])  # (4,)

    return jax.vmap(draw)(straight(keys))


def _resampled(image: jax.Array, box: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The part `box` (4,) of one image (H, W, C), scaled to `shape`; uint8 is rounded."""
    scale = jnp.array(shape, jnp.float32) / box[2:]
    full = (*shape, image.shape[2])
    found = jax.image.scale_and_translate(image.astype(jnp.float32), full, (0, 1), scale, -box[:2] * scale, 'linear')
    return (jnp.round(found) if image.dtype == jnp.uint8 else found).astype(image.dtype)
