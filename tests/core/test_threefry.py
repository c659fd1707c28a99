"""Our hash gives the numbers of jax' own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import rng, threefry

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


def test_keys_of_examples_take_no_loop():
    def draws(ids):
        keys = rng.example_keys(rng.key(0, 'augment'), ids, ids)
        return jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 9))(keys)

    text = jax.jit(draws).lower(jnp.arange(32)).compile().as_text()
    assert 'while' not in text
