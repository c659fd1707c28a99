import jax
import jax.numpy as jnp
import pytest

from research.core import registry
from research.core.errors import UsageError
from research.data import augment


def keys(count):
    return jax.random.split(jax.random.key(0), count)


@pytest.mark.parametrize(
    ('spec', 'words'),
    [
        ('flip(probability=1.5)', 'flip.probability is 1.5'),
        ('pad_crop(padding=-1)', 'pad_crop.padding is -1'),
        ("pad_crop(mode='edge')", 'constant, reflect'),
        ("pad_crop(padding=11, mode='reflect')", 'at most 10'),
        ('cutout(size=0)', 'cutout.size'),
        ('cutout(fill=256)', 'between 0 and 255'),
        ('random_erasing(area=(0.5, 0.2))', 'random_erasing.area'),
        ('random_erasing(aspect=(0.5,))', 'random_erasing.aspect'),
        ("random_erasing(fill='mean')", 'random, zero'),
        ('normalise(std=0.0)', 'normalise.std'),
        ('normalise(mean=(0.5, 0.5))', '3 channels'),
        ('colour_jitter(hue=0.6)', 'between 0 and 0.5'),
        ('colour_jitter(contrast=-0.1)', 'colour_jitter.contrast'),
        ('randaugment(magnitude=31)', 'between 0 and 30'),
        ('randaugment(num_layers=0)', 'at least 1'),
        ('mixup(alpha=0.0)', 'mixup.alpha'),
        ('cutmix(probability=-1.0)', 'cutmix.probability'),
    ],
)
def test_mistakes_are_named(spec, words):
    batch = {'image': jnp.zeros((16, 11, 14, 3), jnp.uint8), 'mask': jnp.ones(16), 'label': jnp.zeros(16)}
    with pytest.raises(UsageError, match='fix: ') as error:
        jax.eval_shape(registry.component('augmentation', spec, 'augmentation').build(), keys(16), batch)
    assert words in str(error.value)


def test_data_without_images_is_refused():
    batch = {'feature': jnp.ones((4, 3))}
    with pytest.raises(UsageError, match="needs 'image'"):
        augment.flip()(keys(4), batch)
