"""FLOPs of a step, and the table of the model.

The count is XLA's, of the forward and backward pass over the global batch as lowered, before partitioning and without the
optimiser. XLA counts the body of a `lax.scan` once however often it runs (10 scanned products count as one), so each scan's
body is counted on its own and added for the rounds that XLA leaves out. A `while_loop`, whose rounds nobody knows, counts once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn
from flax.linen.summary import tabulate
from jax.extend import core


def count(function: Callable[..., Any], *arguments: Any) -> float | None:
    """FLOPs of one call of `function` on (abstract) arguments; None where the backend does not say."""
    flops = _as_lowered(function, *arguments)
    return None if flops is None else flops + _left_out(jax.make_jaxpr(function)(*arguments).jaxpr)


def _as_lowered(function: Callable[..., Any], *arguments: Any) -> float | None:
    """XLA's own count, with the body of each scan counted once."""
    analysis = jax.jit(function).lower(*arguments).cost_analysis()
    flops = (analysis or {}).get('flops')
    return float(flops) if flops else None


def _left_out(jaxpr: core.Jaxpr) -> float:
    """The FLOPs of every round but the first of every scan in `jaxpr`, those inside scans included."""
    total = 0.0
    for equation in jaxpr.eqns:
        inside = sum(_left_out(part.jaxpr) for part in _parts(equation))
        if equation.primitive.name == 'scan':
            body, length = equation.params['jaxpr'], equation.params['length']
            once = _as_lowered(core.jaxpr_as_fun(body), *body.in_avals) or 0.0
            inside = (length - 1) * once + length * inside
        total += inside
    return total


def _parts(equation: core.JaxprEqn) -> Iterator[core.ClosedJaxpr]:
    """The programs inside an equation: the body of a scan, a checkpoint, a jit, ..."""
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part
            elif isinstance(part, core.Jaxpr) and not part.constvars:
                yield core.ClosedJaxpr(part, ())


def table(module: nn.Module, arguments: dict[str, jax.ShapeDtypeStruct], width: int = 128) -> str:
    """The layers of a module called with `arguments`: outputs, parameters with bytes, FLOPs forward and of both passes."""
    make_table = tabulate(
        module,
        jax.random.key(0),
        compute_flops=True,
        compute_vjp_flops=True,
        console_kwargs={'width': width, 'force_terminal': False},
    )
    zeros = {name: jax.numpy.zeros(leaf.shape, leaf.dtype) for name, leaf in arguments.items()}
    return make_table(zeros.pop('inputs'), train=False, **zeros)
