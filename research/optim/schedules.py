"""Learning-rate schedules: a shape (multipliers after the warm-up) under a peak and a linear warm-up.

A shape maps t, the steps since the end of the warm-up (int or traced int32), to a float32 multiplier of the peak. `total` is
the number of steps after the warm-up: the last update of a run is t = total - 1, the end of the curve is t = total, and
beyond it the multiplier stays what it was there. Everything is branch-free `jnp`, so a schedule may be called inside jit.

With a peak of 0.1, 2 steps of warm-up and `cosine(4)`, the steps 0..6 have the rates
0.05, 0.1 | 0.1, 0.0854, 0.05, 0.0146, 0.0 (the run ends with step 5): no step is wasted on a rate of zero.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import UsageError

Count = int | jax.Array
Shape = Callable[[Count], jax.Array]


def learning_rate(peak: float, shape: Shape, warmup: int) -> Callable[[Count], jax.Array]:
    """The learning rate by step: peak * (step + 1) / warmup for step < warmup, then peak * shape(step - warmup); float32."""

    def rate(step: Count) -> jax.Array:
        rising = (jnp.asarray(step, jnp.float32) + 1) / max(warmup, 1)
        after = shape(jnp.maximum(jnp.asarray(step) - warmup, 0))
        return jnp.float32(peak) * jnp.where(jnp.asarray(step) < warmup, rising, after)

    return rate


def constant(total: int, /) -> Shape:
    """1 throughout."""
    del total
    return lambda t: jnp.ones_like(t, dtype=jnp.float32)


def inverse_time(total: int, /, *, beta: float, every: int = 1, staircase: bool = False) -> Shape:
    """1 / (1 + beta * t / every), in whole multiples of `every` steps with `staircase` (Keras' InverseTimeDecay)."""
    if every < 1 or beta < 0:
        raise UsageError(f"schedule 'inverse_time': beta={beta}, every={every}", 'beta is at least 0, every at least 1 step')

    def multiplier(t: Count) -> jax.Array:
        steps = jnp.clip(jnp.asarray(t), 0, total)
        # Whole numbers are divided as such: 3 * (1 / 3) in float32 may fall below the stair that it stands on.
        periods = (steps // every if staircase else steps / every).astype(jnp.float32)
        return 1 / (1 + beta * periods)

    return multiplier


def cosine(total: int, /, *, final: float = 0.0) -> Shape:
    """Half a cosine from 1 to `final` (SGDR without restarts, Loshchilov & Hutter 2017, eq. 5)."""
    return lambda t: _blend(final, 1.0, _half_cosine(_remaining(t, total)))


def linear(total: int, /, *, final: float = 0.0) -> Shape:
    """A straight line from 1 to `final`."""
    return lambda t: _blend(final, 1.0, _remaining(t, total))


def polynomial(total: int, /, *, power: float, final: float = 0.0) -> Shape:
    """(1 - t / total) ** power, scaled to end at `final`."""
    if power <= 0:
        raise UsageError(f"schedule 'polynomial': power={power} is not positive", 'for example power=2.0')
    return lambda t: _blend(final, 1.0, _remaining(t, total) ** power)


def step(total: int, /, *, at: tuple[float, ...], factor: float = 0.1) -> Shape:
    """`factor` ** (how many boundaries have been reached); boundaries: the fractions `at` of `total`, rounded to steps >= 1.

    With total 100 and at=(0.5, 0.75): 1 for t < 50, 0.1 for 50 <= t < 75, 0.01 from 75.
    """
    boundaries = np.array([max(round(_fraction('step', 'at', share) * total), 1) for share in at], np.int32)
    levels = (factor ** np.arange(len(at) + 1)).astype(np.float32)
    return lambda t: jnp.asarray(levels)[jnp.sum(jnp.asarray(t) >= boundaries)]


def rsqrt(total: int, /, *, timescale: int = 10_000) -> Shape:
    """sqrt(timescale / (t + timescale)): 1 at the end of the warm-up, as in big_vision (Zhai et al. 2022, section 3.5)."""
    if timescale < 1:
        raise UsageError(f"schedule 'rsqrt': timescale={timescale} is less than one step", 'for example timescale=10_000')
    return lambda t: jnp.sqrt(timescale / (jnp.clip(jnp.asarray(t, jnp.float32), 0, total) + timescale))


def warmup_stable_decay(total: int, /, *, decay: float = 0.2, shape: str = 'linear', final: float = 0.0) -> Shape:
    """1, then down to `final` over the last share `decay` of the steps after the warm-up.

    Args:
      total: steps after the warm-up.
      decay: share of `total`, in (0, 1), that goes down.
      shape: 'linear', or '1-sqrt': 1 - sqrt(progress), steeper at first (Hägele et al. 2024, section 3).
      final: the multiplier at the end.
    """
    curves = {'linear': lambda remaining: remaining, '1-sqrt': lambda remaining: 1 - jnp.sqrt(1 - remaining)}
    curve = curves[_choice('warmup_stable_decay', 'shape', shape, curves)]
    length = max(round(_fraction('warmup_stable_decay', 'decay', decay) * total), 1)
    return lambda t: _blend(final, 1.0, curve(_remaining(jnp.asarray(t) - (total - length), length)))


def one_cycle(total: int, /, *, rise: float = 0.3, start: float = 0.04, final: float = 1e-4, anneal: str = 'cosine') -> Shape:
    """From `start` up to 1 over the share `rise` of the steps, then down to `final` (Smith & Topin 2018, section 3).

    It is its own warm-up: give it a `warmup` of 0 steps. Both ways are `anneal`ed by 'cosine' or 'linear'.
    """
    curves = {'cosine': _half_cosine, 'linear': lambda share: share}
    curve = curves[_choice('one_cycle', 'anneal', anneal, curves)]
    top = max(round(_fraction('one_cycle', 'rise', rise) * total), 1)

    def multiplier(t: Count) -> jax.Array:
        t = jnp.asarray(t)
        up = _blend(start, 1.0, curve(_share(t, top)))
        down = _blend(final, 1.0, curve(_remaining(t - top, total - top)))
        return jnp.where(t < top, up, down)

    return multiplier


def _remaining(t: Count, total: int) -> jax.Array:
    """(total - t) / total within [0, 1]; subtracted as whole numbers, so the last steps of a long run keep their precision."""
    return _share(total - jnp.asarray(t), total)


def _share(count: jax.Array, total: int) -> jax.Array:
    """count / total within [0, 1], float32, and exact at both ends (XLA turns / into * (1 / total); 41 * (1 / 41) < 1)."""
    inside = jnp.asarray(count, jnp.float32) / max(total, 1)
    return jnp.where(count <= 0, 0, jnp.where(count >= total, 1, inside))


def _half_cosine(share: jax.Array) -> jax.Array:
    """(1 - cos(pi * share)) / 2, from 0 to 1, in the form that does not cancel near 0."""
    return jnp.sin(jnp.pi / 2 * share) ** 2


def _blend(low: float, high: float, height: jax.Array) -> jax.Array:
    """`low` at height 0 and `high` at height 1, both exactly (low + (high - low) * height may be an ulp off at the top)."""
    return low * (1 - height) + high * height


def _fraction(schedule: str, argument: str, value: float) -> float:
    if not 0 < value < 1:
        raise UsageError(
            f'schedule {schedule!r}: {argument} has {value}, not a fraction of the steps', 'give a number between 0 and 1'
        )
    return value


def _choice(schedule: str, argument: str, value: str, known: dict) -> str:
    if value not in known:
        raise UsageError(f'schedule {schedule!r}: {argument}={value!r} does not exist', f'known: {", ".join(known)}')
    return value
