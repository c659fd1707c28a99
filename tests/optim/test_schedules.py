"""Schedules at their boundaries, against optax and float64 formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.errors import UsageError
from research.optim import schedules

SHAPES = {
    'constant': {},
    'inverse_time': {'beta': 0.5},
    'cosine': {'final': 0.1},
    'linear': {'final': 0.1},
    'polynomial': {'power': 2.0, 'final': 0.1},
    'step': {'at': (0.5, 0.75)},
    'rsqrt': {'timescale': 7},
    'warmup_stable_decay': {'decay': 0.3, 'shape': '1-sqrt', 'final': 0.05},
    'one_cycle': {},
}
FALLING = [name for name in SHAPES if name != 'one_cycle']
TOTAL = 40
ULP = float(np.finfo(np.float32).eps)


def make(name, total=TOTAL, **arguments):
    return getattr(schedules, name)(total, **(SHAPES[name] | arguments))


def values(schedule, steps, run=lambda function: function):
    """The schedule at `steps`, float64; padded to few lengths, so that jax's own operations compile only once."""
    padded = np.resize(np.asarray(steps, np.int32), 64 if len(steps) <= 64 else 4096)
    return np.array(run(jax.vmap(schedule))(padded), np.float64)[: len(steps)]


def test_a_long_run_keeps_its_precision():
    total = 3_000_001
    t = np.array([1, total // 2, total - 2, total - 1, total])
    left = (total - t) / total
    np.testing.assert_allclose(values(schedules.cosine(total), t), np.sin(np.pi / 2 * left) ** 2, rtol=8 * ULP)
    np.testing.assert_allclose(values(schedules.linear(total), t), left, rtol=8 * ULP)
    np.testing.assert_allclose(values(schedules.polynomial(total, power=0.5), t), left**0.5, rtol=8 * ULP)


def close(ours, reference):
    """Eight float32 roundings of numbers up to 1; cos is the least exact of them."""
    np.testing.assert_allclose(ours, np.asarray(reference, np.float64), rtol=0, atol=8 * ULP)


@pytest.mark.parametrize('name', FALLING)
@pytest.mark.parametrize('total', [1, 2, 7, TOTAL])
def test_starts_at_one_and_only_falls(name, total):
    found = values(make(name, total), np.arange(total + 5))
    assert found[0] == 1
    assert (np.diff(found) <= ULP).all()
    assert (found >= 0).all()


@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('total', [1, 2, 41, 1701])
def test_stays_at_its_final_value(name, total):
    found = values(make(name, total), [total, total + 1, 10 * total, 2**31 - 1], jax.jit)
    assert (found == found[0]).all()
    final = SHAPES[name].get('final', {'one_cycle': 1e-4}.get(name))
    if final is not None:
        assert found[0] == np.float32(final)


@pytest.mark.parametrize('name', [n for n in FALLING if n not in ('constant', 'step')])
def test_the_last_step_is_not_yet_the_end(name):
    last, end = values(make(name), [TOTAL - 1, TOTAL])
    assert last > end


@pytest.mark.parametrize('name', SHAPES)
def test_no_steps_after_the_warmup_is_finite(name):
    assert np.isfinite(values(make(name, 0), [0, 1])).all()


@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('warmup', [0, 1, 5])
def test_learning_rate_at_every_boundary(name, warmup):
    peak, shape = 0.3, make(name)
    rate = schedules.learning_rate(peak, shape, warmup)
    found = values(rate, np.arange(warmup + TOTAL + 3))
    rising = peak * (np.arange(warmup) + 1) / max(warmup, 1)
    np.testing.assert_allclose(found[:warmup], rising, rtol=2 * ULP)
    np.testing.assert_allclose(found[warmup:], peak * values(shape, np.arange(TOTAL + 3)), rtol=2 * ULP)
    assert (found[: warmup + TOTAL] > 0).all()
    if warmup:
        assert found[warmup - 1] == np.float32(peak)
    if name != 'one_cycle':
        assert found[warmup] == np.float32(peak)


@pytest.mark.parametrize('name', SHAPES)
def test_float32_and_the_same_with_plain_and_traced_steps(name):
    rate = schedules.learning_rate(0.3, make(name), 3)
    compiled = jax.jit(rate)
    for step in (0, 2, 3, TOTAL):
        plain, traced = rate(step), compiled(step)
        assert plain.dtype == traced.dtype == jnp.float32
        np.testing.assert_allclose(plain, traced, rtol=0, atol=8 * ULP)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize('seed', range(3))
def test_against_optax(seed):
    draw = np.random.default_rng(seed)
    total, final, power = int(draw.integers(4, 2000)), float(draw.uniform()), float(draw.uniform(0.5, 3))
    steps = np.arange(total + 3)
    reference = jax.vmap(optax.cosine_decay_schedule(1.0, total, final))(steps)
    close(values(schedules.cosine(total, final=final), steps), reference)
    close(values(schedules.linear(total, final=final), steps), jax.vmap(optax.linear_schedule(1.0, final, total))(steps))
    reference = jax.vmap(optax.polynomial_schedule(1.0, final, power, total))(steps)
    close(values(schedules.polynomial(total, power=power, final=final), steps[:total]), reference[:total])
    # optax divides inside jit and ends up to (1e-7) ** power away from `final`; test_stays_at_its_final_value has the end.


def test_step_against_optax():
    found = values(schedules.step(1000, at=(0.5, 0.75, 0.9), factor=0.2), np.arange(1100))
    reference = optax.piecewise_constant_schedule(1.0, {500: 0.2, 750: 0.2, 900: 0.2})
    close(found, jax.vmap(reference)(np.arange(1100)))
    assert found[499] == 1
    assert found[500] == np.float32(0.2)


def test_one_cycle_against_optax():
    ours = values(schedules.one_cycle(200, rise=0.25, start=0.04, final=1e-4), np.arange(205))
    reference = optax.cosine_onecycle_schedule(200, 1.0, pct_start=0.25, div_factor=25, final_div_factor=400)
    close(ours, jax.vmap(reference)(np.arange(205)))


@pytest.mark.parametrize('anneal', ['cosine', 'linear'])
def test_one_cycle_rises_to_one_and_falls(anneal):
    found = values(schedules.one_cycle(50, rise=0.3, start=0.04, final=1e-4, anneal=anneal), np.arange(51))
    assert found[0] == np.float32(0.04)
    assert found.argmax() == 15
    assert found[15] == 1
    assert found[50] == np.float32(1e-4)
    assert (np.diff(found[:16]) > 0).all()
    assert (np.diff(found[15:]) < 0).all()
    if anneal == 'linear':
        close(found, np.interp(np.arange(51), [0, 15, 50], [0.04, 1, 1e-4]))


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('staircase', [False, True])
def test_inverse_time_in_float64(seed, staircase):
    draw = np.random.default_rng(seed)
    beta, every, total = float(draw.uniform(0, 3)), int(draw.integers(1, 50)), 3000
    t = np.arange(total)
    periods = np.floor(t / every) if staircase else t / every
    found = values(schedules.inverse_time(total, beta=beta, every=every, staircase=staircase), t)
    np.testing.assert_allclose(found, 1 / (1 + beta * periods), rtol=4 * ULP)


def test_staircase_steps_exactly_at_multiples():
    found = values(schedules.inverse_time(1000, beta=1.0, every=3, staircase=True), np.arange(900))
    assert (np.flatnonzero(np.diff(found)) + 1 == np.arange(3, 900, 3)).all()


def test_rsqrt_in_float64():
    t = np.arange(4000)
    np.testing.assert_allclose(values(schedules.rsqrt(4000, timescale=100), t), np.sqrt(100 / (t + 100)), rtol=4 * ULP)


def test_warmup_stable_decay_is_flat_then_falls():
    t = np.arange(101)
    progress = np.clip((t - 80) / 20, 0, 1)
    close(values(schedules.warmup_stable_decay(100, decay=0.2), t), 1 - progress)
    found = values(schedules.warmup_stable_decay(100, decay=0.2, shape='1-sqrt', final=0.1), t)
    close(found, 1 - 0.9 * np.sqrt(progress))
    assert (found[:81] == 1).all()
    assert found[81] < 1


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('step', {'at': (0.5, 30)}, 'at has 30'),
        ('warmup_stable_decay', {'decay': 0.0}, 'decay has 0.0'),
        ('warmup_stable_decay', {'shape': 'sqrt'}, "shape='sqrt'"),
        ('one_cycle', {'rise': 1.5}, 'rise has 1.5'),
        ('one_cycle', {'anneal': 'cos'}, "anneal='cos'"),
        ('polynomial', {'power': 0.0}, 'power=0.0'),
        ('inverse_time', {'every': 0}, 'every=0'),
        ('rsqrt', {'timescale': 0}, 'timescale=0'),
    ],
)
def test_mistakes(name, arguments, message):
    with pytest.raises(UsageError, match='fix:') as error:
        make(name, **arguments)
    assert message in str(error.value)
