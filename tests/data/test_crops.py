"""Crops against numpy: what is drawn, how it is scaled, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from research.core import registry
from research.core.errors import UsageError
from research.data import crops


def photo(height=40, width=60):
    return load_sample_image('china.jpg')[100 : 100 + height, 200 : 200 + width]  # (H, W, 3) uint8


def keys(count=500):
    return jax.random.split(jax.random.key(0), count)


@functools.cache
def boxes():
    """(top, left, height, width) of many draws from an image of 40 x 60."""
    return np.asarray(jax.jit(lambda k: crops._draw_boxes(k, 40, 60, (0.1, 0.6), (0.5, 2.0)))(keys()))


def test_parts_lie_inside_and_have_the_area_and_aspect_asked_for():
    top, left, height, width = boxes().T
    assert min(top.min(), left.min()) >= 0 and (top + height).max() <= 40 + 1e-3 and (left + width).max() <= 60 + 1e-3
    fits = (height < 40) & (width < 60)
    assert fits.mean() > 0.8
    share, aspect = height * width / 2400, height / width
    assert (share[fits] >= 0.1 - 1e-5).all() and (share <= 0.6 + 1e-5).all()
    assert (aspect[fits] >= 0.5 - 1e-5).all() and (aspect <= 2 + 1e-5).all()
    assert np.abs(np.quantile(share, [0.1, 0.5]) - [0.15, 0.35]).max() < 0.05
    assert abs(np.median(np.log(aspect))) < 0.15
    for place, room in ((top, 40 - height), (left, 60 - width)):
        assert np.abs(np.quantile((place[room > 1] / room[room > 1]), [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.1


def test_scaling_is_that_of_pillow():
    image, parts = photo(), [(4, 6, 12, 16), (0, 0, 40, 60), (10, 2, 30, 50)]
    scale = jax.jit(jax.vmap(lambda box: crops._resampled(jnp.asarray(image), box, (24, 24))))
    results = np.asarray(scale(jnp.array(parts, jnp.float32)))
    assert results.dtype == np.uint8
    for got, (top, left, height, width) in zip(results.astype(float), parts, strict=True):
        box = (left, top, left + width, top + height)
        want = np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BILINEAR, box), float)
        inner = np.s_[3:-3, 3:-3]  # near the border of the part ours looks outside it, within the image; Pillow does not
        assert np.abs(got[inner] - want[inner]).max() <= 2
        assert np.abs(got[inner] - want[inner]).mean() < 0.5


def test_the_whole_image_at_its_own_size_stays_as_it_is():
    image = photo()
    apply = jax.jit(crops.random_resized_crop(area=(1.0, 1.0), aspect=(2 / 3, 2 / 3)))
    result = apply(keys(2), {'image': jnp.asarray(image)[None].repeat(2, 0)})['image']
    assert np.abs(np.asarray(result, float) - image).max() <= 1


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_sizes_and_dtypes(dtype):
    images = jnp.asarray(photo()[None].repeat(3, 0).astype(dtype))
    batch = {'image': images, 'label': jnp.arange(3)}
    result = jax.jit(crops.random_resized_crop(size=16))(keys(3), batch)
    assert result['image'].shape == (3, 16, 16, 3) and result['image'].dtype == dtype
    assert not np.array_equal(result['image'][0], result['image'][1])
    np.testing.assert_array_equal(result['label'], batch['label'])
    cut = crops.centre_crop(size=16)(keys(3), result)
    np.testing.assert_array_equal(cut['image'], result['image'])


def test_centre_crop_is_a_slice():
    images = jnp.asarray(photo()[None])
    cut = crops.centre_crop(size=20)(keys(1), {'image': images})['image']
    np.testing.assert_array_equal(cut, np.asarray(images)[:, 10:30, 20:40])


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ('random_resized_crop(size=0)', 'random_resized_crop.size'),
        ('random_resized_crop(area=(0.5, 0.2))', 'random_resized_crop.area'),
        ('random_resized_crop(area=(0.5, 1.5))', 'random_resized_crop.area'),
        ('random_resized_crop(aspect=(2.0, 0.5))', 'random_resized_crop.aspect'),
        ('centre_crop', 'augment.size must be given'),
        ('centre_crop(size=64)', 'centre_crop.size is 64, but the images are 40 x 60'),
    ],
)
def test_mistakes(spec, message):
    with pytest.raises(UsageError, match=message):
        registry.component('augmentation', spec, 'augment').build()(keys(1), {'image': jnp.asarray(photo()[None])})
