"""What a step takes of memory, what gradient checkpointing and accumulation save of it and cost in time, and whether runs leak.

    taskset -c 0 python -m bench.memory --output=memory.json

Each arm is a process of its own that takes steps of one experiment. *Working memory* is what XLA sets aside for the step beside
the state and the batch (`memory_analysis`), *peak* what the process has held more in memory during the first steps than
before them, when what the compiler had freed was given back. Times are compared in blocks, in shuffled order (`bench/arms.py`).

The leak gate runs `launch.py` with ten times the steps, records, evaluations and checkpoints, and compares the peaks of whole
processes; `tests/train/test_leaks.py` asserts the same within one process.
"""

import argparse
import ctypes
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from bench.arms import PINNED, Worker, compared, interleave, serve, timed
from bench.report import ROOT, Report

GPT = ('configs/docs_gpt.py', 'model.depth=8', 'data.transforms=windows(length=256)', 'data.batch_size=16')
CNN = ('configs/digits_cnn.py', 'data.batch_size=512')
CASES: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    'GPT of 8 layers, 16 x 256 tokens': (
        GPT,
        {
            'neither': (),
            'remat=dots': ('model.remat=dots',),
            'remat=full': ('model.remat=full',),
            'scan, remat=full': ('model.scan=true', 'model.remat=full'),
            'accumulate=4': ('train.accumulate=4',),
            'accumulate=16': ('train.accumulate=16',),
            'accumulate=4, scan, remat=full': ('train.accumulate=4', 'model.scan=true', 'model.remat=full'),
        },
    ),
    'CNN of the digits, batch 512': (
        CNN,
        {'accumulate=1': ('train.accumulate=1',), 'accumulate=8': ('train.accumulate=8',), 'none chosen by hand': ()},
    ),
}
STEPS = 3  # of a block
LEAK = ('--config=configs/digits_cnn.py', '--config.log.every=5 steps', '--config.evaluate.every=10 steps',
        '--config.checkpoint.every=10 steps', '--config.data.batch_size=32')  # fmt: skip
LEAK_STEPS = (100, 1000)
LEAK_ALLOWED = 1.05  # times the peak of the short run


def resident(field: str) -> int:
    """Bytes that this process holds in memory, now (VmRSS) or at most so far (VmHWM)."""
    found = re.search(rf'{field}:\s+(\d+) kB', pathlib.Path('/proc/self/status').read_text())
    assert found is not None
    return int(found[1]) * 1024


class Stepper:
    """One experiment, step by step."""

    def __init__(self, path: str, overrides: list[str]):
        from research.core import config_file
        from research.data.build import build_splits
        from research.data.pipeline import make_feed
        from research.data.plan import plan_of
        from research.parallel import compile as compilation
        from research.parallel import mesh as meshes
        from research.train import build

        experiment, mesh = config_file.resolve(path, overrides), meshes.make_mesh(1)
        splits, spec = build_splits(experiment.data)
        task = build.make_task(experiment, spec)
        facts = build.measure(experiment, task, spec, splits['train'])
        parts = build.make_parts(experiment, task, spec, mesh, build.learning_rate(experiment.optimizer, facts))
        plan = plan_of(splits['train'], experiment.data.batch_size, 0)
        feed = make_feed(splits['train'], plan, meshes.batch_sharding(mesh), 'host')
        self.batches, self.state, self.done = [feed(k) for k in range(4)], parts.init(), 0
        program = compilation.lower_jit(parts.step, mesh, parts.batch, parts.abstract)()
        analysis = program.memory_analysis()
        assert analysis is not None  # XLA's CPU client has one
        self.working, self.step, self.microbatches = analysis.temp_size_in_bytes, program, parts.microbatches

    def steps(self, count: int) -> None:
        """Takes steps and waits for the last."""
        import jax

        for _ in range(count):
            self.state, _ = self.step(self.state, self.batches[self.done % len(self.batches)])
            self.done += 1
        jax.block_until_ready(self.state)


def work(path: str, overrides: list[str]) -> None:
    """The process of an arm."""
    from research.parallel import memory

    stepper = Stepper(path, overrides)
    ctypes.CDLL(None).malloc_trim(0)
    memory.keep_freed()
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # the most so far is what it is now
    before = resident('VmRSS')
    stepper.steps(STEPS)
    facts = {'working': stepper.working, 'peak': resident('VmHWM') - before, 'microbatches': stepper.microbatches}
    serve(lambda request: {**timed(lambda: stepper.steps(STEPS)), **facts})


def measure(report: Report, name: str, rounds: int) -> list[Any]:
    """The table of one case."""
    (path, *common), arms = CASES[name]
    base = next(iter(arms))
    workers = {
        arm: Worker([sys.executable, '-m', 'bench.memory', '--worker', path, *common, *more], None, PINNED)
        for arm, more in {**arms, 'A/A': arms[base]}.items()
    }
    interleave(workers, {}, 1)
    found = interleave(workers, {}, rounds)
    for worker in workers.values():
        worker.__exit__()
    report.say(f'| {name} | working memory, MB | peak of the step, MB | ms a step | time / time of the first |')
    report.say('|---|---|---|---|---|')
    for arm in workers:
        first, ratio = found[0][arm], compared(found, arm, base)
        seconds = statistics.median(r[arm]['seconds'] for r in found) / STEPS
        label = f'{arm} ({first["microbatches"]:.0f} microbatches)' if 'chosen' in arm else arm
        memory = f'{first["working"] / 1e6:.1f} | {first["peak"] / 1e6:.1f}'
        report.say(f'| {label} | {memory} | {seconds * 1e3:.1f} | {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] |')
    return found


def peak_of_run(steps: int, folder: str) -> float:
    """The most memory, in bytes, that a run of so many steps has held."""
    command = [sys.executable, 'launch.py', *LEAK, f'--config.train.duration={steps} steps', f'--workdir={folder}/{steps}']
    variables = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'FULCRUM_CACHE': f'{folder}/cache'}
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL) as process:  # noqa: S603
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f'{command} ended with code {process.returncode}')
    return usage.ru_maxrss * 1024.0


def main(argv: list[str]) -> None:
    """Prints the tables and the line of the leak gate; --worker is how it starts its own processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--worker', nargs='+', help=argparse.SUPPRESS)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--runs', type=int, default=3, help='of each length, for the leak gate')
    parser.add_argument('--output', type=pathlib.Path)
    options = parser.parse_args(argv)
    if options.worker:
        return work(options.worker[0], options.worker[1:])
    report, peaks = Report(), []
    with tempfile.TemporaryDirectory() as folder:
        peak_of_run(1, folder)  # compiles
        for number in range(options.runs):
            short, long = (peak_of_run(steps, f'{folder}/{number}') for steps in LEAK_STEPS)
            peaks.append((short, long))
    report.say(f'peaks of runs of {LEAK_STEPS} steps, MB: ' + ', '.join(f'{a / 1e6:.0f} and {b / 1e6:.0f}' for a, b in peaks))
    report.bound('peak of ten times the steps / peak', [long / short for short, long in peaks], LEAK_ALLOWED)
    rounds = {name: measure(report, name, options.rounds) for name in CASES}
    return report.end(options.output, {'rounds': rounds, 'peaks': peaks})


if __name__ == '__main__':
    main(sys.argv[1:])
