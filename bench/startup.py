"""How long the quick start takes from the command to its first training step, and where that time goes.

    python -m bench.startup                       # on all cores, on a quiet machine; about five minutes

The command is the README's, `python launch.py --config=configs/digits_cnn.py`, with a new run directory and with
`log.every=1 steps`: then the line of step 1 is printed when the numbers of that step have come back from the device and are in
metrics.jsonl, so that the step is done and not only begun. Its arrival is timed here, outside the process. Each round runs it
*cold* (an empty compilation cache) and then *warm* (with what the cold run has left in the cache); the first round is not
counted, so that files are in the page cache and compiled to bytecode. Without bytecode: for information.

The parts come from processes of their own (`--timeline`), which call `launch.main` and time its parts from inside: the total
there is that of the real command but for a few hundredths of a second. The step is compiled in a thread meanwhile;
only what is left to wait for at the end counts.
"""

import argparse
import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from bench.report import ROOT, Report
from research.core import guardian

QUICK_START = ('--config=configs/digits_cnn.py', '--config.log.every=1 steps')
COLD_S, WARM_S, HELP_S = 6.0, 4.0, 0.5
FIRST_STEP = 'step 1/'
IMPORTS = {'import launch (flags, schema)': ('launch',), 'import jax': ('jax',), 'import flax, optax': ('flax.linen', 'optax')}
IMPORTS |= {'import the rest': ('research.train.loop',)}
# (name, module, what is called in it); a part that is called within another is not counted there.
CALLS = (
    ('config', 'research.core.config_file', 'resolve'),
    ('devices', 'research.parallel.mesh', 'make_mesh'),
    ('data', 'research.train.loop', 'build_splits'),
    ('FLOPs of a step', 'research.train.build', 'measure'),
    ('abstract state and step', 'research.train.build', 'make_parts'),
    ('provenance (git)', 'research.train.loop', 'provenance'),
    ('table of the model', 'research.train.flops', 'table'),
    ('first state (compiled or read, run)', 'research.train.start', 'first_state'),
)


