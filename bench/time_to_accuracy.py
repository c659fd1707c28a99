"""Seconds on one core until Fashion-MNIST is known to 91 % and 93 %: the fast recipe against the plain program.

    python -m bench.data fetch fashion_mnist
    python -m bench.time_to_accuracy --output=time_to_accuracy.json

Both are runs of config `fashion_mnist_cnn` with all hooks (`bench/paced.py`): `recipe=reference`, the tutorial's, for up to
`PLAIN_EPOCHS` epochs, and those of `RECIPES`, `fast` to 91 % and `accurate`, with flips, to 93 %. Every 12,800
examples, and at the end, the clock stands while the 10,000 test images are evaluated; the first time that the target is reached
ends a run. One that never reaches it counts with all its seconds, which makes the ratio a lower bound if it is the plain one's,
and its line says so. The recipe was chosen on the validation split. Seeds are 0 ... n - 1; the arms of a seed run one after the
other, in an order drawn anew. The target, and so a second process of the fast recipe (A/A), is for 91 % alone.
"""

import argparse
import contextlib
import pathlib
import random
import statistics
import sys
from typing import Any

from bench.arms import PINNED, Rounds, Worker, compared, verdict
from bench.report import Report
from research.core import config_file, schema
from research.core.schema import Experiment

TARGET = 4.0  # times faster, to the first accuracy
RECIPES = {0.91: ('fast', 1.4), 0.93: ('accurate', 6)}  # and their epochs, by accuracy
PLAIN_EPOCHS = 15
EVERY = 12_800  # training examples between two evaluations


def experiment(request: dict[str, Any]) -> Experiment:
    """The run of an arm."""
    recipe, epochs = ('reference', PLAIN_EPOCHS) if request['plain'] else RECIPES[request['target']]
    plain = config_file.load(f'configs/fashion_mnist_cnn.py:recipe={recipe},epochs={epochs}')
    for key, value in {'evaluate.every': '0 steps', 'checkpoint.every': '0 steps', 'seed': str(request['seed'])}.items():
        config_file.override(plain, key, value)
    return schema.resolve(plain)


def work() -> None:
    """The process of an arm."""
    from bench.paced import serve_run

    serve_run(experiment)


def one_seed(workers: dict[str, Worker], order: list[str], target: float, seed: int) -> dict[str, dict[str, float]]:
    """Each arm's seconds and steps to the target."""
    answers = {}
    for name in order:
        request = {'do': 'accuracy', 'target': target, 'seed': seed, 'plain': name == 'plain'}
        every = EVERY // experiment(request).data.batch_size
        answers[name] = workers[name].ask({**request, 'every': every})
    return {name: answers[name] for name in workers}


def measure(report: Report, workers: dict[str, Worker], target: float, seeds: int) -> Rounds:
    """Seconds to `target`, a round for each seed."""
    order, generator, found = list(workers), random.Random(0), []  # noqa: S311 - an order, no secret
    for seed in range(seeds):
        generator.shuffle(order)
        found.append(one_seed(workers, order, target, seed))
        report.say(f'to {target:.0%}, seed {seed}: ' + ', '.join(f'{n} {r["seconds"]:.1f} s' for n, r in found[-1].items()))
    for name in workers:
        rows = [r[name] for r in found]
        seconds, steps = [r['seconds'] for r in rows], statistics.fmean(r['steps'] for r in rows)
        reached = sum(r['reached'] for r in rows)
        report.say(
            f'to {target:.0%}: {name:5} {statistics.fmean(seconds):7.1f} s (sd {statistics.stdev(seconds):.1f}, '
            f'{min(seconds):.1f} to {max(seconds):.1f}), {steps:,.0f} steps, reached by {reached:.0f} of {seeds} seeds'
        )
    return found


def tell(report: Report, found: Rounds, target: float) -> None:
    """The ratio, and of the first accuracy the verdict."""
    ratio, what = compared(found, 'plain', 'fast'), f'seconds to {target:.0%}, plain / fast'
    missed = {name: sum(not r[name]['reached'] for r in found) for name in found[0]}
    if missed['plain']:
        what += f' (at least: {missed["plain"]} plain runs never reached it)'
    fast = sum(count for name, count in missed.items() if name != 'plain')
    if fast:
        report.say(f'{what}: {ratio}, but the fast recipe missed it {fast} times; target >= {TARGET:g}: not met')
    elif target != min(RECIPES):
        report.say(f'{what}: {ratio}')
    elif missed['plain'] and verdict(ratio, compared(found, 'again', 'fast'), TARGET) == 'not met':
        report.say(f'{what}: {ratio}; target >= {TARGET:g}: inconclusive')
    else:
        report.ratio(what, ratio, compared(found, 'again', 'fast'), TARGET)


def main(argv: list[str]) -> None:
    """Runs the comparison and prints its lines; --worker is how it starts its own processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--core', type=int, default=0)
    parser.add_argument('--targets', nargs='*', type=float, choices=tuple(RECIPES), default=tuple(RECIPES))
    parser.add_argument('--output', type=pathlib.Path)
    options = parser.parse_args(argv)
    if options.worker:
        return work()
    if options.seeds < 2:
        parser.error('--seeds is at least 2: there is no spread of one')
    command = [sys.executable, '-m', 'bench.time_to_accuracy', '--worker']
    report, rounds = Report(), {}
    with contextlib.ExitStack() as stack:
        workers = {n: stack.enter_context(Worker(command, options.core, PINNED)) for n in ('plain', 'fast', 'again')}
        for target in options.targets:
            arms = {n: worker for n, worker in workers.items() if target == min(RECIPES) or n != 'again'}
            rounds[f'{target:.0%}'] = measure(report, arms, target, options.seeds)
            tell(report, rounds[f'{target:.0%}'], target)
    return report.end(options.output, {'rounds': rounds})


if __name__ == '__main__':
    main(sys.argv[1:])
