import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_digits, load_sample_image

from research.core.errors import UsageError
from research.data import colour

FACTORS = (0, 102, 500, 1024, 1100, 1946, 3000)


def images():
    photo = load_sample_image('china.jpg')
    noise = np.random.default_rng(0).integers(0, 256, (13, 21, 3)).astype(np.uint8)
    dim = (noise // 4 + 40).astype(np.uint8)
    digit = (load_digits().images[3] * 15).astype(np.uint8)[..., None]
    # few shapes, so that few compilations
    return {
        'photo': photo[::7, ::5],
        'noise': noise,
        'dim': dim,
        'digit': digit,
        'black': np.zeros((13, 21, 3), np.uint8),
        'white': np.full((8, 8, 1), 255, np.uint8),
        'extremes': np.where(noise > 127, 255, 0).astype(np.uint8),
        'row': noise[:1],
        'grey': np.repeat(noise[..., :1], 3, axis=2),
    }


IMAGES = images()
HUE, AUTOCONTRAST, EQUALIZE = jax.jit(jax.vmap(colour.hue, (None, 0))), jax.jit(colour.autocontrast), jax.jit(colour.equalize)
every_image = pytest.mark.parametrize('name', IMAGES)


def pillow(image):
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def levels_of(picture):
    array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array


def assert_within_one_level(result, picture):
    assert result.dtype == jnp.uint8
    difference = np.asarray(result).astype(int) - levels_of(picture).astype(int)
    assert np.abs(difference).max() <= 1  # Pillow truncates where we round


def reference_grey(image):
    weights = np.array([0.299, 0.587, 0.114])
    return image[..., :1].astype(float) if image.shape[2] == 1 else np.rint(image @ weights)[..., None]


def reference_blend(degenerate, image, factor):
    # float64 holds multiples of 1 / 1024 exactly; rint rounds half to even
    return np.rint(np.clip(degenerate + factor / 1024 * (image - degenerate), 0, 255)).astype(np.uint8)


def reference_brightness(image, factor):
    return reference_blend(0.0, image, factor)


def reference_contrast(image, factor):
    return reference_blend(np.rint(reference_grey(image).mean()), image, factor)


def reference_saturation(image, factor):
    return reference_blend(reference_grey(image), image, factor)


def reference_sharpness(image, factor):
    smooth = image.astype(float)
    for y in range(1, image.shape[0] - 1):
        for x in range(1, image.shape[1] - 1):
            around = image[y - 1 : y + 2, x - 1 : x + 2].astype(float)
            smooth[y, x] = np.rint((around.sum((0, 1)) + 4 * around[1, 1]) / 13)
    return reference_blend(smooth, image, factor)


BLENDS = {
    'brightness': (jax.jit(jax.vmap(colour.brightness, (None, 0))), reference_brightness, ImageEnhance.Brightness),
    'contrast': (jax.jit(jax.vmap(colour.contrast, (None, 0))), reference_contrast, ImageEnhance.Contrast),
    'saturation': (jax.jit(jax.vmap(colour.saturation, (None, 0))), reference_saturation, ImageEnhance.Color),
    'sharpness': (jax.jit(jax.vmap(colour.sharpness, (None, 0))), reference_sharpness, ImageEnhance.Sharpness),
}


@every_image
@pytest.mark.parametrize('operation', BLENDS)
def test_blends_equal_numpy_and_pillow(operation, name):
    function, reference, enhance = BLENDS[operation]
    image = IMAGES[name]
    batched = function(jnp.asarray(image), jnp.array(FACTORS))
    for factor, result in zip(FACTORS, batched, strict=True):
        np.testing.assert_array_equal(result, reference(image, factor))
        assert_within_one_level(result, enhance(pillow(image)).enhance(factor / 1024))


@pytest.mark.parametrize('size', [(40, 40), (427, 640), (640, 100)])
def test_contrast_zero_is_the_mean_of_the_grey_image_at_any_size(size):
    image = np.resize(load_sample_image('china.jpg'), (*size, 3))
    mean = (image @ np.array([0.299, 0.587, 0.114])).mean()
    result = np.unique(jax.jit(colour.contrast)(image, 0))
    assert len(result) == 1 and abs(result[0] - mean) < 0.5 + 0.1  # 0.1: the grey levels are rounded before the mean


@every_image
def test_autocontrast_and_equalize_equal_pillow(name):
    image = IMAGES[name]
    assert_within_one_level(AUTOCONTRAST(image), ImageOps.autocontrast(pillow(image)))
    np.testing.assert_array_equal(EQUALIZE(image), levels_of(ImageOps.equalize(pillow(image))))


@every_image
def test_autocontrast_is_exact(name):
    image = IMAGES[name].astype(float)
    least, greatest = image.min((0, 1)), image.max((0, 1))
    stretched = np.rint((image - least) * 255 / np.maximum(greatest - least, 1))
    np.testing.assert_array_equal(AUTOCONTRAST(IMAGES[name]), np.where(greatest > least, stretched, image).astype(np.uint8))


@every_image
def test_posterize_and_solarize_equal_pillow(name):
    image = jnp.asarray(IMAGES[name])
    for bits in range(1, 9):
        np.testing.assert_array_equal(colour.posterize(image, bits), levels_of(ImageOps.posterize(pillow(IMAGES[name]), bits)))
    for threshold in (0, 1, 128, 255, 256):
        result = colour.solarize(image, threshold)
        assert result.dtype == jnp.uint8
        np.testing.assert_array_equal(result, levels_of(ImageOps.solarize(pillow(IMAGES[name]), threshold)))


def reference_hue(image, shift):
    result = np.empty(image.shape)
    for position in np.ndindex(image.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(image[position] / 255))
        result[position] = colorsys.hsv_to_rgb((h + shift / 6144) % 1, s, v)
    return result * 255


@pytest.mark.parametrize('name', [name for name in IMAGES if IMAGES[name].shape[2] == 3 and name != 'photo'])
def test_hue_equals_colorsys(name):
    shifts = (-3072, -1000, -1, 0, 5, 1024, 2048, 3072)
    batched = HUE(jnp.asarray(IMAGES[name]), jnp.array(shifts))
    for shift, result in zip(shifts, batched, strict=True):
        assert result.dtype == jnp.uint8
        # nearest level to the exact value: half a level, plus float64 rounding at ties
        assert np.abs(np.asarray(result) - reference_hue(IMAGES[name], shift)).max() <= 0.5 + 1e-9
    np.testing.assert_array_equal(batched[3], IMAGES[name])


def test_hue_turns_red_into_green_into_blue():
    red = jnp.array([[[255, 0, 0]]], jnp.uint8)
    green = colour.hue(red, 2048)
    np.testing.assert_array_equal(green, [[[0, 255, 0]]])
    np.testing.assert_array_equal(colour.hue(green, 2048), [[[0, 0, 255]]])


@pytest.mark.parametrize('denominator', [1, 2, 13, 255, 1024])
def test_division_rounds_half_to_even(denominator):
    numerator = np.arange(0, 5000)
    result = colour.divide_to_even(jnp.asarray(numerator), denominator)
    np.testing.assert_array_equal(result, np.rint(numerator / denominator).astype(int))


def test_float_images_are_rounded_and_clipped():
    levels = colour.levels(jnp.array([-3.0, 0.5, 1.5, 254.6, 300.0]))
    np.testing.assert_array_equal(levels, np.array([0, 0, 2, 255, 255], np.uint8))


def test_amounts_have_torchvisions_ranges():
    keys = jax.random.split(jax.random.key(0), 20000)
    amounts = np.asarray(colour._jitter_amounts(keys, 0.4, 0.0, 1.5, 0.25))
    low, high = np.array([0.6, 1, 0, -0.25]), np.array([1.4, 1, 2.5, 0.25])
    unit = np.array([1024, 1024, 1024, 6144])
    assert np.abs(amounts.min(0) / unit - low).max() < 0.002 and np.abs(amounts.max(0) / unit - high).max() < 0.002
    spread = (high - low) * unit
    assert np.all(np.abs(amounts.mean(0) - (low + high) / 2 * unit) <= 5 * spread / np.sqrt(12 * len(keys)))
    correlation = np.corrcoef(amounts[:, [0, 2, 3]].T) - np.eye(3)
    assert np.abs(correlation).max() < 0.04  # the properties are drawn independently: 5 / sqrt(20000)


@pytest.mark.parametrize('name', ['noise', 'dim', 'digit'])
def test_jitter_is_the_operations_in_order(name):
    image, amounts = IMAGES[name], (1300, 700, 1500, 0)
    jitter = jax.jit(colour._jitter)
    expected = reference_saturation(reference_contrast(reference_brightness(image, 1300), 700), 1500)
    np.testing.assert_array_equal(jitter(image, jnp.array(amounts)), expected)
    if image.shape[2] == 3:
        turned = jitter(image, jnp.array((1300, 700, 1500, 777)))
        assert np.abs(np.asarray(turned) - reference_hue(expected, 777)).max() <= 0.5 + 1e-9


def test_jitter_of_nothing_is_the_identity():
    batch = {'image': jnp.asarray(IMAGES['noise'])[None]}
    still = colour.colour_jitter(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    np.testing.assert_array_equal(jax.jit(still)(jax.random.split(jax.random.key(0), 1), batch)['image'], batch['image'])


def test_one_channel_has_no_colour():
    digit = jnp.asarray(IMAGES['digit'])
    np.testing.assert_array_equal(colour.saturation(digit, 0), digit)
    np.testing.assert_array_equal(colour.hue(digit, 1000), digit)


def test_four_channels_are_refused():
    batch = {'image': jnp.zeros((1, 4, 4, 4), jnp.uint8)}
    with pytest.raises(UsageError, match='have 4 channels'):
        jax.eval_shape(colour.colour_jitter(), jax.random.split(jax.random.key(0), 1), batch)
