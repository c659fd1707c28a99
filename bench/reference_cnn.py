"""The reference program (config `cifar10_cnn`) against the Keras tutorial and PyTorch: examples/s, and seconds to an accuracy.

    python -m venv .venv-bench && .venv-bench/bin/pip install -r requirements/bench.txt
    python -m bench.data fetch fashion_mnist
    python -m bench.reference_cnn --output=reference_cnn.json

Whole training loops as users run them, on the same tensors: Fashion-MNIST padded to 32 x 32 and repeated over three
channels, since CIFAR-10 is in no package. Fulcrum: `train` with all its hooks at the config's defaults (`bench/paced.py`).
Keras: the tutorial's `model.fit`. PyTorch: a plain loop, channels-last, fused Adam. Persistent processes, begun anew after a
third of the rounds, take blocks of steps in shuffled order; `again` is a second process of Fulcrum. Both read their program
from the compilation cache, as every run does but the first; `first run` compiles it. Pinned to one core each has one thread;
on all cores each has its defaults, and only a quiet machine tells anything there. `pmap` is Fulcrum with a device for each
core. With `--tuned` the peers have what `parallel/memory.py` gives Fulcrum: memory that is kept, in huge pages. No program
shows its progress: Keras has `verbose=0`, and the output of the others is no terminal.

Seconds to 85 % on the 10,000 test images are those of training alone: every 100 steps the clock stands while it is evaluated.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import numpy as np

from bench.arms import PINNED, TUNED, Rounds, Worker, compared, interleave
from bench.report import Report
from research.core import config_file, schema
from research.core.schema import Experiment

ROOT = pathlib.Path(__file__).parents[1]
TARGETS = {'pinned': {'keras': 1.3, 'pytorch': 1.2}, 'all cores': {'keras': 1.0, 'pytorch': 1.0}}
BLOCKS = {32: 40, 256: 12}  # steps in a block, by batch
STARTS = 3  # times that all processes begin anew: a process may be faster than its twin as long as it lives
UNTIL = {'do': 'accuracy', 'batch': 32, 'every': 100, 'target': 0.85, 'most': 4000}


def experiment(path: str, kind: str, batch: int, seed: int = 0) -> Experiment:
    """`cifar10_cnn` on the arrays of a file, compiled by `kind`."""
    plain = config_file.load('configs/cifar10_cnn.py')
    changes = {'data.source': f'npz(path={path!r})', 'data.batch_size': str(batch), 'seed': str(seed), 'parallel.compile': kind}
    for key, value in changes.items():
        config_file.override(plain, key, value)
    return schema.resolve(plain)


def work(path: str, kind: str) -> None:
    """The process of Fulcrum's arms."""
    from bench.paced import serve_run

    serve_run(lambda request: experiment(path, kind, request['batch'], request.get('seed', 0)))


def write_images(path: pathlib.Path) -> None:
    """Fashion-MNIST in the shape of CIFAR-10."""
    from research.data.sources.fashion_mnist import fashion_mnist

    splits, arrays = fashion_mnist().splits, {}
    for name in ('train', 'test'):
        rows = splits[name][np.arange(len(splits[name]))]
        padded = np.pad(rows['image'], ((0, 0), (2, 2), (2, 2), (0, 0)))  # (n, 32, 32, 1)
        arrays |= {f'x_{name}': np.repeat(padded, 3, axis=3), f'y_{name}': rows['label'].astype(np.int32)}
    np.savez(path, **arrays)


class Arms:
    """The processes, started anew for each mode."""

    def __init__(self, peer: str, path: str, core: int | None, tuned: bool):
        ours = [sys.executable, '-m', 'bench.reference_cnn', '--worker', path]
        by_device = {'XLA_FLAGS': f'--xla_force_host_platform_device_count={os.cpu_count()}'}
        peers = {
            name: [peer, str(ROOT / f'bench/peers/cnn_{file}.py'), path]
            for name, file in (('keras', 'keras'), ('pytorch', 'torch'))
        }
        environment = {} if core is None else PINNED
        of_peers = {**environment, **(TUNED if tuned else {})}
        cached = {'fulcrum': (ours, environment)}
        if core is None:
            cached['pmap'] = [*ours, '--compile=pmap'], {**environment, **by_device}
        for command, variables in cached.values():
            with Worker(command, core, variables) as first:
                for batch in BLOCKS:
                    first.ask({'do': 'steps', 'batch': batch, 'count': 1})  # into the compilation cache
        self._folder = tempfile.TemporaryDirectory()
        others = {'again': (ours, environment), 'first run': (ours, {**environment, 'FULCRUM_CACHE': self._folder.name})}
        self.workers = {n: Worker(command, core, variables) for n, (command, variables) in {**cached, **others}.items()}
        self.workers |= {n: Worker(command, core, of_peers) for n, command in peers.items()}

    def __enter__(self) -> dict[str, Worker]:
        return self.workers

    def __exit__(self, *_: Any) -> None:
        for worker in self.workers.values():
            worker.__exit__()
        self._folder.cleanup()


