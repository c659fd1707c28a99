"""The input pipeline alone, against tf.data, Grain and PyTorch's DataLoader: augmented batches from memory, and JPEG files.

    python -m venv .venv-bench && .venv-bench/bin/pip install -r requirements/bench.txt
    python -m bench.data fetch fashion_mnist
    python -m bench.input --rounds=24
    python -m bench.input --rounds=24 --all-cores      # nothing pinned; threads and worker processes as they like

In memory: the 60,000 images of Fashion-MNIST, shuffled, cropped at random after padding by 4, half of them mirrored, in batches
of 256 and of 32. Fulcrum's arms wait for each augmented batch: 'host' and 'device' are the two placements, 'feed' is 'host'
without its augmentation. The augmentation is a jitted function of its own here; in training it is a part of the step. 'again'
is a second process of 'host'. Each peer has several pipelines (its file tells), of which the fastest is measured. Pipelines
called 'blocks' gather whole batches by hand, as Fulcrum does and as the peers' own examples do not: they have their own line.

Files: JPEG of 256 x 256 (the same images, scaled), of which 224 x 224 are cut out, by so many threads or processes.

Every process is pinned to one core, has one thread for arithmetic, and has taken some batches before the clock starts.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bench.arms import PINNED, Rounds, Worker, compared, interleave, serve, timed
from bench.report import ROOT, Report
from research.core import schema
from research.data.build import build_splits
from research.data.source import Source

TARGET = 5.0
BATCHES, EXAMPLES = (256, 32), 51_200  # examples of one block
TRIAL = 12_800  # examples of the blocks that choose a pipeline
FILES, SIDE, SIZE, JPEG_BATCH, JPEG_EXAMPLES = 640, 256, 224, 32, 640
THREADS = (1, 2, 8)  # the last is the source's default
PEERS = ('tf', 'grain', 'torch')
AUGMENT = ('pad_crop(padding=4)', 'flip')
QUIET = {'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': '', 'JAX_PLATFORMS': 'cpu'}
AHEAD = 2  # batches read ahead where there is more than one core


def experiment() -> schema.Experiment:
    """The data section: the whole training split, augmented."""
    config = schema.default_config()
    config.data.source = 'fashion_mnist'
    config.data.validation = 0.0
    config.data.augment = AUGMENT
    return schema.resolve(config)


def batches_of(source: Source, size: int, variant: str, ahead: int) -> Iterator[Any]:
    """The endless finished batches of a placement; of 'feed' those without augmentation."""
    import jax

    from research.core import rng
    from research.data.build import build_augmentation
    from research.data.pipeline import Prefetcher, make_feed
    from research.data.plan import plan_of
    from research.parallel import mesh as meshes

    settings = experiment()
    sharding = meshes.batch_sharding(meshes.make_mesh(1))
    feed = make_feed(source, plan_of(source, size, settings.seed), sharding, 'device' if variant == 'device' else 'host')
    augmentation = build_augmentation(settings.data.augment)

    @jax.jit
    def augmented(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:  # the keys are those of train/step.py
        keys = rng.example_keys(rng.key(settings.seed, 'augment'), batch['id'], batch['epoch'])
        return augmentation(keys, batch)

    finish = augmented if variant in ('host', 'device') else lambda batch: batch
    with Prefetcher(lambda step: finish(feed(step)), 0, ahead) as batches:
        step = 0
        while True:
            yield jax.block_until_ready(batches(step))
            step += 1


def folder_of(folder: str, workers: int) -> Source:
    """The JPEG files as Fulcrum reads them."""
    from research.data.sources.image_folder import image_folder

    return image_folder(dir=folder, image_size=SIZE, workers=workers).splits['all']


def work(folder: str, ahead: int) -> None:
    """The process of Fulcrum's arms; see `peers/input_peer.py` for what it answers."""
    from research.parallel import memory

    memory.keep_freed()
    batches: Iterator[Any] = iter(())

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal batches
        if request['do'] == 'use':
            name, _, count = request['variant'].partition('=')
            source = folder_of(folder, int(count)) if count else build_splits(experiment().data)[0]['train']
            batches = batches_of(source, request['batch'], name, ahead)
            image = next(batches)['image']
            return {'shape': list(image.shape), 'dtype': str(image.dtype)}
        collections.deque(itertools.islice(batches, 2 * ahead), maxlen=0)  # what was read ahead of the clock
        return timed(lambda: collections.deque(itertools.islice(batches, request['count']), maxlen=0))

    serve(answer)


