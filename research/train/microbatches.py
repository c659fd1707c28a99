"""How many microbatches make a step if nobody says: one, but on a CPU as many as keep a convolutional network in the cache.

    Fashion-MNIST's CNN, batch 64: the largest output of a convolution is (28, 28, 32), 100 kB an example: 8 microbatches of 8

What a convolution gives is many times larger than its kernel, and that of a batch leaves the cache that belongs to a core (1 MB
or so) before it is read again. The sum over microbatches is the same sum (`step.accumulate`). So that all else is the same too,
a step is left whole where it draws random numbers (dropout), where it has statistics of the batch, and where examples meet; and
where a convolution would stay XLA's own (bfloat16, groups, a module that does not use `layers.conv`), which is slow in a loop.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

from research.models import lowering
from research.train import flops
from research.train.step import CONSTANT, gradients_of

CACHE = 2**20  # bytes
FEWEST = 4  # examples in a microbatch


def chosen(task: Any, variables: Any, batch: dict[str, jax.ShapeDtypeStruct], devices: int) -> int:
    """The number of microbatches.

    Args:
      task: the task.
      variables: abstract parameters and model state.
      batch: abstract, as the task sees it; B is its leading axis.
      devices: over how many the batch is divided.
    """
    has_statistics = any(name not in ('params', *CONSTANT) for name in variables)
    if not lowering.on_cpu() or has_statistics or getattr(task, 'whole_batch', False):
        return 1
    key = jax.eval_shape(lambda: jax.random.key(0))

    def traced() -> core.Jaxpr:
        return jax.make_jaxpr(lambda v, b, k: gradients_of(task)(v, b, {'dropout': k}))(variables, batch, key).jaxpr

    with lowering.as_written():
        program = traced()
    size = batch['mask'].shape[0]
    largest, local = max(_outputs_of_convolutions(program), default=0) / size, size // devices
    fitting = (n for n in range(1, local // FEWEST + 1) if local % n == 0 and largest * local / n <= CACHE)
    count = next(fitting, 1)
    if count == 1 or any(program.invars[-1] in equation.invars for equation in program.eqns):
        return 1
    with lowering.inside_loop():
        return 1 if any(_outputs_of_convolutions(traced())) else count


def _outputs_of_convolutions(program: core.Jaxpr) -> Iterator[int]:
    """The bytes of what each convolution of a program gives, its gradients included."""
    for equation in program.eqns:
        if equation.primitive.name == 'conv_general_dilated':
            found: Any = equation.outvars[0].aval
            yield math.prod(found.shape) * found.dtype.itemsize
        for part in flops.parts_of(equation):
            yield from _outputs_of_convolutions(part.jaxpr)
