"""Compiling the train step: `jit` over global arrays, or `pmap` over the data axis; the same pure step in both.

Shape letters: N devices, B global batch.

A step is `(state, batch) -> (state, Terms)`. Under jit it sees the global batch, and XLA inserts the reductions. Under pmap it
sees one device's B / N examples, so the step must be built with gradients that sum over the axis (`axis_name`), after which
every device holds the same state; the state goes in and out replicated, in the same form as under jit.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from research.core.errors import UsageError
from research.parallel import mesh as meshes
from research.parallel.mesh import DATA_AXIS

Step = Callable[[Any, Any], tuple[Any, Any]]


def axis_name(kind: str) -> str | None:
    """The axis over which a step compiled as `kind` must sum its gradients itself; None under jit."""
    return DATA_AXIS if kind == 'pmap' else None


def compile_step(step: Step, mesh: Mesh, kind: str, batch: Any, state: Any) -> Step:
    """Compiles `step` ahead of time for abstract `state` and `batch` (trees of ShapeDtypeStruct with shardings).

    The state's buffers are donated: the caller must not use the state that it passed in. A batch of another shape (rows that
    are padded to a shorter length) is compiled for when it first comes.
    """
    make = _pmap if kind == 'pmap' else _jit
    programs = {_shapes(batch): make(step, mesh, batch, state)}

    def compiled(now: Any, given: Any) -> tuple[Any, Any]:
        shapes = _shapes(given)
        if shapes not in programs:
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), given)
            programs[shapes] = make(step, mesh, like, state)
        return programs[shapes](now, given)

    return compiled


def _shapes(batch: Any) -> tuple:
    return tuple((name, leaf.shape) for name, leaf in sorted(batch.items()))


def _jit(step: Step, mesh: Mesh, batch: Any, state: Any) -> Step:
    """The step over global arrays."""
    shardings, replicated = jax.tree.map(lambda leaf: leaf.sharding, state), meshes.replicated(mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated))
    return jitted.lower(state, batch).compile()


def _pmap(step: Step, mesh: Mesh, batch: Any, state: Any) -> Step:
    """The step over N devices; its batch is cut into N equal parts along the leading axis."""
    if not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state)):
        raise UsageError('config.parallel.rules partition the state, which pmap cannot', 'use config.parallel.compile=jit')
    devices = list(mesh.devices.flat)
    mapped = jax.pmap(step, axis_name=DATA_AXIS, in_axes=(None, 0), out_axes=(None, None), devices=devices, donate_argnums=0)
    split = jax.jit(lambda batch: jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch))  # (N, B/N, ...)
    compiled = mapped.lower(state, jax.eval_shape(split, batch)).compile()
    return lambda state, batch: compiled(state, split(batch))
