import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_digits, load_sample_image

from research.data import randaugment
from research.data.randaugment import OPERATIONS

PHOTO = load_sample_image('flower.jpg')[20:400:9, 30:600:11]
DIGIT = (load_digits().images[8] * 15).astype(np.uint8)[..., None]
IMAGES = {'photo': PHOTO, 'tall': PHOTO[:, :17], 'digit': DIGIT}
ENHANCE = {
    'color': ImageEnhance.Color,
    'contrast': ImageEnhance.Contrast,
    'brightness': ImageEnhance.Brightness,
    'sharpness': ImageEnhance.Sharpness,
}


def reference(picture, name, sign, magnitude):
    """The operation in Pillow, with torchvision's ranges."""
    strength = magnitude / 30
    width, height = picture.size
    affine = lambda *data: picture.transform(picture.size, Image.Transform.AFFINE, data, Image.Resampling.NEAREST)  # noqa: E731
    if name in ENHANCE:
        return ENHANCE[name](picture).enhance(round((1 + sign * 0.9 * strength) * 1024) / 1024)
    return {
        'identity': lambda: picture,
        'autocontrast': lambda: ImageOps.autocontrast(picture),
        'equalize': lambda: ImageOps.equalize(picture),
        'solarize': lambda: ImageOps.solarize(picture, round(256 - 256 * strength)),
        'posterize': lambda: ImageOps.posterize(picture, 8 - round(4 * strength)),
        'rotate': lambda: picture.rotate(30 * strength * sign, Image.Resampling.NEAREST),
        'shear_x': lambda: affine(1, 0.3 * strength * sign, 0, 0, 1, 0),
        'shear_y': lambda: affine(1, 0, 0, 0.3 * strength * sign, 1, 0),
        'translate_x': lambda: affine(1, 0, int(150 / 331 * width * strength) * sign, 0, 1, 0),
        'translate_y': lambda: affine(1, 0, 0, 0, 1, int(150 / 331 * height * strength) * sign),
    }[name]()


APPLY = jax.jit(randaugment._apply, static_argnums=3)
EVERY = np.repeat(np.arange(len(OPERATIONS)), 2)  # each operation with both signs
SIGNS = np.tile([0, 1], len(OPERATIONS))


def apply_every(image, magnitude):
    return np.asarray(APPLY(jnp.asarray(np.stack([image] * len(EVERY))), EVERY, SIGNS, magnitude))


@pytest.mark.parametrize(('name', 'magnitude'), [('photo', 0), ('photo', 10), ('photo', 30), ('tall', 17), ('digit', 10)])
def test_every_operation_equals_pillow(name, magnitude):
    image = IMAGES[name]
    picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    results = apply_every(image, magnitude)
    assert results.dtype == np.uint8
    for result, operation, sign in zip(results, EVERY, SIGNS, strict=True):
        expected = np.asarray(reference(picture, OPERATIONS[operation], 2 * sign - 1, magnitude)).reshape(image.shape)
        # enhancement and autocontrast: Pillow truncates where we round; everything else is exact
        allowed = 1 if OPERATIONS[operation] in (*ENHANCE, 'autocontrast') else 0
        difference = np.abs(result.astype(int) - expected.astype(int))
        assert difference.max() <= allowed, (OPERATIONS[operation], sign)


def test_magnitude_zero_changes_nothing_but_the_histogram():
    image = np.where(PHOTO > 250, 255, PHOTO)
    changed = {
        OPERATIONS[i] for i, result in zip(EVERY, apply_every(image, 0), strict=True) if not np.array_equal(result, image)
    }
    assert changed <= {'autocontrast', 'equalize'}


def test_greatest_magnitude_of_every_operation_does_something():
    image = PHOTO // 2 + 20
    unchanged = [
        OPERATIONS[i] for i, result in zip(EVERY, apply_every(image, 30), strict=True) if np.array_equal(result, image)
    ]
    assert unchanged == ['identity', 'identity']


def test_draws_are_uniform_and_independent():
    operations, signs = (np.asarray(x) for x in randaugment._draw(jax.random.split(jax.random.key(3), 8000), 2))
    assert operations.shape == signs.shape == (8000, 2)
    cells = operations[:, 0] * 28 + operations[:, 1] * 2 + signs[:, 1]
    counts = np.bincount(cells, minlength=14 * 28)
    assert len(counts) == 14 * 28
    expected, free = 8000 / len(counts), len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < free + 5 * np.sqrt(2 * free)
    assert abs(signs[:, 0].mean() - 0.5) < 5 * 0.5 / np.sqrt(8000)


def test_layers_are_applied_one_after_the_other_also_to_float_images():
    keys = jax.random.split(jax.random.key(4), len(EVERY))
    images = jnp.asarray(np.stack([PHOTO] * len(EVERY)))
    operations, signs = randaugment._draw(keys, 2)
    expected = images
    for layer in range(2):
        expected = APPLY(expected, operations[:, layer], signs[:, layer], 10)
    result = jax.jit(randaugment.randaugment(num_layers=2, magnitude=10))(keys, {'image': images.astype(jnp.float32)})
    assert result['image'].dtype == jnp.float32
    np.testing.assert_array_equal(result['image'], expected)
