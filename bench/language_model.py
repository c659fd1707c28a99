"""nanoGPT's CPU recipe, in Fulcrum and in PyTorch, on the same text: final loss over seeds, and tokens per second pinned.

    python -m venv .venv-bench && .venv-bench/bin/pip install -r requirements/bench.txt
    python -m bench.language_model --seeds=5 --rounds=24 --peer=.venv-bench/bin/python

The recipe: 4 layers of width 128, 4 heads, context 64, batch 12, 2,000 steps of AdamW (rate 1e-3 to 1e-4 after 100 steps, beta2
0.99, decay 0.1 of matrices), gradients clipped at norm 1, no dropout. The text is the English that ships with Python (source
'python_docs'), as bytes. Every process is pinned to one core and has one thread.

The training runs give the loss over the whole validation text. The speed is that of the whole step as a run takes it: batch
from the index plan, copy to the device, step (PyTorch: eager, as the recipe says). `repeat` is a second process of Fulcrum;
both have their program from the compilation cache, as any run but the first. --tuned gives PyTorch's process what
`parallel/memory.py` gives Fulcrum's: glibc keeps freed memory, in huge pages.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import numpy as np

from bench.arms import PINNED, TUNED, Worker, compared, interleave, serve, timed, verdict
from bench.report import cpu_name
from research.core import files, schema
from research.data.build import build_splits

ROOT = pathlib.Path(__file__).parents[1]
TARGET = 1.2
STEPS, CONTEXT, BATCH = 2000, 64, 12
MODEL = "decoder(depth=4, width=128, heads=4, max_length=64, activation='gelu_exact', bias=False)"


def experiment(seed: int, steps: int = STEPS) -> schema.Experiment:
    """The recipe as Fulcrum's config."""
    config = schema.default_config()
    config.seed = seed
    config.data.source = 'python_docs'
    config.data.tokenizer = 'byte'
    config.data.transforms = (f'windows(length={CONTEXT})',)
    config.data.batch_size = BATCH
    config.data.evaluation_batch_size = 256
    config.model = MODEL
    config.task = 'language'
    config.optimizer.name = 'adamw'
    config.optimizer.b2 = 0.99
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip = 'global_norm(max_norm=1.0)'
    config.optimizer.schedule = {'name': 'cosine', 'final': 0.1, 'warmup': '100 steps'}
    config.train.duration = f'{steps} steps'
    config.evaluate.every = '0 steps'
    config.evaluate.final = ('validation',)
    config.checkpoint.every = '0 steps'
    return schema.resolve(config)


class Trainer:
    """Fulcrum's compiled step with its feed, step after step."""

    def __init__(self) -> None:
        from research.data.pipeline import make_feed
        from research.data.plan import plan_of
        from research.parallel import memory
        from research.parallel import mesh as meshes
        from research.train import build

        settings = experiment(0)
        mesh = meshes.make_mesh()
        splits, spec = build_splits(settings.data)
        task = build.make_task(settings, spec)
        facts = build.measure(settings, task, spec, splits['train'])
        parts = build.make_parts(settings, task, spec, mesh, build.learning_rate(settings.optimizer, facts))
        self.state, self.compiled = parts.init(), build.compile_parts(parts, settings, mesh)
        memory.close_gaps()
        self._parts = parts
        plan = plan_of(splits['train'], BATCH, settings.seed)
        self.feed = make_feed(splits['train'], plan, meshes.batch_sharding(mesh), settings.data.placement)
        self.step = 0

    @property
    def program(self) -> str:
        """The text of the compiled step."""
        import jax

        lowered = jax.jit(self._parts.step, donate_argnums=0).lower(self._parts.abstract, self._parts.batch)
        return lowered.compile().as_text() or ''

    def steps(self, count: int) -> None:
        """Takes `count` steps and waits for the last."""
        terms: Any = None
        for _ in range(count):
            self.state, terms = self.compiled(self.state, self.feed(self.step))
            self.step += 1
        terms['loss'][0].block_until_ready()


def work() -> None:
    """The process of Fulcrum's arms."""
    from research.parallel import cache, memory
    from research.train.loop import train

    memory.keep_freed()
    cache.enable()
    trainer: list[Trainer] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request['do'] == 'train':
            with tempfile.TemporaryDirectory() as folder:
                summary = train(experiment(request['seed'], request['steps']), folder, quiet=True)
            return {'loss': summary['metrics']['validation']['loss']}
        if not trainer:
            trainer.append(Trainer())
        return timed(lambda: trainer[0].steps(request['count']))

    serve(answer)