def timed_rounds(workers: dict[str, Worker], batch: int, rounds: int, seed: int) -> Rounds:
    """The seconds of a block of steps, side by side."""
    request = {'do': 'steps', 'batch': batch, 'count': BLOCKS[batch]}
    interleave(workers, request, 2)
    return interleave(workers, request, rounds, seed)


def tell(report: Report, found: Rounds, mode: str, batch: int) -> None:
    """Examples per second, and the lines of the targets."""
    for name in found[0]:
        median = statistics.median(r[name]['seconds'] for r in found)
        report.say(f'{mode}, batch {batch}: {name:8} {batch * BLOCKS[batch] / median:8,.0f} examples/s')
    for peer, target in TARGETS[mode].items():
        same = compared(found, 'again', 'fulcrum')
        for name in [name for name in ('fulcrum', 'pmap') if name in found[0]]:
            report.ratio(f'{mode}, batch {batch}, examples/s, {name} / {peer}', compared(found, peer, name), same, target)
    report.say(f'{mode}, batch {batch}, examples/s, first run / fulcrum: {compared(found, "fulcrum", "first run")}')


def accuracy(report: Report, workers: dict[str, Worker], seeds: int) -> Rounds:
    """Steps and seconds to the accuracy, a round for each seed."""
    found = [interleave(workers, {**UNTIL, 'seed': seed}, 1, seed)[0] for seed in range(seeds)]
    for name in workers:
        rows = [r[name] for r in found]
        seconds, steps = [r['seconds'] for r in rows], statistics.fmean(r['steps'] for r in rows)
        spread = f'sd {statistics.stdev(seconds):.2f}, {min(seconds):.2f} to {max(seconds):.2f}'
        reached = f'{sum(r["reached"] for r in rows):.0f} of {len(rows)}'
        report.say(
            f'to {UNTIL["target"]:.0%}, batch 32, pinned: {name:8} {statistics.fmean(seconds):6.2f} s ({spread}), {steps:,.0f} '
            f'steps, reached by {reached}'
        )
    for peer in TARGETS['pinned']:
        report.say(f'seconds to {UNTIL["target"]:.0%}, {peer} / fulcrum: {compared(found, peer, "fulcrum")}')
    return found


def main(argv: list[str]) -> None:
    """Runs the comparison and prints its lines; --worker is how it starts its own processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    parser.add_argument('--compile', choices=('jit', 'pmap'), default='jit', help=argparse.SUPPRESS)
    parser.add_argument('--peer', default=str(ROOT / '.venv-bench/bin/python'), help='a Python that has TensorFlow and PyTorch')
    parser.add_argument('--tuned', action='store_true', help="give the peers Fulcrum's settings of the allocator too")
    parser.add_argument('--rounds', type=int, default=24)
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--core', type=int, default=0)
    parser.add_argument('--modes', nargs='*', choices=tuple(TARGETS), default=tuple(TARGETS))
    parser.add_argument('--batches', nargs='*', type=int, choices=tuple(BLOCKS), default=tuple(BLOCKS))
    parser.add_argument('--output', type=pathlib.Path)
    options = parser.parse_args(argv)
    if options.worker:
        return work(options.worker, options.compile)
    with tempfile.TemporaryDirectory() as folder:
        path = f'{folder}/images.npz'
        write_images(pathlib.Path(path))
        rounds: dict[str, Rounds] = {}
        report = None
        for mode in options.modes:
            core = options.core if mode == 'pinned' else None
            found: dict[int, Rounds] = {batch: [] for batch in options.batches if options.rounds}
            for start in range(STARTS):
                with Arms(options.peer, path, core, options.tuned) as workers:
                    if report is None:
                        versions = {k: v for peer in TARGETS[mode] for k, v in workers[peer].ask({'do': 'versions'}).items()}
                        report = Report(versions)
                    for batch, those in found.items():
                        those.extend(timed_rounds(workers, batch, -(-options.rounds // STARTS), start))
                    if mode == 'pinned' and options.seeds and start == STARTS - 1:
                        compared_ones = {name: workers[name] for name in ('fulcrum', *TARGETS[mode])}
                        rounds['accuracy'] = accuracy(report, compared_ones, options.seeds)
            for batch, those in found.items():
                assert report is not None
                tell(report, those, mode, batch)
                rounds[f'{mode}, batch {batch}'] = those
        if report is not None:
            report.end(options.output, {'rounds': rounds})
    return None


if __name__ == '__main__':
    main(sys.argv[1:])
