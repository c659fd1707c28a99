"""The mesh of devices and where arrays lie on it.

Shape letters: N devices. The mesh has one axis, 'data': a batch is cut along it, and parameters are on every device unless a
partition rule says otherwise.
"""

import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from research.core.errors import UsageError

DATA_AXIS = 'data'


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh over all devices, or the first `num_devices`. Axes are Auto: linen's constraints need it.

    Raises:
      UsageError: there are fewer devices, or jax cannot start on this machine.
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
    return Mesh(np.array(devices[:num_devices]), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis of a batch over all devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_divisible(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Refuses a batch whose microbatches the devices cannot share equally."""
    unit = mesh.size * microbatches
    if batch_size % unit:
        below = batch_size // unit * unit
        parts = f'{mesh.size} devices' + (f' in {microbatches} microbatches' if microbatches > 1 else '')
        fix = f'use config.data.batch_size={f"{below} or {below + unit}" if below else unit}'
        raise UsageError(f'config.data.batch_size={batch_size} cannot be shared by {parts}', fix)
