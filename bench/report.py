"""What every comparison ends with: its conditions, one line for each target, and all of it as JSON.

report = Report({'torch': '2.13.0+cpu'})
ratio, same = compared(rounds, 'keras', 'fulcrum'), compared(rounds, 'again', 'fulcrum')
report.ratio('examples/s, fulcrum / keras', ratio, same, 1.3)
report.bound('first step, warm', [3.1, 3.3, 3.2], 4.0, 's')
report.end(output, {'rounds': rounds})

examples/s, fulcrum / keras: 1.931 [1.902, 1.963], minima 1.940, CPU 1.931 (A/A 1.002 [0.991, 1.010]); target >= 1.3: met
first step, warm: 3.200 s [3.100, 3.300] (n = 3); target <= 4: met
"""

import importlib.metadata
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench.arms import RESAMPLES, Ratio, verdict
from research.core import files

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


class Report:
    """Collects the lines of one comparison; says its conditions at once. `peers`: versions of what is compared with."""

    def __init__(self, peers: Mapping[str, Any] | None = None):
        self.conditions, self.lines = conditions(peers or {}), []
        print(described(self.conditions), flush=True)

    def ratio(self, what: str, ratio: Ratio, same: Ratio, target: float) -> str:
        """The line of a ratio, which should be `target` or more; `same`: of a program with itself. Returns the verdict."""
        found = verdict(ratio, same, target)
        control = f'{same.median:.3f} [{same.low:.3f}, {same.high:.3f}]'
        return self._say(f'{what}: {ratio} (A/A {control}); target >= {target:g}: {found}', found)

    def bound(self, what: str, values: Sequence[float], target: float, unit: str = '', at_least: bool = False) -> str:
        """The line of a quantity that should be at most (or at least) `target`, by the interval of its median."""
        low, high = median_interval(values)
        sides = {(value >= target) if at_least else (value <= target) for value in (low, high)}
        found = 'inconclusive' if len(sides) > 1 else 'met' if sides == {True} else 'not met'
        interval = f'{statistics.median(values):.3f} {unit}'.strip() + f' [{low:.3f}, {high:.3f}] (n = {len(values)})'
        return self._say(f'{what}: {interval}; target {">=" if at_least else "<="} {target:g}: {found}', found)

    def say(self, line: str) -> None:
        """A line that has no target."""
        self._say(line, '')

    def _say(self, line: str, found: str) -> str:
        self.lines.append(line)
        print(line, flush=True)
        return found

    def end(self, output: pathlib.Path | None, results: Mapping[str, Any]) -> None:
        """Writes all as JSON where `output` asks for it."""
        self.conditions['load at end'] = round(os.getloadavg()[0], 2)
        if output is not None:
            files.write_json(output, {'lines': self.lines, 'conditions': self.conditions, **results})


def median_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the median."""
    generator = random.Random(seed)  # noqa: S311
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1]


def conditions(peers: Mapping[str, Any]) -> dict[str, Any]:
    """Where and with what a comparison is made."""
    git = subprocess.run(  # noqa: S603
        ['git', '-C', str(ROOT), 'describe', '--always', '--dirty'],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        'cpu': cpu_name(),
        'cores': os.cpu_count(),
        'load at start': round(os.getloadavg()[0], 2),
        'python': platform.python_version(),
        'packages': {name: importlib.metadata.version(name) for name in PACKAGES},
        'peers': dict(peers),
        'XLA_FLAGS': os.environ.get('XLA_FLAGS', ''),
        'commit': git.stdout.strip(),
        'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
        'argv': sys.argv,
    }


def described(found: Mapping[str, Any]) -> str:
    """The conditions on one line."""
    versions = ', '.join(f'{name} {version}' for name, version in {**found['packages'], **found['peers']}.items())
    return (
        f'{found["cpu"]}, {found["cores"]} cores, load {found["load at start"]}, Python {found["python"]}, {versions}, '
        f'commit {found["commit"]}'
    )


def cpu_name() -> str:
    """The processor as Linux names it."""
    info = pathlib.Path('/proc/cpuinfo')
    lines = info.read_text().split('\n') if info.exists() else []
    return next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), platform.processor())
