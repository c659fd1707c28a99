"""FLOPs of a step, and the table of the model.

The count is XLA's, of the forward and backward pass over the global batch as lowered, before partitioning and without the
optimiser, in the form that the models have on accelerators: it does not depend on the machine. XLA counts the body of a
`lax.scan` once however often it runs (10 scanned products count as one), so each scan's body is counted on its own and added
for the rounds that XLA leaves out. A `while_loop`, whose rounds nobody knows, counts once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.linen.summary import tabulate
from jax.extend import core

from research.models import lowering


def count(function: Callable[..., Any], *arguments: Any) -> float | None:
    """FLOPs of one call of `function` on (abstract) arguments; None where the backend does not say."""
    with lowering.as_written():
        traced = jax.jit(function).trace(*arguments)
        flops = _as_lowered(traced)
        return None if flops is None else flops + _left_out(traced.jaxpr.jaxpr)


def _as_lowered(traced: jax.stages.Traced) -> float | None:
    """XLA's own count, with the body of each scan counted once."""
    flops = (traced.lower().cost_analysis() or {}).get('flops')
    return float(flops) if flops else None


def _left_out(jaxpr: core.Jaxpr) -> float:
    """The FLOPs of every round but the first of every scan in `jaxpr`, those inside scans included."""
    total = 0.0
    for equation in jaxpr.eqns:
        inside = sum(_left_out(part.jaxpr) for part in parts_of(equation))
        if equation.primitive.name == 'scan':
            body, length = equation.params['jaxpr'], equation.params['length']
            once = _as_lowered(jax.jit(core.jaxpr_as_fun(body)).trace(*body.in_avals)) or 0.0
            inside = (length - 1) * once + length * inside
        total += inside
    return total


def parts_of(equation: core.JaxprEqn) -> Iterator[core.ClosedJaxpr]:
    """The programs inside an equation: the body of a scan, a checkpoint, a jit, ..."""
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part
            elif isinstance(part, core.Jaxpr) and not part.constvars:
                yield core.ClosedJaxpr(part, ())


def table(module: nn.Module, arguments: dict[str, jax.ShapeDtypeStruct], width: int = 128) -> str:
    """The layers of a module called with `arguments`: outputs, parameters with bytes, FLOPs forward and of both passes."""
    words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    make_table = tabulate(
        module,
        jax.random.wrap_key_data(jax.device_put(np.zeros(words.shape, words.dtype))),  # `key(0)` would be compiled
        compute_flops=True,
        compute_vjp_flops=True,
        console_kwargs={'width': width, 'force_terminal': False},
    )
    zeros = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in arguments.items()}
    with lowering.as_written():
        return make_table(zeros.pop('inputs'), train=False, **zeros)
