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


def table(module: nn.Module, inputs: jax.ShapeDtypeStruct, width: int = 128) -> str:
    """The layers of a module: outputs, parameters with bytes, FLOPs forward and forward-and-backward, for `inputs` (B, ...)."""
    make_table = tabulate(
        module,
        jax.random.key(0),
        compute_flops=True,
        compute_vjp_flops=True,
        console_kwargs={'width': width, 'force_terminal': False},
    )
    return make_table(jax.numpy.zeros(inputs.shape, inputs.dtype), train=False)
