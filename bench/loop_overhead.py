"""What the training loop adds to the bare step: the reference program with all its hooks against the jitted step alone.

    python -m bench.loop_overhead --output=loop_overhead.json

`loop`: `train` at the defaults of config `cifar10_cnn` (records, progress, guard, checkpoints, watchdog; `bench/paced.py`).
`bare`: the compiled step of the same experiment without the guard of non-finite numbers, on batches that are on the device
already, dispatched as in the loop (`train/in_flight.py`). `guarded`: with the guard, the very program of the loop. The loop is
held against the faster of the two, for XLA may make the one with less to do the slower. `again`: a second process of `guarded`.
All read their programs from the compilation cache, as every run does but the first, and begin anew `--starts` times: two
processes of one program differ by more, as long as they live, than what is looked for here. Pinned to one core, where nothing
runs beside the step for free. Where the time of the loop goes tells `bench/loop_profile.py`.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import statistics
import sys
import tempfile
from typing import Any

from bench.arms import PINNED, Rounds, Worker, compared, interleave, serve, timed
from bench.reference_cnn import experiment, write_images
from bench.report import Report

BLOCKS = {32: 200, 256: 30}  # steps in a block, by batch: long enough that what a process finds cold at its start is little
ALLOWED = {32: 0.03, 256: 0.01}  # of a step, by batch
ARMS = {'loop': 'loop', 'bare': 'bare', 'guarded': 'guarded', 'again': 'guarded'}


class Bare:
    """The compiled step and batches that wait on the device."""

    def __init__(self, path: str, batch: int, guarded: bool = False):
        import jax

        from research.data.build import build_splits
        from research.data.pipeline import make_feed
        from research.data.plan import plan_of
        from research.parallel import memory
        from research.parallel import mesh as meshes
        from research.train import build
        from research.train.in_flight import InFlight

        full = experiment(path, 'jit', batch)
        settings = dataclasses.replace(full, train=dataclasses.replace(full.train, skip_nonfinite=guarded))
        mesh = meshes.make_mesh()
        splits, spec = build_splits(settings.data)
        task = build.make_task(settings, spec)
        facts = build.measure(settings, task, spec, splits['train'])
        parts = build.make_parts(settings, task, spec, mesh, build.learning_rate(settings.optimizer, facts))
        feed = make_feed(splits['train'], plan_of(splits['train'], batch, 0), meshes.batch_sharding(mesh), 'host')
        self.batches = [jax.device_put(feed(k), meshes.batch_sharding(mesh)) for k in range(8)]
        self.state, self.step, self.done = parts.init(), build.compile_parts(parts, settings, mesh), 0
        self.in_flight = InFlight(mesh)
        memory.close_gaps()

    def steps(self, count: int) -> None:
        """Takes steps and waits for the last."""
        import jax

        for _ in range(count):
            batch = self.batches[self.done % len(self.batches)]
            self.state, terms = self.step(self.state, batch)
            self.done += 1
            self.in_flight.add(terms, batch)
        jax.block_until_ready(self.state)


def work(kind: str, path: str) -> None:
    """The process of an arm."""
    if kind == 'loop':
        from bench.paced import serve_run

        return serve_run(lambda request: experiment(path, 'jit', request['batch']))
    from research.parallel import cache, memory

    cache.enable()
    memory.keep_freed()
    arms: dict[int, Bare] = {}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request['batch'] not in arms:
            arms[request['batch']] = Bare(path, request['batch'], kind == 'guarded')
        return timed(lambda: arms[request['batch']].steps(request['count']))

    return serve(answer)


def measure(path: str, core: int, batch: int, rounds: int, starts: int) -> Rounds:
    """The rounds of all arms, whose processes begin anew so many times, after one that compiles what they read."""
    found: Rounds = []
    for start in range(starts + 1):
        with contextlib.ExitStack() as stack:
            command = [sys.executable, '-m', 'bench.loop_overhead', '--worker']
            workers = {name: stack.enter_context(Worker([*command, kind, path], core, PINNED)) for name, kind in ARMS.items()}
            request = {'do': 'steps', 'batch': batch, 'count': BLOCKS[batch]}
            interleave(workers, request, 3 if start else 1)
            if start:
                found.extend(interleave(workers, request, -(-rounds // starts), start))
    return found


def tell(report: Report, found: Rounds, batch: int) -> None:
    """The loop beside the bare step."""
    for name in ARMS:
        milliseconds = statistics.median(r[name]['seconds'] for r in found) / BLOCKS[batch] * 1e3
        report.say(f'batch {batch}: {name:7} {milliseconds:7.2f} ms a step')
    same = compared(found, 'again', 'guarded')
    base = min(('bare', 'guarded'), key=lambda name: statistics.median(r[name]['seconds'] for r in found))
    report.ratio(f'batch {batch}, {base} step / loop', compared(found, base, 'loop'), same, 1 / (1 + ALLOWED[batch]))


def main(argv: list[str]) -> None:
    """Runs the comparison and prints its lines; --worker is how it starts its own processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--worker', nargs=2, help=argparse.SUPPRESS)
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--starts', type=int, default=10)
    parser.add_argument('--core', type=int, default=0)
    parser.add_argument('--batches', nargs='*', type=int, choices=tuple(BLOCKS), default=tuple(BLOCKS))
    parser.add_argument('--output', type=pathlib.Path)
    options = parser.parse_args(argv)
    if options.worker:
        return work(*options.worker)
    with tempfile.TemporaryDirectory() as folder:
        path = f'{folder}/images.npz'
        write_images(pathlib.Path(path))
        report, rounds = Report(), {}
        for batch in options.batches:
            rounds[f'batch {batch}'] = measure(path, options.core, batch, options.rounds, options.starts)
            tell(report, rounds[f'batch {batch}'], batch)
        report.end(options.output, {'rounds': rounds})
    return None


if __name__ == '__main__':
    main(sys.argv[1:])
