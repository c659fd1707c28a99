"""FLOPs of a step, and the table of the model.

The count is XLA's, of the forward and backward pass over the global batch as lowered, before partitioning and without the
optimiser. Trap: XLA counts the body of a `lax.scan` once.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax.linen.summary import tabulate


def count(function: Callable[..., Any], *arguments: Any) -> float | None:
    """FLOPs of one call of `function` on (abstract) arguments; None where the backend does not say."""
    analysis = jax.jit(function).lower(*arguments).cost_analysis()
    flops = (analysis or {}).get('flops')
    return float(flops) if flops else None


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
