"""Randomness, terms, files, clock."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import files, rng, terms
from research.core.clock import Clock


def bits(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_keys_are_addresses():
    assert bits(rng.key(1, 'dropout', 5)) == bits(rng.key(1, 'dropout', 5))
    addresses = [
        (1, 'dropout', 5),
        (2, 'dropout', 5),
        (1, 'augment', 5),
        (1, 'dropout', 6),
        (1, 'dropout'),
        (1, 'dropout', 5, 0),
    ]
    assert len({bits(rng.key(*a)) for a in addresses}) == len(addresses)
    assert bits(jax.jit(lambda s: rng.key(1, 'dropout', s))(5)) == bits(rng.key(1, 'dropout', 5))


def test_example_keys_follow_the_example():
    stream = rng.key(0, 'augment')
    ids, epochs = jnp.array([3, 1, 3]), jnp.array([0, 0, 1])
    keys = rng.example_keys(stream, ids, epochs)
    assert bits(keys[0]) == bits(rng.example_keys(stream, ids[::-1], jnp.array([0, 0, 0]))[0])
    assert bits(keys[0]) != bits(keys[2])


def test_fetched_terms_are_the_numbers_of_each_step():
    packs = [terms.pack({'loss': (jnp.float32(k), jnp.float32(2)), 'norm': (jnp.float32(0.1), jnp.ones(()))}) for k in range(3)]
    found = terms.fetched(packs)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found[:, 0], [[0, 2], [1, 2], [2, 2]])
    np.testing.assert_array_equal(found[:, 1], np.tile(np.float32([0.1, 1]), (3, 1)))


def test_terms_of_other_names_are_not_mixed_up():
    packs = [terms.pack({name: (jnp.ones(()), jnp.ones(())), 'loss': (jnp.ones(()), jnp.ones(()))}) for name in ('a', 'b')]
    with pytest.raises(ValueError, match=r"'a', 'loss'.*'b', 'loss'"):
        terms.fetched(packs)


def test_the_mean_of_terms_is_over_examples_not_batches():
    a = {'loss': terms.weighted(jnp.array([0.2, 0.2, 0.2]), jnp.ones(3))}
    b = {'loss': terms.weighted(jnp.array([1.0, 9.0]), jnp.array([1.0, 0.0]))}
    np.testing.assert_allclose(terms.mean(terms.add(a, b)['loss']), 0.4, rtol=1e-6)


def test_a_masked_value_is_not_looked_at():
    total, weight = terms.weighted(jnp.array([1.0, jnp.nan, jnp.inf]), jnp.array([2.0, 0.0, 0.0]))
    assert (float(total), float(weight)) == (2.0, 2.0)
    assert np.isnan(terms.mean(terms.weighted(jnp.ones(2), jnp.zeros(2))))


def test_json_lines_leave_out_a_torn_line(tmp_path):
    path = tmp_path / 'x.jsonl'
    path.write_text(files.json_line({'a': 1}) + files.json_line({'a': float('nan')}) + '{"a": 3')
    assert list(files.read_json_lines(path)) == [{'a': 1}, {'a': None}]


def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / 'x.json'
    files.write_json(path, {'a': [1, float('inf')]})
    assert json.loads(path.read_text()) == {'a': [1, None]}
    with pytest.raises(TypeError):
        files.write_json(path, {'a': object()})
    assert json.loads(path.read_text()) == {'a': [1, None]}
    assert [p.name for p in tmp_path.iterdir()] == ['x.json']


def test_digests_know_the_borders_of_parts():
    assert files.digest(['ab', 'c']) != files.digest(['a', 'bc'])
    assert files.digest(['ab', b'c']) == files.digest([b'ab', 'c'])


def test_the_clock_counts_a_nested_phase_once():
    clock = Clock()
    start = time.monotonic()
    with clock.phase('train'):
        time.sleep(0.02)
        with clock.phase('evaluate'):
            time.sleep(0.03)
    wall = time.monotonic() - start
    assert 0.02 <= clock.seconds['train'] < 0.03 + wall - 0.05
    assert clock.seconds['evaluate'] >= 0.03
    assert abs(clock.total() - wall) < 0.002
    clock.add({'train': 100.0})
    assert clock.snapshot()['train'] > 100