class Timeline:
    """Seconds by part of this process; what belongs to no part is 'other'."""

    def __init__(self, since: float):
        self.seconds: dict[str, float] = {'interpreter': time.monotonic() - since}
        self._since = since

    def part(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, timed as `name`."""

        def timed(*arguments: Any, **options: Any) -> Any:
            began, inner = time.monotonic(), sum(self.seconds.values())
            try:
                return work(*arguments, **options)
            finally:
                nested = sum(self.seconds.values()) - inner
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began - nested

        return timed

    def done(self) -> dict[str, float]:
        """All parts, now that the first step is done."""
        total = time.monotonic() - self._since
        return {**self.seconds, 'other': total - sum(self.seconds.values()), 'total': total}


def timeline(workdir: str) -> None:
    """In a process of its own: trains up to the first record, and prints the seconds by part as a line of JSON."""
    line = Timeline(guardian.process_start())
    for name, modules in IMPORTS.items():
        for module in modules:
            line.part(name, importlib.import_module)(module)
    for name, module, what in CALLS:
        place = importlib.import_module(module)
        setattr(place, what, line.part(name, getattr(place, what)))
    from research.train import audit, build, writer

    begin = line.part('the step (traced)', build.compiling)
    setattr(build, 'compiling', lambda *parts: line.part('the step (waiting for it)', begin(*parts)))  # noqa: B010
    audit.Audit.__call__ = line.part('first step (called)', audit.Audit.__call__)

    def write(*_: Any) -> None:
        sys.__stderr__.write(f'{json.dumps(line.done())}\n')  # type: ignore[union-attr]
        os._exit(0)

    setattr(writer.Writer, 'write', write)  # noqa: B010
    importlib.import_module('launch').main(['launch.py', *QUICK_START, f'--workdir={workdir}'])


def environment(cache: pathlib.Path, **more: str) -> dict[str, str]:
    """Where the only compilation cache is `cache`, and Python keeps bytecode, as it does unless told otherwise."""
    other = ('JAX_COMPILATION', 'JAX_PERSISTENT', 'PYTHONDONTWRITEBYTECODE', 'PYTHONPYCACHEPREFIX')
    kept = {name: value for name, value in os.environ.items() if not name.startswith(other)}
    return {**kept, 'FULCRUM_CACHE': str(cache), **more}


def first_step(folder: pathlib.Path, variables: Mapping[str, str]) -> float:
    """Seconds from the command to the line of step 1.

    Raises:
      RuntimeError: the command ended before, or the step is not on record.
    """
    command, began = [sys.executable, 'launch.py', *QUICK_START, f'--workdir={folder}'], time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, env=dict(variables), stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stdout is not None
        found = any(line.startswith(FIRST_STEP) for line in process.stdout)
        seconds = time.monotonic() - began
        process.kill()
    if not found or json.loads((folder / 'metrics.jsonl').read_text().split('\n')[0])['step'] != 1:
        raise RuntimeError(f'{command} has not come to its first step')
    return seconds


def parts(folder: pathlib.Path, variables: Mapping[str, str]) -> dict[str, float]:
    """Seconds by part, from a process that times itself."""
    command = [sys.executable, '-m', 'bench.startup', '--timeline', str(folder)]
    done = subprocess.run(  # noqa: S603
        command, cwd=ROOT, env=dict(variables), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stderr.strip().split('\n')[-1])


def help_text() -> float:
    """Seconds of `launch.py --help`."""
    began = time.monotonic()
    subprocess.run([sys.executable, 'launch.py', '--help'], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - began


def measured(measure: Callable[..., Any], runs: int, **more: str) -> dict[str, list[Any]]:
    """What `measure` gives cold and warm in `runs` rounds, each with a cache and run directories of its own."""
    found: dict[str, list[Any]] = {'cold': [], 'warm': []}
    for number in range(runs + 1):
        with tempfile.TemporaryDirectory() as folder:
            variables = environment(pathlib.Path(folder) / 'cache', **more)
            for kind, values in found.items():
                value = measure(pathlib.Path(folder) / kind, variables)
                if number:
                    values.append(value)
    return found


def without_bytecode(runs: int) -> dict[str, list[float]]:
    """Cold and warm where no module is compiled to bytecode."""
    with tempfile.TemporaryDirectory() as folder:  # Python looks for bytecode there, and finds none
        return measured(first_step, runs, PYTHONPYCACHEPREFIX=folder, PYTHONDONTWRITEBYTECODE='1')


def table(found: Mapping[str, list[dict[str, float]]]) -> list[str]:
    """Medians of the seconds by part."""
    names = list(dict.fromkeys(name for runs in found.values() for run in runs for name in run))
    medians = {name: [statistics.median(run.get(name, 0.0) for run in runs) for runs in found.values()] for name in names}
    rows = [f'| {name} | ' + ' | '.join(f'{value:.3f}' for value in values) + ' |' for name, values in medians.items()]
    return ['| seconds, medians | ' + ' | '.join(found) + ' |', '|---|' + '---|' * len(found), *rows]


def main() -> None:
    """Prints the lines and the table of BENCHMARKS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, default=9, help='fresh processes of each kind')
    parser.add_argument('--output', type=pathlib.Path, help='a JSON file for all results')
    parser.add_argument('--timeline', metavar='WORKDIR', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.timeline:
        return timeline(options.timeline)
    report = Report()
    seconds, helps = measured(first_step, options.runs), [help_text() for _ in range(options.runs)]
    report.bound('first step done, cold', seconds['cold'], COLD_S, 's')
    report.bound('first step done, warm', seconds['warm'], WARM_S, 's')
    report.bound('launch.py --help', helps, HELP_S, 's')
    bare = without_bytecode(3)
    report.say('without bytecode: ' + ', '.join(f'{kind} {statistics.median(bare[kind]):.3f} s' for kind in bare) + ' (n = 3)')
    timelines = measured(parts, options.runs)
    for line in table(timelines):
        report.say(line)
    report.end(options.output, {'first_step': seconds, 'help': helps, 'without_bytecode': bare, 'parts': timelines})
    return None


if __name__ == '__main__':
    main()
