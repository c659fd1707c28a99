"""Single convolutions on a CPU: XLA's own form and that of `models/convolution.py`, with both gradients, alone and in a loop.

    taskset -c 0 env NPROC=1 python -m bench.convolutions

Milliseconds are medians of 9 calls. `chosen` tells whether the product form is taken outside of loops; inside it always is.
Error: the largest difference of value or gradient as a share of the largest number.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.arms import timed
from bench.report import Report
from research.models import lowering
from research.models.convolution import convolution
from research.parallel import memory

CALLS = 9
NUMBERS = jax.lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ('NHWC', 'HWIO', 'NHWC'))
CASES = (  # batch, side of the image, C, side of the kernel, F, stride, padding
    (8, 32, 3, 3, 32, 1, 'VALID'),
    (32, 32, 3, 3, 32, 1, 'VALID'),
    (8, 14, 32, 3, 64, 1, 'VALID'),
    (32, 14, 32, 3, 64, 1, 'VALID'),
    (32, 6, 64, 3, 64, 1, 'VALID'),
    (32, 32, 16, 3, 16, 1, 'SAME'),
    (32, 16, 64, 3, 64, 1, 'SAME'),
    (32, 16, 64, 3, 128, 2, 'SAME'),
    (32, 16, 64, 1, 256, 1, 'SAME'),
    (32, 12, 32, 5, 64, 1, 'SAME'),
    (8, 112, 3, 7, 64, 2, 'SAME'),
)


def both_gradients(form: Callable[..., jax.Array], stride: int, padding: str, x: Any, k: Any, weights: Any) -> Any:
    """The gradients by image and kernel of the product of a convolution with `weights`."""
    apply = functools.partial(form, dimension_numbers=NUMBERS)
    return jax.vjp(lambda x, k: apply(x, k, (stride, stride), padding), x, k)[1](weights)


def in_loop(gradients: Callable[..., Any], x: Any, k: Any, weights: Any) -> Any:
    """The same as the body of a loop of one round."""
    zeros = jax.tree.map(jnp.zeros_like, (x, k))
    with lowering.inside_loop():
        return jax.lax.fori_loop(0, 1, lambda _, s: jax.tree.map(jnp.add, s, gradients(x, k, weights)), zeros)


def milliseconds(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """The median of a call, and what it gives."""
    compiled = jax.jit(function).lower(*arguments).compile()
    found = jax.block_until_ready(compiled(*arguments))
    times = [timed(lambda: jax.block_until_ready(compiled(*arguments)))['seconds'] for _ in range(CALLS)]
    return statistics.median(times) * 1e3, found


def measure(case: tuple[Any, ...]) -> str:
    """A row of the table."""
    batch, side, channels, kernel, features, stride, padding = case
    generator = np.random.default_rng(0)
    x, k = (
        jnp.asarray(generator.normal(size=s), jnp.float32)
        for s in ((batch, side, side, channels), (kernel, kernel, channels, features))
    )
    out = jax.eval_shape(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (stride, stride), padding, dimension_numbers=NUMBERS), x, k
    )
    weights = jnp.asarray(generator.normal(size=out.shape), jnp.float32)
    plain = functools.partial(both_gradients, jax.lax.conv_general_dilated, stride, padding)
    ours = functools.partial(both_gradients, convolution, stride, padding)

    def product(*arguments: Any) -> Any:
        with lowering.inside_loop():
            return ours(*arguments)

    (xla, exact), (own, found) = milliseconds(plain, x, k, weights), milliseconds(product, x, k, weights)
    xla_loop, own_loop = (milliseconds(functools.partial(in_loop, f), x, k, weights)[0] for f in (plain, ours))
    error = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(found, exact, strict=True))
    is_chosen = 'conv_general_dilated' not in str(jax.make_jaxpr(ours)(x, k, weights))
    name = f'{batch} x {side}x{side}x{channels}, {kernel}x{kernel} to {features}, stride {stride}'
    chosen = 'yes' if is_chosen else 'no'
    return f'| {name} | {xla:.2f} | {own:.2f} | {chosen} | {xla_loop:.2f} | {own_loop:.2f} | {error:.1e} |'


def main() -> None:
    """Prints the table."""
    memory.keep_freed()
    report = Report()
    report.say('| both gradients, ms | XLA | products | chosen | XLA, in a loop | products, in a loop | error |')
    report.say('|---|---|---|---|---|---|---|')
    for case in CASES:
        report.say(measure(case))


if __name__ == '__main__':
    main()
