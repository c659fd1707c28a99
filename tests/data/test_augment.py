import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_sample_image

from research.core import registry, rng
from research.data import augment

MIXING = ('mixup', 'cutmix')
SPECS = (
    'flip(probability=0.5)',
    'pad_crop(padding=3)',
    "pad_crop(padding=3, mode='reflect')",
    'cutout(size=5, fill=7)',
    'random_erasing(probability=0.8)',
    "random_erasing(probability=0.8, fill='zero')",
    'colour_jitter(hue=0.2)',
    'randaugment(num_layers=2, magnitude=12)',
    'mixup(probability=0.7)',
    'cutmix(probability=0.7)',
    'normalise(mean=0.4, std=0.25)',
    "views(strong=('cutout(size=5)',))",
    'random_resized_crop(area=(0.2, 0.8))',
    'centre_crop(size=8)',
)
COLLECTIVES = ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter')


@functools.cache
def photo_patches(count=16, height=11, width=14):
    photo = load_sample_image('flower.jpg')[::2, ::2]
    corners = np.random.default_rng(0).integers(0, [photo.shape[0] - height, photo.shape[1] - width], (count, 2))
    patches = np.stack([photo[y : y + height, x : x + width] for y, x in corners])
    patches[0], patches[1] = 0, 255
    return patches


def batch_of(images):
    count = len(images)
    return {
        'image': jnp.asarray(images),
        'label': jnp.arange(count, dtype=jnp.int32) % 10,
        'mask': jnp.ones(count).at[3].set(0),
        'id': jnp.arange(count, dtype=jnp.int32) * 7 + 3,
        'epoch': jnp.full(count, 2, jnp.int32),
    }


def keys_of(batch, name='augment'):
    return rng.example_keys(rng.key(1, name), batch['id'], batch['epoch'])


def many_keys(count=4000):
    return jax.random.split(jax.random.key(5), count)


def build(spec):
    return registry.component('augmentation', spec, 'augmentation').build()


def assert_same(a, b):
    # Bit for bit where images stay uint8; float32 arithmetic may be fused differently: a few units in the last place.
    assert a.keys() == b.keys()
    for key in a:
        if a[key].dtype == jnp.float32:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-6, atol=1e-6 * np.abs(b[key]).max())
        else:
            np.testing.assert_array_equal(a[key], b[key])


def test_every_registered_augmentation_is_covered_here():
    assert {spec.split('(')[0] for spec in SPECS} == set(registry.TABLES['augmentation'])


@functools.cache
def compiled_on_eight_devices(spec):
    assert len(jax.devices()) == 8
    sharding = NamedSharding(Mesh(jax.devices(), ('data',)), PartitionSpec('data'))
    batch = batch_of(photo_patches())
    placed = jax.device_put((keys_of(batch), batch), sharding)
    compiled = jax.jit(build(spec)).lower(*placed).compile()
    return compiled, lambda keys, batch: compiled(*jax.device_put((keys, batch), sharding))


# without jit each operation is compiled by itself, and these have many
MANY_OPERATIONS = ('randaugment', 'random_erasing', 'random_resized_crop', 'colour_jitter', 'mixup')
SLOW = [pytest.param(spec, marks=pytest.mark.slow) if spec.startswith(MANY_OPERATIONS) else spec for spec in SPECS]


@pytest.mark.parametrize('spec', SLOW)
def test_jitted_on_eight_devices_equals_plain_calls_on_one(spec):
    batch = batch_of(photo_patches())
    plain = build(spec)(keys_of(batch), batch)
    assert_same(compiled_on_eight_devices(spec)[1](keys_of(batch), batch), plain)


@pytest.mark.parametrize('spec', SPECS)
def test_devices_need_not_talk(spec):
    text = compiled_on_eight_devices(spec)[0].as_text()
    assert not [name for name in COLLECTIVES if name in text]


@pytest.mark.parametrize('spec', SPECS)
def test_the_place_in_the_batch_does_not_matter(spec):
    batch, apply = batch_of(photo_patches()), compiled_on_eight_devices(spec)[1]
    keys = keys_of(batch)
    result = apply(keys, batch)
    changed = 'strong' if spec.startswith('views') else 'image'
    assert result[changed].shape == (batch['image'].shape if spec != 'centre_crop(size=8)' else (16, 8, 8, 3))
    assert not np.array_equal(result[changed], batch['image'])
    order = np.random.default_rng(1).permutation(16)
    if spec.split('(')[0] in MIXING:  # pairs stay together, here exchanged within
        order = (2 * np.random.default_rng(1).permutation(8)[:, None] + [1, 0]).reshape(-1)
    permuted = apply(keys[order], jax.tree.map(lambda x: x[order], batch))
    assert_same(permuted, jax.tree.map(lambda x: x[order], result))