def write_data(folder: pathlib.Path) -> None:
    """For the peers: all images in FOLDER/images.npz, and FILES of them in colour as FOLDER/jpeg/CLASS/NUMBER.jpg."""
    from PIL import Image

    train = build_splits(experiment().data)[0]['train']
    block = train[np.arange(len(train))]
    np.savez(folder / 'images.npz', image=block['image'], label=block['label'])
    for number, (image, label) in enumerate(zip(block['image'][:FILES], block['label'][:FILES], strict=True)):
        path = folder / 'jpeg' / str(label) / f'{number}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        scaled = Image.fromarray(image[..., 0]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        scaled.convert('RGB').save(path, quality=90)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all comparisons of one call share.

    Attributes:
      report: takes the lines.
      peer: a Python that has the peers.
      core: of every process; None: any.
      rounds: of each comparison.
      folder: of the files 'images.npz' and 'jpeg'.
    """

    report: Report
    peer: str
    core: int | None
    rounds: int
    folder: pathlib.Path

    def worker(self, command: Sequence[str]) -> Worker:
        """A process on the core."""
        return Worker(command, self.core, QUIET if self.core is None else {**PINNED, **QUIET})

    def ours(self) -> list[str]:
        """The command of Fulcrum's process."""
        ahead = AHEAD if self.core is None else 0
        return [sys.executable, '-m', 'bench.input', '--worker', str(self.folder / 'jpeg'), f'--ahead={ahead}']

    def program(self, name: str) -> list[str]:
        """The command of a peer."""
        arguments = ('jpeg', str(SIZE)) if name == 'jpeg' else ('images.npz',)
        return [self.peer, str(ROOT / f'bench/peers/input_{name}.py'), str(self.folder / arguments[0]), *arguments[1:]]

    def fastest(self, name: str, batch: int, variants: Sequence[str]) -> str:
        """Which of these pipelines of a peer makes the most examples a second."""
        found = {}
        with self.worker(self.program(name)) as worker:
            for variant in variants:
                worker.ask({'do': 'use', 'variant': variant, 'batch': batch})
                blocks = [worker.ask({'do': 'batches', 'count': TRIAL // batch})['seconds'] for _ in range(6)]
                found[variant] = TRIAL / min(blocks[1:])
        speeds = ', '.join(f'{variant} {speed:,.0f}' for variant, speed in found.items())
        self.report.say(f'pipelines of {name}, batch {batch}, examples/s: {speeds}')
        return max(found, key=lambda variant: found[variant])

    def compare(self, arms: Mapping[str, tuple[Sequence[str], str]], batch: int, examples: int) -> Rounds:
        """The rounds of arms (command, pipeline), and the table of their speeds.

        Raises:
          RuntimeError: their batches are not alike.
        """
        request = {'do': 'batches', 'count': examples // batch}
        with contextlib.ExitStack() as stack:
            workers = {name: stack.enter_context(self.worker(command)) for name, (command, _) in arms.items()}
            uses = {name: {'do': 'use', 'variant': variant, 'batch': batch} for name, (_, variant) in arms.items()}
            made = {name: workers[name].ask(use) for name, use in uses.items()}
            if len({str(found) for found in made.values()}) > 1:
                raise RuntimeError(f'the batches differ: {made}')
            interleave(workers, request, 2)  # warms up
            rounds = interleave(workers, request, self.rounds)
        for name in arms:
            seconds = statistics.median(r[name]['seconds'] for r in rounds)
            self.report.say(f'| {batch} | {name} | {request["count"] * batch / seconds:,.0f} |')
        return rounds


def quickest(rounds: Rounds, names: Sequence[str]) -> str:
    """The arm with the least median."""
    return min(names, key=lambda name: statistics.median(r[name]['seconds'] for r in rounds))


def in_memory(bench: Bench, known: Mapping[str, Sequence[str]], batch: int) -> Rounds:
    """Compares the pipelines from memory at one batch size; `known`: those of each peer."""
    arms: dict[str, tuple[Sequence[str], str]] = {name: (bench.ours(), name) for name in ('host', 'device', 'feed')}
    arms['again'] = (bench.ours(), 'host')
    left_out = ('blocks',) if bench.core is None else ('blocks', 'workers')  # two processes on one core only cost
    for name, variants in known.items():
        best = bench.fastest(name, batch, [variant for variant in variants if variant not in left_out])
        arms |= {f'{name} {variant}': (bench.program(name), variant) for variant in variants if variant in (best, 'blocks')}
    rounds = bench.compare(arms, batch, EXAMPLES)
    same = compared(rounds, 'again', 'host')
    peers = [name for name in arms if name.split()[0] in known]
    by_hand = [name for name in peers if name.endswith(' blocks')]
    usual = [name for name in peers if name not in by_hand]
    for base, what in ((quickest(rounds, usual), 'best peer'), (quickest(rounds, by_hand), 'best blocks by hand')):
        for name in ('host', 'device'):
            label = f'examples/s in memory, batch {batch}, fulcrum {name} / {what} ({base})'
            bench.report.ratio(label, compared(rounds, base, name), same, TARGET)
    return rounds


def from_files(bench: Bench, variants: Sequence[str]) -> Rounds:
    """Compares the decoding of JPEG files by numbers of threads (Fulcrum) and of processes (PyTorch)."""
    arms = {f'fulcrum {count}': (bench.ours(), f'jpeg={count}') for count in THREADS}
    arms |= {'again': (bench.ours(), f'jpeg={THREADS[-1]}')}
    peers = {f'torch {variant}': (bench.program('jpeg'), variant) for variant in variants}
    rounds = bench.compare({**arms, **peers}, JPEG_BATCH, JPEG_EXAMPLES)
    default = f'fulcrum {THREADS[-1]}'
    for count in THREADS[1:]:
        scaled = compared(rounds, f'fulcrum {THREADS[0]}', f'fulcrum {count}')
        bench.report.say(f'images/s from JPEG, fulcrum with {count} threads / with {THREADS[0]}: {scaled}')
    base = quickest(rounds, list(peers))
    label = f'images/s from JPEG, {default} threads / best peer ({base})'
    bench.report.ratio(label, compared(rounds, base, default), compared(rounds, 'again', default), 1.0)
    return rounds


def main(argv: list[str]) -> None:
    """Runs the comparisons and prints their tables; --worker is how it starts its own processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    parser.add_argument('--ahead', type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument('--peer', default=str(ROOT / '.venv-bench/bin/python'), help='a Python that has the peers')
    parser.add_argument('--rounds', type=int, default=24)
    parser.add_argument('--core', type=int, default=0)
    parser.add_argument('--all-cores', action='store_true', help='pins nothing; Fulcrum reads ahead in its thread')
    parser.add_argument('--output', type=pathlib.Path)
    options = parser.parse_args(argv)
    if options.worker:
        return work(options.worker, options.ahead)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_data(folder)
        found, versions = {}, {}
        for peer in (*PEERS, 'jpeg'):
            command = [options.peer, str(ROOT / f'bench/peers/input_{peer}.py')]
            with Worker([*command, *(('jpeg', '1') if peer == 'jpeg' else (str(folder / 'images.npz'),))]) as worker:
                answer = worker.ask({'do': 'variants'})
            found[peer], versions = answer['variants'], versions | answer['versions']
        bench = Bench(Report(versions), options.peer, None if options.all_cores else options.core, options.rounds, folder)
        known = {peer: found[peer] for peer in PEERS}
        rounds = {f'memory, batch {batch}': in_memory(bench, known, batch) for batch in BATCHES}
        rounds['files'] = from_files(bench, found['jpeg'])
    return bench.report.end(options.output, {'rounds': rounds})


if __name__ == '__main__':
    main(sys.argv[1:])
