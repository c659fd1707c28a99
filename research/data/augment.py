"""Image augmentation inside the jitted step: geometry, erasing, normalising, and how augmentations are chained.

Shape letters: B batch, H height, W width, C channels.

Every component gives an `Augmentation`: a pure function `(keys, batch) -> batch` with one random key per example, so what
happens to an example follows from its key alone: not from its place in the batch, the batch size or the devices. Images
are uint8, or float32 on the same 0..255 scale, until `normalise`.

    augment = chain([pad_crop(padding=4), flip(), normalise(mean=0.5, std=0.25)])
    batch = augment(rng.example_keys(stream, batch['id'], batch['epoch']), batch)      # a pixel of 255 is (1 - 0.5) / 0.25 = 2
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from research.core import rng
from research.core.errors import UsageError
from research.core.threefry import straight

Batch = dict[str, jax.Array]
Augmentation = Callable[[jax.Array, Batch], Batch]

STRONG = 'strong'  # the key of a second, strongly augmented view of each image (views.py)
ERASING_ATTEMPTS = 10  # rectangles drawn per example until one fits, as in torchvision


def chain(augmentations: Sequence[Augmentation]) -> Augmentation:
    """One augmentation that applies all in order; each member's index is folded into the keys, so none share randomness."""

    def apply(keys: jax.Array, batch: Batch) -> Batch:
        for index, augmentation in enumerate(augmentations):
            batch = augmentation(rng.fold_each(keys, index), batch)
        return batch

    return apply


def on_images(transform: Callable[[jax.Array, jax.Array], jax.Array]) -> Augmentation:
    """The augmentation that replaces the images (B, H, W, C) of a batch by `transform(keys, images)`."""

    def apply(keys: jax.Array, batch: Batch) -> Batch:
        return batch | {'image': transform(keys, images_of(batch))}

    return apply


def flip(*, probability: float = 0.5) -> Augmentation:
    """Mirrors left and right with `probability`; dtype and shape are kept."""
    check_range('flip.probability', probability, 0, 1)
    return on_images(lambda keys, images: _flip(images, draw_chosen(keys, probability)))


def _flip(images: jax.Array, chosen: jax.Array) -> jax.Array:
    """The images (B, H, W, C), mirrored where `chosen` (B,)."""
    return jax.lax.platform_dependent(images, chosen, cpu=_flip_by_index, default=_flip_by_choice)


def _flip_by_choice(images: jax.Array, chosen: jax.Array) -> jax.Array:
    return jnp.where(chosen[:, None, None, None], images[:, :, ::-1], images)


def _flip_by_index(images: jax.Array, chosen: jax.Array) -> jax.Array:
    """Reads each pixel from its column or the mirrored one: XLA's CPU compiler would compute both images to choose from.

    Rows are indexed too, although they stay: else its code would write the result transposed, and copy it.
    """
    rows, columns = jnp.arange(images.shape[1])[:, None], jnp.arange(images.shape[2])
    columns = jnp.where(chosen[:, None], columns[-1] - columns, columns)  # (B, W)
    return jax.vmap(lambda image, at: image.at[rows, at].get(mode='promise_in_bounds'))(images, columns)


def pad_crop(*, padding: int = 4, mode: str = 'constant') -> Augmentation:
    """Pads every side by `padding` pixels and crops back to H x W at a uniform position; dtype and shape are kept.

    Args:
      padding: pixels added on each side.
      mode: 'constant' pads with 0, 'reflect' mirrors without repeating the border pixel (padding < H, W).
    """
    check_range('pad_crop.padding', padding, 0)
    check_choice('pad_crop.mode', mode, ('constant', 'reflect'))

    def transform(keys: jax.Array, images: jax.Array) -> jax.Array:
        if mode == 'reflect' and padding >= min(images.shape[1:3]):
            raise UsageError(
                f'pad_crop.padding is {padding}, but images of {images.shape[1]} x {images.shape[2]} reflect fewer pixels',
                f'set padding to at most {min(images.shape[1:3]) - 1}',
            )
        return _crop(images, _crop_offsets(keys, padding), padding, mode)

    return on_images(transform)