@pytest.mark.parametrize('spec', [SPECS[i] for i in (0, 1, 3, 6)])
def test_dtype_is_kept_and_float_images_get_the_same(spec):
    batch = batch_of(photo_patches())
    result = compiled_on_eight_devices(spec)[1](keys_of(batch), batch)['image']
    assert result.dtype == jnp.uint8
    as_float = jax.jit(build(spec))(keys_of(batch), batch | {'image': batch['image'].astype(jnp.float32)})['image']
    assert as_float.dtype == jnp.float32
    np.testing.assert_array_equal(as_float, result)


def test_another_epoch_is_another_draw():
    batch, apply = batch_of(photo_patches()), compiled_on_eight_devices(SPECS[1])[1]
    first = apply(keys_of(batch), batch)['image']
    assert not np.array_equal(first, apply(keys_of(batch | {'epoch': batch['epoch'] + 1}), batch)['image'])


def test_flip_is_numpy_flip_of_the_chosen():
    images, chosen = photo_patches(), np.arange(16) % 3 == 0
    expected = np.stack([np.fliplr(image) if c else image for image, c in zip(images, chosen, strict=True)])
    for form in (augment._flip, augment._flip_by_index, augment._flip_by_choice):  # by platform, on a CPU, elsewhere
        np.testing.assert_array_equal(form(jnp.asarray(images), jnp.asarray(chosen)), expected)


@pytest.mark.parametrize('probability', [0.0, 0.3, 1.0])
def test_chosen_with_probability(probability):
    chosen = np.asarray(augment.draw_chosen(many_keys(), probability))
    assert abs(chosen.mean() - probability) <= 4 * np.sqrt(probability * (1 - probability) / len(chosen))


@pytest.mark.parametrize(('probability', 'expected'), [(0.0, photo_patches()), (1.0, photo_patches()[:, :, ::-1])])
def test_flip_never_and_always(probability, expected):
    batch = batch_of(photo_patches())
    np.testing.assert_array_equal(augment.flip(probability=probability)(keys_of(batch), batch)['image'], expected)


@pytest.mark.parametrize('mode', ['constant', 'reflect'])
@pytest.mark.parametrize('padding', [0, 4, 10])
def test_crop_is_numpy_pad_and_slice(mode, padding):
    images = photo_patches()
    offsets = np.random.default_rng(2).integers(0, 2 * padding + 1, (16, 2))
    offsets[0], offsets[1] = 0, 2 * padding
    expected = []
    for image, (top, left) in zip(images, offsets, strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode)
        expected.append(padded[top : top + image.shape[0], left : left + image.shape[1]])
    result = augment._crop(jnp.asarray(images), jnp.asarray(offsets), padding, mode)
    assert result.dtype == jnp.uint8
    np.testing.assert_array_equal(result, np.stack(expected))


def test_crop_offsets_are_uniform_and_independent():
    offsets = np.asarray(augment._crop_offsets(many_keys(), 4))
    counts = np.zeros((9, 9))
    np.add.at(counts, tuple(offsets.T), 1)  # fails if one lies outside 0..8
    expected = len(offsets) / 81
    assert ((counts - expected) ** 2 / expected).sum() < 80 + 5 * np.sqrt(2 * 80)  # chi-square: mean 80, variance 160


