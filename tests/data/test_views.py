"""Weak and strong views: what is shared, what is drawn apart, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from research.core import registry, rng
from research.core.errors import UsageError
from research.data import augment
from research.data.views import views

COUNT = 64


def batch_of_digits():
    images = (load_digits().images[:COUNT, :, :, None] * 15).astype(np.uint8)  # (64, 8, 8, 1)
    return {'image': jnp.asarray(images), 'label': jnp.arange(COUNT) % 10, 'mask': jnp.ones(COUNT)}


def keys(count=COUNT, epoch=0):
    return rng.example_keys(rng.key(0, 'augment'), jnp.arange(count), jnp.full(count, epoch))


def build(spec):
    return registry.component('augmentation', spec, 'augmentation').build()


def test_the_strong_view_is_added_and_the_rest_stays():
    batch = batch_of_digits()
    result = jax.jit(build("views(strong=('flip(probability=1.0)', 'cutout(size=4, fill=9)'))"))(keys(), batch)
    assert set(result) == {*batch, 'strong'}
    jax.tree.map(np.testing.assert_array_equal, {key: result[key] for key in batch}, batch)
    assert (result['strong'].shape, result['strong'].dtype) == ((COUNT, 8, 8, 1), jnp.uint8)
    mirrored = np.asarray(batch['image'])[:, :, ::-1]
    kept = np.asarray(result['strong']) == mirrored
    assert (np.asarray(result['strong'])[~kept] == 9).all()
    assert 4 <= (~kept).sum((1, 2, 3)).max() <= 16  # a square of 4 x 4, clipped by the border, where it changed a pixel


def test_the_strong_view_is_that_of_the_chain():
    batch = batch_of_digits()
    strong = ('pad_crop(padding=2)', 'cutout(size=3)')
    want = jax.jit(augment.chain([build(spec) for spec in strong]))(keys(), batch)['image']
    np.testing.assert_array_equal(jax.jit(views(strong=strong))(keys(), batch)['strong'], want)


def test_what_stands_before_is_shared_and_what_stands_behind_is_not():
    batch = batch_of_digits()
    before = augment.chain([augment.flip(probability=1.0), views(strong=('cutout(size=1, fill=9)',))])
    behind = augment.chain([views(strong=('cutout(size=1, fill=9)',)), augment.flip(probability=1.0)])
    for apply, of_strong in ((before, slice(None, None, -1)), (behind, slice(None))):
        result = jax.tree.map(np.asarray, jax.jit(apply)(keys(), batch))
        np.testing.assert_array_equal(result['image'], np.asarray(batch['image'])[:, :, ::-1])
        assert ((result['strong'] != np.asarray(batch['image'])[:, :, of_strong]).sum((1, 2, 3)) <= 1).all()


@pytest.mark.parametrize('weak', [['flip'], ['flip(probability=1.0)', 'flip']])
def test_both_views_draw_for_themselves(weak):
    """Whether the weak view is mirrored says nothing about the strong one: a 2 x 2 table with even cells."""
    count = 2000
    images = jnp.broadcast_to(jnp.array([[[1], [0]], [[1], [0]]], jnp.uint8), (count, 2, 2, 1))
    apply = augment.chain([views(strong=('flip',)), *map(build, weak)])
    result = jax.jit(apply)(keys(count), {'image': images})
    drawn = np.asarray(result['image'][:, 0, 0, 0]) * 2 + np.asarray(result['strong'][:, 0, 0, 0])
    counts = np.bincount(drawn, minlength=4)
    assert ((counts - count / 4) ** 2 / (count / 4)).sum() < 16.3  # chi-square, 3 degrees of freedom: p = 0.001
    again = jax.jit(apply)(keys(count, epoch=1), {'image': images})
    assert not np.array_equal(again['strong'], result['strong'])


def test_normalise_treats_both_views_alike():
    batch = batch_of_digits()
    seen = batch | {'strong': 255 - batch['image']}
    result = augment.normalise(mean=0.25, std=0.5)(keys(), seen)
    for key in ('image', 'strong'):
        assert result[key].dtype == jnp.float32
        np.testing.assert_allclose(result[key], (np.asarray(seen[key]) / 255 - 0.25) / 0.5, rtol=1e-6, atol=1e-6)
    assert 'strong' not in augment.normalise()(keys(), batch)
    with pytest.raises(UsageError, match="augmentation needs 'strong'"):
        augment.normalise()(keys(), batch | {'strong': jnp.ones(3)})


def test_a_config_spells_it_as_one_string():
    component = registry.component('augmentation', "views(strong=('randaugment(magnitude=10)', 'cutout'))", 'augment')
    assert component.arguments == {'strong': ('randaugment(magnitude=10)', 'cutout')}
    many = registry.parse_many("views(strong=('flip', 'pad_crop(padding=2)')), flip", 'augment')
    assert [value['name'] for value in many] == ['views', 'flip']


@pytest.mark.parametrize(
    ('strong', 'message'),
    [
        ((), "views.strong names no augmentation\n  fix: for example strong=\\('randaugment'"),
        (('flip', 'randaugmnt'), "augmentation 'randaugmnt' does not exist\n  fix: did you mean 'randaugment'"),
        (('cutout(sise=3)',), r"views.strong\[0\].sise does not exist.*\n  fix: did you mean 'size'"),
        (('mixup',), "views.strong names 'mixup'\n  fix: leave it out: it mixes labels"),
        (('cutmix(alpha=0.5)',), "views.strong names 'cutmix'"),
        (('normalise',), "names 'normalise'\n  fix: leave it out: config.data.preprocess treats both views"),
        (('views',), "names 'views'"),
    ],
)
def test_mistakes(strong, message):
    with pytest.raises(UsageError, match=message):
        views(strong=strong)


def test_data_without_images_are_refused():
    with pytest.raises(UsageError, match="augmentation needs 'image'"):
        views(strong=('flip',))(keys(), {'tokens': jnp.ones((COUNT, 3))})
