"""How many microbatches make a step if nobody says: one, but on a CPU as many as keep a convolutional network in the cache.

    Fashion-MNIST's CNN, batch 64: the largest output of a convolution is (28, 28, 32), 100 kB an example: 8 microbatches of 8

What a convolution gives is many times larger than its kernel, and that of a batch leaves the caches that belong to the cores
(of 1 MB or so) before it is read again. The sum over microbatches is the same sum (`step.accumulate`). So that all else is the
same too, a step is left whole where it draws random numbers (dropout), has statistics of the batch, or lets examples meet; and
where a convolution would stay XLA's own (bfloat16, groups, a module that does not use `layers.conv`), which is slow in a loop;
so it is where XLA divides the batch over devices (`lowering.divided`). A Transformer whose patches are a convolution is no
convolutional network: its windows do not overlap.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from research.models import lowering
from research.train import flops
from research.train.step import CONSTANT, gradients_of

CACHE = 2**20  # bytes, of one core
FEWEST = 4  # examples in a microbatch


def chosen(task: Any, variables: Any, batch: dict[str, jax.ShapeDtypeStruct], devices: int, cores: int) -> int:
    """The number of microbatches.

    Args:
      task: the task.
      variables: abstract parameters and model state.
      batch: abstract, as the task sees it; B is its leading axis.
      devices: over how many the batch is divided.
      cores: of a CPU, which those devices share.
    """
    has_statistics = any(name not in ('params', *CONSTANT) for name in variables)
    if not lowering.on_cpu() or has_statistics or getattr(task, 'whole_batch', False):
        return 1
    key = jax.eval_shape(lambda: jax.random.key(0))

    def traced(what: Callable[..., Any]) -> core.Jaxpr:
        return jax.make_jaxpr(lambda v, b, k: what(v, b, {'dropout': k}))(variables, batch, key).jaxpr

    with lowering.as_written():
        program = traced(functools.partial(task.loss, train=True))
    size = batch['mask'].shape[0]
    largest, local = max(_outputs_of_convolutions(program), default=0) / size, size // devices
    room = CACHE * max(1, cores // devices)
    fitting = (n for n in range(1, local // FEWEST + 1) if local % n == 0 and largest * local / n <= room)
    count = next(fitting, 1)
    draws = any(program.invars[-1] in equation.invars for equation in program.eqns)
    if count == 1 or draws or not any(map(_overlaps, _convolutions(program))):
        return 1
    with lowering.inside_loop():
        return 1 if any(_outputs_of_convolutions(traced(gradients_of(task)))) else count


def _outputs_of_convolutions(program: core.Jaxpr) -> Iterator[int]:
    """The bytes of what each convolution of a program gives."""
    for equation in _convolutions(program):
        found: Any = equation.outvars[0].aval
        yield math.prod(found.shape) * found.dtype.itemsize


def _overlaps(equation: core.JaxprEqn) -> bool:
    """Whether the windows of a convolution overlap, so that its results may be many times larger than what it reads."""
    kernel: Any = equation.invars[1].aval
    places = (kernel.shape[axis] for axis in equation.params['dimension_numbers'].rhs_spec[2:])
    return any(size > stride for size, stride in zip(places, equation.params['window_strides'], strict=True))


def _convolutions(program: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for equation in program.eqns:
        if equation.primitive.name == 'conv_general_dilated':
            yield equation
        for part in flops.parts_of(equation):
            yield from _convolutions(part.jaxpr)
