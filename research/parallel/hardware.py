"""What the machine can do: its CPU cores, and for model FLOPs utilisation (MFU) peak FLOP/s by device kind, from data sheets.

Dense peaks without sparsity, in FLOP/s for one jax device, as published by 2026-11. A kind that is not listed, and any CPU,
is unknown: MFU is then not given, rather than guessed. TPU v2 and v3 expose each of a chip's two cores as a device.

Sources: NVIDIA data sheets of V100, A100, L4, L40S, H100, H200 and B200; Google Cloud TPU documentation, pages of each version.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

TERA = 1e12

# jax's `device_kind` -> {dtype: peak FLOP/s}. float32 on NVIDIA is TF32 on tensor cores where the chip has it, which is what
# XLA uses at default precision; TPUs compute float32 matrix products in bfloat16 passes at default precision.
PEAKS: dict[str, dict[str, float]] = {
    'Tesla V100-SXM2-16GB': {'bfloat16': 15.7 * TERA, 'float32': 15.7 * TERA},
    'NVIDIA A100-SXM4-40GB': {'bfloat16': 312 * TERA, 'float32': 156 * TERA},
    'NVIDIA A100-SXM4-80GB': {'bfloat16': 312 * TERA, 'float32': 156 * TERA},
    'NVIDIA L4': {'bfloat16': 121 * TERA, 'float32': 60 * TERA},
    'NVIDIA L40S': {'bfloat16': 362 * TERA, 'float32': 183 * TERA},
    'NVIDIA H100 80GB HBM3': {'bfloat16': 989 * TERA, 'float32': 494.7 * TERA},
    'NVIDIA H200': {'bfloat16': 989 * TERA, 'float32': 494.7 * TERA},
    'NVIDIA B200': {'bfloat16': 2250 * TERA, 'float32': 1125 * TERA},
    'TPU v2': {'bfloat16': 22.5 * TERA, 'float32': 22.5 * TERA},
    'TPU v3': {'bfloat16': 61.5 * TERA, 'float32': 61.5 * TERA},
    'TPU v4': {'bfloat16': 275 * TERA, 'float32': 275 * TERA},
    'TPU v5 lite': {'bfloat16': 197 * TERA, 'float32': 197 * TERA},
    'TPU v5': {'bfloat16': 459 * TERA, 'float32': 459 * TERA},
    'TPU v6 lite': {'bfloat16': 918 * TERA, 'float32': 918 * TERA},
}


def cpu_cores() -> int:
    """The cores that this process may use, and so the threads that XLA has on a CPU unless NPROC says how many."""
    given = os.environ.get('NPROC', '')
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count() or 1


def peak_flops(device: Any, dtype: str) -> float | None:
    """Peak FLOP/s of one device for `dtype` ('float32' or 'bfloat16'); None where it is not known."""
    return PEAKS.get(device.device_kind, {}).get(dtype)


def utilisation(flops_per_second: float, devices: Sequence[Any], dtype: str) -> float | None:
    """Model FLOPs utilisation: the model's FLOP/s over the peak of all devices; None where the peak is not known."""
    peaks = [peak_flops(device, dtype) for device in devices]
    return None if None in peaks or not peaks else flops_per_second / sum(p for p in peaks if p is not None)
