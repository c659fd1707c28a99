"""What it costs that a run cannot be lost: the guard and the care of each step, the fingerprints and manifest of each save.

    taskset -c 0 python -m bench.overheads

A step: the compiled step without the guard of non-finite numbers, the same again (A/A), with the guard, and with the guard and
what the loop does around each step for the watchdog (phases of the clock, a vote). In blocks of `STEPS` steps, in an order new
in each of `ROUNDS` rounds; ratios above 1 are slower than the bare step. A save: the seconds from the call to a complete
checkpoint with all that proves it, and the seconds of the fingerprints and of the manifest alone.
"""

import dataclasses
import pathlib
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from bench.arms import Rounds, compared, timed
from bench.report import cpu_name
from research.core import config_file, guardian
from research.core.clock import Clock
from research.data.build import build_splits
from research.data.pipeline import make_feed
from research.data.plan import plan_of
from research.parallel import memory
from research.parallel import mesh as meshes
from research.parallel.votes import Votes
from research.train import build, manifest
from research.train.checkpoint import Checkpoints
from research.train.fingerprint import Fingerprints

STEPS, ROUNDS, SAVES = 10, 20, 15
CASES = {
    'digits_cnn': ('configs/digits_cnn.py', []),
    'wide mlp': ('configs/digits_cnn.py', ['model=mlp(hidden=(2048,2048))']),
    'docs_gpt': ('configs/docs_gpt.py', []),
}


class Case:
    """One experiment: its batches, states and steps."""

    def __init__(self, path: str, overrides: list[str]):
        self.experiment = config_file.resolve(path, overrides)
        self.mesh = meshes.make_mesh(1)
        splits, spec = build_splits(self.experiment.data)
        task = build.make_task(self.experiment, spec)
        facts = build.measure(self.experiment, task, spec, splits['train'])
        rate = build.learning_rate(self.experiment.optimizer, facts)
        plan = plan_of(splits['train'], self.experiment.data.batch_size, 0)
        feed = make_feed(splits['train'], plan, meshes.batch_sharding(self.mesh), 'host')
        self.batches = [feed(k) for k in range(8)]
        train = self.experiment.train
        bare = dataclasses.replace(self.experiment, train=dataclasses.replace(train, skip_nonfinite=False))
        guarded = dataclasses.replace(self.experiment, train=dataclasses.replace(train, skip_nonfinite=True))
        make = [
            (name, build.make_parts(e, task, spec, self.mesh, rate), e) for name, e in (('bare', bare), ('guarded', guarded))
        ]
        self.parts = {name: parts for name, parts, _ in make}
        self.compiled = {name: build.compile_parts(parts, e, self.mesh) for name, parts, e in make}

    def rounds(self) -> Rounds:
        """Seconds of a block of steps, by arm."""
        with guardian.watching() as watch, Votes(watch) as votes:
            clock = Clock(watch.enter)
            arms = {
                'bare': self._block('bare'), 'again': self._block('bare'), 'guarded': self._block('guarded'),
                'cared for': self._block('guarded', clock, votes),
            }  # fmt: skip
            for block in arms.values():
                block()
            order, generator, found = list(arms), random.Random(0), []  # noqa: S311 - an order, no secret
            for _ in range(ROUNDS):
                generator.shuffle(order)
                times = {name: timed(arms[name]) for name in order}
                found.append({name: times[name] for name in arms})
        return found

    def saves(self, folder: pathlib.Path) -> dict[str, list[float]]:
        """Seconds of whole saves, of their fingerprints and of their manifests."""
        state = self.parts['guarded'].init()
        found: dict[str, list[float]] = {'save': [], 'fingerprints': [], 'manifest': []}
        for i in range(SAVES + 1):
            shutil.rmtree(folder, ignore_errors=True)
            with Checkpoints(folder) as checkpoints:
                whole = timed(lambda: (checkpoints.save(1, state, {}), checkpoints.wait()))['seconds']
            described = {k: v for k, v in manifest.read(folder / '1').items() if k != 'files'}
            (folder / '1' / manifest.NAME).unlink()
            parts = {
                'save': whole,
                'fingerprints': timed(lambda: Fingerprints(state).by_name())['seconds'],
                'manifest': timed(lambda: manifest.write(folder / '1', described))['seconds'],  # noqa: B023
            }
            if i:  # the first compiles
                for name, seconds in parts.items():
                    found[name].append(seconds)
        return found

    def size(self) -> float:
        """Megabytes of a state."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.parts['guarded'].abstract)) / 1e6

    def _block(self, kind: str, clock: Clock | None = None, votes: Votes | None = None) -> Callable[[], None]:
        state: list[Any] = [self.parts[kind].init()]
        step = self.compiled[kind]

        def plain() -> None:
            for k in range(STEPS):
                state[0], _ = step(state[0], self.batches[k % 8])
            jax.block_until_ready(state[0])

        def cared() -> None:
            assert clock is not None
            assert votes is not None
            with clock.phase('train'):
                for k in range(STEPS):
                    with clock.phase('data'):
                        batch = self.batches[k % 8]
                    votes.agreed('stop')
                    state[0], _ = step(state[0], batch)
                    votes.agreed('save')
                jax.block_until_ready(state[0])

        return plain if clock is None else cared


def main() -> None:
    """Prints the tables of BENCHMARKS.md."""
    memory.keep_freed()
    steps, saves = [], []
    for name, (path, overrides) in CASES.items():
        case = Case(path, overrides)
        rounds = case.rounds()
        ms = 1000 * statistics.median(r['bare']['seconds'] for r in rounds) / STEPS
        ratios = [compared(rounds, other, 'bare') for other in ('again', 'guarded', 'cared for')]
        steps.append(
            f'| {name} | {ms:.2f} | ' + ' | '.join(f'{r.median:.3f} [{r.low:.3f}, {r.high:.3f}]' for r in ratios) + ' |'
        )
        with tempfile.TemporaryDirectory() as folder:
            found = {k: statistics.median(v) for k, v in case.saves(pathlib.Path(folder) / 'c').items()}
        shares = [found[k] / (found['save'] - found['fingerprints'] - found['manifest']) for k in ('fingerprints', 'manifest')]
        saves.append(f'| {name} | {case.size():.1f} | {1000 * found["save"]:.1f} | {shares[0]:.3f} | {shares[1]:.3f} |')
    print('| step of | bare, ms | A/A | with the guard | with guard and care |', '|---|---|---|---|---|', *steps, sep='\n')
    print(
        '\n| save of | state, MB | whole save, ms | fingerprints / rest | manifest / rest |',
        '|---|---|---|---|---|',
        *saves,
        sep='\n',
    )
    print(f'\n{ROUNDS} rounds of {STEPS} steps, {SAVES} saves; medians; {cpu_name()}, jax {jax.__version__}')


if __name__ == '__main__':
    main()
