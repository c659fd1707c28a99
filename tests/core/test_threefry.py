"""Our hash gives the numbers of jax' own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import rng, threefry
from research.data.augment import chain, cutout, flip, pad_crop, random_erasing
from research.data.colour import colour_jitter
from research.data.crops import random_resized_crop
from research.data.mixing import cutmix, mixup
from research.data.randaugment import randaugment

DRAWS = {
    'bits of 8': lambda key: jax.random.bits(key, (5, 3), jnp.uint8),
    'bits of 16': lambda key: jax.random.bits(key, (7,), jnp.uint16),
    'bits of 32': lambda key: jax.random.bits(key, (), jnp.uint32),
    'none': lambda key: jax.random.bits(key, (0, 4)),
    'uniform': lambda key: jax.random.uniform(key, (2, 9)),
    'normal': lambda key: jax.random.normal(key, (33,)),
    'bernoulli': lambda key: jax.random.bernoulli(key, 0.3, (64,)),
    'integers': lambda key: jax.random.randint(key, (2,), 0, 9),
    'permutation': lambda key: jax.random.permutation(key, 50),
    'choice': lambda key: jax.random.choice(key, 40, (11,), replace=False),
    'beta': lambda key: jax.random.beta(key, 0.4, 0.4, (3,)),
    'split': lambda key: jax.random.uniform(jax.random.split(key, 3)[2]),
    'fold in': lambda key: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, 7), 2**31 - 1)),
}


@pytest.mark.parametrize('draw', DRAWS.values(), ids=DRAWS)
def test_the_numbers_are_those_of_jax(draw):
    keys = jax.random.split(jax.random.key(3), 6)
    want = jax.jit(jax.vmap(draw))(keys)
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda key: draw(threefry.straight(key))))(keys), want)
    np.testing.assert_array_equal(draw(threefry.straight(keys[2])), want[2])


def test_64_bits_are_those_of_jax():
    with jax.enable_x64(True):
        key = jax.random.key(11)
        want = jax.random.bits(key, (5,), jnp.uint64)
        np.testing.assert_array_equal(jax.random.bits(threefry.straight(key), (5,), jnp.uint64), want)


@pytest.mark.parametrize('seed', [0, 1, 42, 2**31, 2**32 - 1, 2**32, -1])
@pytest.mark.parametrize('traced', [False, True])
def test_an_address_is_what_jax_folds(seed, traced):
    def words(step):
        return jax.random.key_data(rng.key(seed, 'a name', step))

    plain = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0xCCCCF342), 5)
    np.testing.assert_array_equal((jax.jit(words) if traced else words)(5), jax.random.key_data(plain))


AUGMENTATIONS = {
    'flip': flip(),
    'pad_crop': pad_crop(),
    'cutout': cutout(),
    'random_erasing': random_erasing(),
    'colour_jitter': colour_jitter(),
    'mixup': mixup(),
    'cutmix': cutmix(),
    'randaugment': randaugment(),
    'random_resized_crop': random_resized_crop(),
}
MAKERS = {
    'example_keys': lambda keys: rng.example_keys(keys[0], jnp.arange(4), jnp.arange(4)),
    'fold_each': lambda keys: rng.fold_each(keys, 7),
    'split_each': lambda keys: rng.split_each(keys, 3),
}


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_an_augmentation_hashes_without_a_loop(name, monkeypatch):
    """No hash in its program is a loop, and what it makes is what it makes of jax' own keys."""

    def augmented(ids):
        images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
        batch = {'image': jnp.asarray(images), 'target': jnp.eye(4), 'label': ids, 'mask': jnp.ones(4)}
        keys = rng.example_keys(rng.key(0, 'augment'), ids, ids)
        return chain([AUGMENTATIONS[name]])(keys, batch)

    found, loops = ran(augmented)
    with monkeypatch.context() as patch:
        patch.setattr(threefry.jax, 'default_backend', lambda: 'gpu')
        want, loops_of_jax = ran(augmented)
    for key, value in want.items():
        np.testing.assert_array_equal(found[key], value, key)
    assert loops_of_jax > 0
    assert loops == 0


def ran(function):
    """What `function` makes of the numbers 0 to 3, and the hashes that are loops in its program."""
    jax.clear_caches()
    lowered = jax.jit(lambda ids: function(ids)).lower(jnp.arange(4))
    return lowered.compile()(jnp.arange(4)), lowered.as_text().count('threefry')


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
def test_keys_that_are_handed_out_are_such_as_jax_knows(make):
    keys = make(jax.random.split(jax.random.key(0), 4)).ravel()
    assert keys.dtype == jax.random.key(0).dtype
    jax.vmap(lambda key: jax.random.poisson(key, 3.0))(keys)  # refuses what is not threefry
    assert jnp.concatenate([keys, jax.random.split(jax.random.key(1), 2)]).shape == (len(keys) + 2,)
    with jax.threefry_partitionable(False):
        jax.vmap(lambda key: jax.random.uniform(key, (3,)))(keys)


@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize('partitionable', [True, False])
@pytest.mark.parametrize('kind', ['threefry2x32', 'rbg', 'unsafe_rbg'])
def test_keys_are_what_jax_makes_of_keys_of_any_kind(kind, partitionable, make, monkeypatch):
    with jax.threefry_partitionable(partitionable):
        keys = jax.random.split(jax.random.key(0, impl=kind), 4)
        found = make(keys)
        monkeypatch.setattr(threefry, 'straight', lambda key: key)
        want = make(keys)
        assert found.dtype == want.dtype == keys.dtype
        np.testing.assert_array_equal(jax.random.key_data(found), jax.random.key_data(want))
        draw = jax.vmap(lambda key: jax.random.uniform(key, (5,)))
        np.testing.assert_array_equal(draw(found.ravel()), draw(want.ravel()))


@pytest.mark.parametrize('setting', [('jax_default_prng_impl', 'rbg'), ('jax_random_seed_offset', 3)])
def test_an_address_follows_the_settings_of_jax(setting):
    name, value = setting
    before = getattr(jax.config, name)
    try:
        jax.config.update(name, value)
        found, want = rng.key(42, 'a name'), jax.random.fold_in(jax.random.key(42), 0xCCCCF342)
        assert found.dtype == want.dtype
        np.testing.assert_array_equal(jax.random.key_data(found), jax.random.key_data(want))
    finally:
        jax.config.update(name, before)