def _crop_offsets(keys: jax.Array, padding: int) -> jax.Array:
    """Top and left corner of each crop in the padded image, (B, 2) int32 in 0..2 * padding."""
    return jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 2 * padding + 1))(straight(keys))


def _crop(images: jax.Array, offsets: jax.Array, padding: int, mode: str) -> jax.Array:
    """The crops of the padded images at `offsets` (B, 2); whole slices: an index a pixel keeps XLA's CPU loop from vectors."""
    sides = (padding, padding)
    padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)), mode)  # (B, H + 2 padding, W + 2 padding, C)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), images.shape[1:]))(padded, offsets)


def cutout(*, size: int = 8, fill: int = 0) -> Augmentation:
    """Sets a `size` x `size` square to `fill`; its centre is uniform over the pixels and the borders clip it.

    DeVries & Taylor 2017 (arXiv:1708.04552), section 3.2.
    """
    check_range('cutout.size', size, 1)
    check_range('cutout.fill', fill, 0, 255)

    def transform(keys: jax.Array, images: jax.Array) -> jax.Array:
        centres = draw_centres(keys, images.shape[1], images.shape[2])
        return _erase(images, square(centres, jnp.full_like(centres, size)), jnp.asarray(fill, images.dtype))

    return on_images(transform)


def random_erasing(
    *,
    probability: float = 0.25,
    area: tuple[float, float] = (0.02, 0.3333),
    aspect: tuple[float, float] = (0.3, 3.3),
    fill: str = 'random',
) -> Augmentation:
    """Erases a random rectangle with `probability`. Zhong et al. 2017 (arXiv:1708.04896), section 3.

    As in torchvision the aspect ratio is log-uniform (the paper: uniform), so that tall and wide are equally likely, and an
    example for which none of ten drawn rectangles fits stays as it is.

    Args:
      probability: of erasing at all.
      area: least and greatest share of the image that is erased.
      aspect: least and greatest height / width of the rectangle.
      fill: 'random' (each value uniform over 0..255) or 'zero'.
    """
    check_range('random_erasing.probability', probability, 0, 1)
    check_interval('random_erasing.area', area, 0, 1)
    check_interval('random_erasing.aspect', aspect, 1e-3, 1e3)
    check_choice('random_erasing.fill', fill, ('random', 'zero'))

    def transform(keys: jax.Array, images: jax.Array) -> jax.Array:
        box_keys, noise_keys = rng.split_each(keys)  # (B,) each
        boxes = _erasing_boxes(box_keys, images.shape[1], images.shape[2], probability, area, aspect)
        return _erase(images, boxes, _noise(noise_keys, images) if fill == 'random' else jnp.zeros_like(images))

    return on_images(transform)


def _erasing_boxes(
    keys: jax.Array, height: int, width: int, probability: float, area: tuple[float, float], aspect: tuple[float, float]
) -> jax.Array:
    """Top, left, height and width of what is erased, (B, 4) int32; height and width are 0 where nothing is."""

    def draw(key: jax.Array) -> jax.Array:
        numbers = jax.random.uniform(key, (2 * ERASING_ATTEMPTS + 3,))  # one call: each costs a second of compilation
        chosen, place, (areas, aspects) = numbers[0], numbers[1:3], numbers[3:].reshape(2, -1)  # (), (2,), (attempts,) x 2
        areas = height * width * (area[0] + (area[1] - area[0]) * areas)
        aspects = jnp.exp(math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * aspects)
        sides = jnp.stack([jnp.sqrt(areas * aspects), jnp.sqrt(areas / aspects)], axis=1)  # (attempts, 2)
        sides = jnp.round(sides).astype(jnp.int32)
        fits = jnp.all(sides <= image_sides, axis=1)  # (attempts,)
        side = jnp.where((chosen < probability) & jnp.any(fits), sides[jnp.argmax(fits)], 0)  # (2,)
        corner = jnp.floor(place * (image_sides - side + 1)).astype(jnp.int32)
        return jnp.concatenate([corner, side])  # (4,)

    image_sides = jnp.array([height, width])
    return jax.vmap(draw)(straight(keys))


def _noise(keys: jax.Array, images: jax.Array) -> jax.Array:
    noise = jax.vmap(functools.partial(jax.random.bits, shape=images.shape[1:], dtype=jnp.uint8))(
        straight(keys)
    )  # (B, H, W, C)
    return noise.astype(images.dtype)