def write_text(path: pathlib.Path) -> dict[str, Any]:
    """The same tokens for the peer: the training text, and the validation text in windows; returns what it is."""
    splits, spec = build_splits(experiment(0).data)
    rows = {name: splits[name][np.arange(len(splits[name]))]['tokens'] for name in ('train', 'validation')}
    assert spec.tokenizer is not None
    np.savez(
        path,
        train=rows['train'][:, :-1].reshape(-1),
        validation=rows['validation'],
        vocabulary_size=spec.tokenizer.vocabulary_size,
    )
    return {'training tokens': rows['train'][:, :-1].size, 'validation tokens': rows['validation'][:, :-1].size}


def losses(workers: dict[str, Worker], seeds: int, steps: int) -> dict[str, list[float]]:
    """The validation loss of each arm and seed."""
    found: dict[str, list[float]] = {name: [] for name in workers}
    for seed in range(seeds):
        for name, worker in workers.items():
            found[name].append(worker.ask({'do': 'train', 'seed': seed, 'steps': steps})['loss'])
            print(f'seed {seed}  {name:8} validation loss {found[name][-1]:.4f}', flush=True)
    return found


def equal(found: dict[str, list[float]]) -> str:
    """Whether the means differ by less than two standard errors of their difference."""
    (ours, peer) = found.values()
    difference = statistics.fmean(ours) - statistics.fmean(peer)
    error = (statistics.variance(ours) / len(ours) + statistics.variance(peer) / len(peer)) ** 0.5
    said = 'equal within' if abs(difference) <= 2 * error else 'NOT equal within'
    return f'difference {difference:+.4f}, standard error {error:.4f}: {said} two standard errors (n = {len(ours)})'


def main(argv: list[str]) -> None:
    """Runs the comparison and prints its tables; --worker is how it starts its own processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--peer', default=str(ROOT / '.venv-bench/bin/python'), help='a Python that has PyTorch')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=STEPS)
    parser.add_argument('--rounds', type=int, default=24)
    parser.add_argument('--block', type=int, default=20, help='steps in one round')
    parser.add_argument('--core', type=int, default=0)
    parser.add_argument('--tuned', action='store_true', help="PyTorch with Fulcrum's settings of the allocator")
    parser.add_argument('--output', type=pathlib.Path)
    options = parser.parse_args(argv)
    if options.worker:
        return work()
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(pathlib.Path(folder) / 'text.npz')
        ours = [sys.executable, '-m', 'bench.language_model', '--worker']
        peer = [options.peer, str(ROOT / 'bench/peers/nano_gpt.py'), f'{folder}/text.npz']
        commands = {'fulcrum': ours, 'pytorch': peer, 'repeat': ours}
        with Worker(ours, options.core, PINNED) as first:
            first.ask({'do': 'steps', 'count': 1})  # both arms of Fulcrum then load the same program from the compilation cache
        environments = {'pytorch': {**PINNED, **(TUNED if options.tuned else {})}}
        workers = {n: Worker(command, options.core, environments.get(n, PINNED)) for n, command in commands.items()}
        versions = workers['pytorch'].ask({'do': 'versions'})
        print(f'{cpu_name()}, load {os.getloadavg()[0]:.1f}, peer {versions}, {text}', flush=True)
        found = losses({n: workers[n] for n in ('fulcrum', 'pytorch')}, options.seeds, options.steps) if options.seeds else {}
        rounds = _speed(workers, options.block, options.rounds) if options.rounds else []
        for worker in workers.values():
            worker.__exit__()
    _report(found, rounds, options.block)
    if options.output:
        files.write_json(options.output, {'losses': found, 'rounds': rounds, 'versions': versions, **text})
    return None


def _speed(workers: dict[str, Worker], block: int, rounds: int) -> list[dict[str, dict[str, float]]]:
    """The timed rounds, after one that warms up and compiles."""
    interleave(workers, {'do': 'steps', 'count': block}, 1)
    return interleave(workers, {'do': 'steps', 'count': block}, rounds)


def _report(found: dict[str, list[float]], rounds: list[dict[str, dict[str, float]]], block: int) -> None:
    for name, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else float('nan')
        print(f'| {name} | {statistics.fmean(values):.4f} | {spread:.4f} | n = {len(values)} |')
    if found and min(map(len, found.values())) > 1:
        print('loss:', equal(found))
    if rounds:
        tokens = BATCH * CONTEXT * block
        for name in rounds[0]:
            print(f'| {name} | {tokens / statistics.median(r[name]["seconds"] for r in rounds):,.0f} tokens/s |')
        speed, same = compared(rounds, 'pytorch', 'fulcrum'), compared(rounds, 'repeat', 'fulcrum')
        print(f'A/A (repeat / fulcrum): {same}')
        print(f'tokens/s, fulcrum / pytorch: {speed}; target {TARGET}: {verdict(speed, same, TARGET)}')


if __name__ == '__main__':
    main(sys.argv[1:])
