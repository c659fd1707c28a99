"""Compiling the train step: `jit` over global arrays, or `pmap` over the data axis; the same pure step in both.

Shape letters: N devices, B global batch.

A step is `(state, batch) -> (state, Terms)`. Under jit it sees the global batch, and XLA inserts the reductions. Under pmap it
sees one device's B / N examples, so the step must be built with gradients that sum over the axis (`axis_name`), after which
every device holds the same state; the state goes in and out replicated, in the same form as under jit.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from research.core import terms
from research.core.errors import UsageError
from research.parallel import mesh as meshes
from research.parallel.mesh import DATA_AXIS

Step = Callable[[Any, Any], tuple[Any, Any]]

WIDEST = {'xla_cpu_prefer_vector_width': 512}  # bits; XLA's default is 256, also where registers are twice as wide


def axis_name(kind: str) -> str | None:
    """The axis over which a step compiled as `kind` must sum its gradients itself; None under jit."""
    return DATA_AXIS if kind == 'pmap' else None


def run_once(function: Callable[[], Any], mesh: Mesh, layout: Any) -> Callable[[], Any]:
    """`function`, which takes nothing and runs once, as one program whose results lie as `layout` says.

    What runs once should be compiled fast: on a CPU LLVM's first level of optimisation takes a third of the time.
    """
    options = {'xla_backend_optimization_level': 1} if _on_cpu(mesh) else None
    return jax.jit(function, out_shardings=layout, compiler_options=options)


def compile_step(step: Step, mesh: Mesh, kind: str, batch: Any, state: Any) -> Step:
    """Compiles `step` ahead of time for abstract `state` and `batch` (trees of ShapeDtypeStruct with shardings).

    The terms come packed. The state's buffers are donated: the caller must not use the state that it passed in. A batch of
    another shape (rows that are padded to a shorter length) is compiled for when it first comes.
    """
    return lower_step(step, mesh, kind, batch, state)()


def lower_step(step: Step, mesh: Mesh, kind: str, batch: Any, state: Any) -> Callable[[], Step]:
    """The first half of `compile_step`: tracing and lowering, which is Python's work. What it returns does the rest, XLA's."""
    lower, step = _lower_pmap if kind == 'pmap' else lower_jit, _packed(step)
    finish = lower(step, mesh, batch, state)

    def finished() -> Step:
        programs = {_shapes(batch): finish()}

        def compiled(now: Any, given: Any) -> tuple[Any, Any]:
            shapes = _shapes(given)
            if shapes not in programs:
                like = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch[k].sharding) for k, x in given.items()}
                programs[shapes] = lower(step, mesh, like, state)()
            return programs[shapes](now, given)

        return compiled

    return finished


def _packed(step: Step) -> Step:
    def packed(state: Any, batch: Any) -> tuple[Any, terms.Packed]:
        new, found = step(state, batch)
        return new, terms.pack(found)

    return packed


def _shapes(batch: Any) -> tuple:
    return tuple((name, leaf.shape) for name, leaf in sorted(batch.items()))


def lower_jit(step: Step, mesh: Mesh, batch: Any, state: Any) -> Callable[[], jax.stages.Compiled]:
    """The step over global arrays; what is returned compiles it."""
    shardings, replicated = jax.tree.map(lambda leaf: leaf.sharding, state), meshes.replicated(mesh)
    lowered = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated)).lower(state, batch)
    return lambda: lowered.compile(_options(mesh))


def _lower_pmap(step: Step, mesh: Mesh, batch: Any, state: Any) -> Callable[[], Step]:
    """The step over N devices; its batch is cut into N equal parts along the leading axis."""
    if not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state)):
        raise UsageError('config.parallel.rules partition the state, which pmap cannot', 'use config.parallel.compile=jit')
    devices = list(mesh.devices.flat)
    mapped = jax.pmap(step, axis_name=DATA_AXIS, in_axes=(None, 0), out_axes=(None, None), devices=devices, donate_argnums=0)
    split = jax.jit(lambda batch: jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch))  # (N, B/N, ...)
    lowered = mapped.lower(state, jax.eval_shape(split, batch))

    def finish() -> Step:
        compiled = lowered.compile(_options(mesh))
        return lambda state, batch: compiled(state, split(batch))

    return finish


def _options(mesh: Mesh) -> dict[str, Any] | None:
    """XLA's options for a step; those in XLA_FLAGS have precedence."""
    is_chosen = any(name in os.environ.get('XLA_FLAGS', '') for name in WIDEST)
    return WIDEST if _on_cpu(mesh) and not is_chosen else None


def _on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == 'cpu'