def _erase(images: jax.Array, boxes: jax.Array, fill: jax.Array) -> jax.Array:
    """`images` with `fill` (broadcastable to them) inside `boxes` (B, 4)."""
    return jnp.where(inside(boxes, images.shape[1], images.shape[2])[..., None], fill, images)


def normalise(*, mean: tuple[float, ...] | float = 0.0, std: tuple[float, ...] | float = 1.0) -> Augmentation:
    """(image / 255 - mean) / std in float32; `mean` and `std` are one number or one per channel, on the 0..1 scale.

    It draws nothing, so it serves evaluation too. The default gives 0..1. The view 'strong' that `views` makes is treated
    alike. A batch without images passes as it is: this is the default preprocessing of every data set.

    Raises:
      UsageError: a standard deviation is not positive, or the numbers do not match the channels.
    """
    for value in std if isinstance(std, tuple) else (std,):
        check_range('normalise.std', value, 1e-6)

    def transform(images: jax.Array) -> jax.Array:
        for name, value in (('mean', mean), ('std', std)):
            if isinstance(value, tuple) and len(value) != images.shape[3]:
                raise UsageError(
                    f'normalise.{name} has {len(value)} numbers, but the images have {images.shape[3]} channels',
                    'give one number, or one per channel',
                )
        return (images.astype(jnp.float32) / 255 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)

    def apply(keys: jax.Array, batch: Batch) -> Batch:
        present = [key for key in ('image', STRONG) if key in batch]
        return batch | {key: transform(images_of(batch, key)) for key in present} if present else batch

    return apply


def images_of(batch: Batch, key: str = 'image') -> jax.Array:
    """The images (B, H, W, C) of a batch.

    Raises:
      UsageError: there are none, or they have another number of axes.
    """
    if key not in batch or batch[key].ndim != 4:
        found = {key: tuple(value.shape) for key, value in batch.items()}
        raise UsageError(f'augmentation needs {key!r} (B, H, W, C); the batch has {found}', 'remove it for data without images')
    return batch[key]


def draw_chosen(keys: jax.Array, probability: float) -> jax.Array:
    """Which examples are chosen with `probability`, (B,) bool."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, probability))(straight(keys))


def draw_centres(keys: jax.Array, height: int, width: int) -> jax.Array:
    """A uniform pixel (row, column) per example, (B, 2) int32."""
    return jax.vmap(lambda key: jax.random.randint(key, (2,), 0, jnp.array([height, width])))(straight(keys))


def square(centres: jax.Array, sides: jax.Array) -> jax.Array:
    """The boxes (B, 4) around `centres` (B, 2) with `sides` (B, 2); an even side has one pixel more before its centre."""
    return jnp.concatenate([centres - sides // 2, sides], axis=1)


def inside(boxes: jax.Array, height: int, width: int) -> jax.Array:
    """Which pixels lie in the boxes (top, left, height, width) (B, 4), as (B, H, W) bool; borders clip them."""
    tops, lefts, talls, wides = jnp.split(boxes[:, :, None], 4, axis=1)  # (B, 1, 1) each
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)  # (H, 1), (W,)
    return (rows >= tops) & (rows < tops + talls) & (columns >= lefts) & (columns < lefts + wides)


def check_range(what: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises a UsageError unless low <= value <= high."""
    if not low <= value <= high:
        rule = f'at least {low}' if high == math.inf else f'between {low} and {high}'
        raise UsageError(f'{what} is {value}, but must be {rule}', f'set {what} to a number {rule}')


def check_interval(what: str, pair: tuple[float, float], low: float, high: float) -> None:
    """Raises a UsageError unless `pair` is (least, greatest) with low <= least <= greatest <= high."""
    if len(pair) != 2 or not low <= pair[0] <= pair[1] <= high:
        raise UsageError(
            f'{what} is {pair}, but must be (least, greatest) between {low} and {high}', f'set {what} to such a pair'
        )


def check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    """Raises a UsageError unless `value` is one of `choices`."""
    if value not in choices:
        raise UsageError(f'{what} is {value!r}', f'choose one of {", ".join(choices)}')