@pytest.mark.parametrize('size', [1, 4, 5, 40])
def test_cutout_is_a_clipped_square(size):
    images = photo_patches()
    centres = np.random.default_rng(3).integers(0, images.shape[1:3], (16, 2))
    centres[0], centres[1] = 0, np.array(images.shape[1:3]) - 1
    expected = images.copy()
    for image, (y, x) in zip(expected, centres, strict=True):
        top, left = y - size // 2, x - size // 2
        image[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 9
    boxes = augment.square(jnp.asarray(centres), jnp.full((16, 2), size))
    np.testing.assert_array_equal(augment._erase(jnp.asarray(images), boxes, jnp.uint8(9)), expected)


def test_cutout_on_ones_erases_one_square():
    count = 200
    batch = batch_of(np.ones((count, 9, 12, 1), np.uint8))
    erased = np.asarray(jax.jit(augment.cutout(size=3, fill=0))(keys_of(batch), batch)['image'])[..., 0] == 0
    for mask in erased:
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        assert mask.sum() == len(rows) * len(columns)
        assert len(rows) in (2, 3) and len(columns) in (2, 3)  # 2 where a border clips it


def test_centres_cover_every_pixel_evenly():
    centres = np.asarray(augment.draw_centres(many_keys(), 3, 5))
    counts = np.zeros((3, 5))
    np.add.at(counts, tuple(centres.T), 1)
    expected = len(centres) / 15
    assert ((counts - expected) ** 2 / expected).sum() < 14 + 5 * np.sqrt(2 * 14)


ERASING_BOXES = jax.jit(augment._erasing_boxes, static_argnums=range(1, 6))


def test_erasing_boxes_fit_and_follow_area_and_aspect():
    height, width = 300, 500
    boxes = np.asarray(ERASING_BOXES(many_keys(), height, width, 0.6, (0.02, 0.3333), (0.3, 3.3)))
    tops, lefts, talls, wides = boxes.T
    erased = talls > 0
    np.testing.assert_array_equal(erased, wides > 0)
    assert abs(erased.mean() - 0.6) < 4 * np.sqrt(0.24 / len(boxes))
    assert tops.min() >= 0 and lefts.min() >= 0 and (tops + talls).max() <= height and (lefts + wides).max() <= width
    talls, wides = talls[erased].astype(float), wides[erased].astype(float)
    # Sides are rounded to whole pixels, so areas and ratios hold within half a pixel on each side.
    assert np.all((talls + 0.5) * (wides + 0.5) >= 0.02 * height * width)
    assert np.all((talls - 0.5) * (wides - 0.5) <= 0.3333 * height * width)
    assert np.all((talls + 0.5) / (wides - 0.5) >= 0.3) and np.all((talls - 0.5) / (wides + 0.5) <= 3.3)
    small = talls * wides < 0.1 * height * width  # these fit at any ratio, so rejection does not bend the distribution
    logs = np.log(talls[small] / wides[small])
    bounds = np.log([0.3, 3.3])
    assert abs(logs.mean() - bounds.mean()) < 5 * (bounds[1] - bounds[0]) / np.sqrt(12 * small.sum())
    assert abs(logs.std() / ((bounds[1] - bounds[0]) / np.sqrt(12)) - 1) < 0.1


def test_erasing_leaves_what_no_rectangle_fits():
    boxes = ERASING_BOXES(many_keys(), 30, 30, 1.0, (0.9, 1.0), (3.0, 3.3))
    np.testing.assert_array_equal(boxes[:, 2:], 0)


@pytest.mark.parametrize('fill', ['random', 'zero'])
def test_erasing_changes_the_box_only(fill):
    batch = batch_of(np.full((400, 20, 30, 3), 100, np.uint8))
    result = np.asarray(jax.jit(augment.random_erasing(probability=1.0, fill=fill))(keys_of(batch), batch)['image'])
    changed = (result != 100).any(-1)
    share = changed.mean((1, 2))
    assert share.min() > 0.01 and share.max() < 0.36
    values = result[changed]
    if fill == 'zero':
        assert not values.any()
    else:
        counts = np.bincount(values.reshape(-1), minlength=256)
        assert counts.min() > 0 and abs(values.mean() - 127.5) < 1
        assert not np.array_equal(result[0][changed[0]][:5], result[1][changed[1]][:5])


def test_erasing_never():
    boxes = ERASING_BOXES(many_keys(), 300, 500, 0.0, (0.02, 0.3333), (0.3, 3.3))
    np.testing.assert_array_equal(boxes[:, 2:], 0)


def test_normalise_is_per_channel_float32():
    images, mean, std = photo_patches(), (0.1, 0.5, 0.9), (0.2, 1.0, 3.0)
    batch = batch_of(images)
    result = augment.normalise(mean=mean, std=std)(keys_of(batch), batch)['image']
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, (images / 255 - np.array(mean)) / np.array(std), rtol=1e-6, atol=1e-6)
    default = np.asarray(augment.normalise()(keys_of(batch), batch)['image'])
    assert default.min() == 0 and default.max() == 1
    table = {'features': jnp.ones((4, 3))}
    assert augment.normalise()(keys_of(batch), table) is table


def test_chain_gives_each_member_its_own_keys():
    seen = []
    spy = lambda keys, batch: seen.append(np.asarray(jax.random.key_data(keys))) or batch  # noqa: E731
    batch = batch_of(photo_patches())
    keys = keys_of(batch)
    augment.chain([spy, spy, augment.chain([spy])])(keys, batch)
    drawn = np.concatenate(seen)
    assert len(np.unique(drawn, axis=0)) == 3 * 16
    np.testing.assert_array_equal(augment.chain([])(keys, batch)['image'], batch['image'])


def test_chain_applies_in_order():
    batch = batch_of(photo_patches())
    first, second = augment.normalise(mean=0.25, std=2.0), augment.flip(probability=1.0)
    result = augment.chain([second, first])(keys_of(batch), batch)['image']
    np.testing.assert_allclose(result, (photo_patches()[:, :, ::-1] / 255 - 0.25) / 2, rtol=1e-6, atol=1e-7)
