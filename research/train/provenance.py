"""Where a run comes from: the command, the code, the versions and the devices, written before step 0, without secrets.

provenance()['git']  # {'commit': '1974d70...', 'diff': '+login(token="[redacted]")'}
"""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import jax

from research.core.redact import redact

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'tensorflow-datasets', 'grain', 'ml-collections')
FLAGS = ('XLA_FLAGS', 'JAX_PLATFORMS', 'LIBTPU_INIT_ARGS', 'CUDA_VISIBLE_DEVICES')
MAX_DIFF = 200_000  # characters


def provenance() -> dict[str, Any]:
    """Everything beside the config that a rerun must have the same."""
    devices = jax.devices()
    return {
        'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
        'argv': redact(sys.argv),
        'git': {'commit': _git('rev-parse', 'HEAD'), 'diff': _difference()},
        'python': platform.python_version(),
        'packages': {name: _version(name) for name in PACKAGES},
        'platform': devices[0].platform,
        'devices': {'kind': devices[0].device_kind, 'count': len(devices), 'processes': jax.process_count()},
        'environment': redact({name: os.environ[name] for name in FLAGS if name in os.environ}),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _difference() -> str:
    """What the code has that its commit has not. Of a long one whole lines are kept: half a secret has no known form."""
    text = _git('diff', '--no-color', '--no-ext-diff', 'HEAD') or ''
    if len(text) > MAX_DIFF:
        text = text[:MAX_DIFF].rpartition('\n')[0]
    return redact(text)


def _git(*arguments: str) -> str | None:
    """What git says of this code; None where there is no git or no repository."""
    try:
        command = ['git', '-C', str(ROOT), *arguments]  # no user input in it
        done = subprocess.run(command, capture_output=True, check=True, timeout=10)  # noqa: S603
        return done.stdout.decode(errors='replace').strip()  # the code may be in any encoding
    except (OSError, subprocess.SubprocessError):
        return None
