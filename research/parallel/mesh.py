"""The mesh of devices and where arrays lie on it.

Shape letters: N devices, M of them along the axis 'model'.

The mesh has the axes 'data' and 'model', of N / M and M devices. A batch is cut along 'data' only: the M devices of a group see
the same examples and may share each layer's arithmetic (tensor parallelism), as far as partition rules (`rules.py`) cut the
parameters along 'model'. 8 devices with M = 2 are four groups, and a batch of 64 gives each 16 examples.
"""

import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from research.core.errors import UsageError

DATA_AXIS, MODEL_AXIS = 'data', 'model'


def make_mesh(num_devices: int | None = None, model_axis: int = 1) -> Mesh:
    """A mesh over all devices, or the first `num_devices`. Axes are Auto: linen's constraints need it.

    Neighbours in jax's order lie along 'model', whose traffic is the heaviest: within a host as far as it goes.

    Raises:
      UsageError: there are fewer devices, `model_axis` does not divide them, or jax cannot start on this machine.
    """
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # a bare AssertionError where JAX_PLATFORMS=cuda meets no GPU
        reason = str(error)[:120] or f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS")!r}'
        raise UsageError(f'jax finds no device: {reason}', 'python launch.py --mode=doctor says why') from error
    if num_devices is not None and num_devices > len(devices):
        raise UsageError(
            f'config.parallel.devices={num_devices}, but jax sees {len(devices)} {devices[0].platform} device(s)',
            'lower it, or look at --mode=doctor',
        )
    chosen = np.array(devices[:num_devices])  # (N,)
    if chosen.size % model_axis:
        divisors = [str(m) for m in range(1, chosen.size + 1) if chosen.size % m == 0]
        raise UsageError(
            f'config.parallel.model_axis={model_axis} does not divide {chosen.size} devices', f'use {", ".join(divisors)}'
        )
    return Mesh(chosen.reshape(-1, model_axis), (DATA_AXIS, MODEL_AXIS), axis_types=(AxisType.Auto,) * 2)  # (N/M, M)


def data_size(mesh: Mesh) -> int:
    """Into how many parts a batch is cut, N / M."""
    return mesh.shape[DATA_AXIS]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis of a batch along 'data'."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_divisible(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Refuses a batch whose microbatches the devices (the groups of M devices) cannot share equally."""
    unit = data_size(mesh) * microbatches
    if batch_size % unit:
        below = batch_size // unit * unit
        groups = '' if mesh.size == data_size(mesh) else f'groups of {mesh.shape[MODEL_AXIS]} '
        parts = f'{data_size(mesh)} {groups}devices' + (f' in {microbatches} microbatches' if microbatches > 1 else '')
        fix = f'use config.data.batch_size={f"{below} or {below + unit}" if below else unit}'
        raise UsageError(f'config.data.batch_size={batch_size} cannot be shared by {parts}', fix)
