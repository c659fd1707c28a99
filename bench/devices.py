"""One device against eight simulated ones, under jit and pmap: the largest difference of the training loss, step by step.

    python -m bench.devices --config=configs/digits_cnn.py --config.train.duration='60 steps'

Every arm is a process of its own on the CPU, started as a user would start it.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

from research.train.run_directory import RunDirectory

ROOT = pathlib.Path(__file__).parents[1]
ARMS = {'one device, jit': (1, 'jit'), 'eight devices, jit': (8, 'jit'), 'eight devices, pmap': (8, 'pmap')}


def losses(arguments: list[str], devices: int, kind: str) -> list[float]:
    """The training loss of every step of one run."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*arguments, '--config.log.every=1 step', f'--config.parallel.compile={kind}', f'--workdir={folder}']
        environment = {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'}
        command = [sys.executable, str(ROOT / 'launch.py'), *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **environment}, cwd=ROOT)  # noqa: S603
        return [record['loss'] for record in RunDirectory(folder).read_metrics() if record['split'] == 'train']


def main(arguments: list[str]) -> None:
    """Runs the arms and prints a Markdown table."""
    found = {name: losses(arguments, *arm) for name, arm in ARMS.items()}
    reference = next(iter(found.values()))
    print('| arm | steps | largest difference of the loss | last loss |')
    print('|---|---|---|---|')
    for name, values in found.items():
        difference = max(abs(a - b) for a, b in zip(reference, values, strict=True))
        print(f'| {name} | {len(values)} | {difference:.2e} | {values[-1]:.8f} |')


if __name__ == '__main__':
    main(sys.argv[1:])
