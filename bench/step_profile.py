"""Where the time of a step of `bench.language_model` goes, by kind of operation: the profile behind its figures.

    taskset -c 0 env NPROC=1 python -m bench.step_profile
    taskset -c 0 env NPROC=1 python -m bench.step_profile --without lowering     # or memory, or both

jax's profiler gives the time of every operation of the compiled program, the program's text what each one is: a matrix product
(of XLA's Eigen or YNNPACK), or another loop with the shape of its result. `--without` tells what `models/lowering.py` and
`parallel/memory.py` are worth.
"""

import argparse
import collections
import pathlib
import re
import statistics
import sys
import tempfile

import jax

from bench.arms import timed
from bench.language_model import Trainer
from research.models import lowering
from research.parallel import memory

STEPS = 10


def kinds_of(program: str) -> dict[str, str]:
    """'product' or 'loop', and the shape of its result, of every operation of a compiled program's text."""
    bodies = dict(re.findall(r'^%(\S+) [^\n]*\{\n(.*?)^\}', program, re.MULTILINE | re.DOTALL))
    found = {}
    for name, shape, operation, rest in re.findall(
        r'^\s+(?:ROOT )?%(\S+) = (\S+?)[{ ]\S* ?([\w-]+)\((.*)$', program, re.MULTILINE
    ):
        called = re.search(r'calls=%([\w.-]+)', rest)
        body = bodies.get(called[1], '') if called else ''
        found[name] = f'{"product" if operation == "dot" or " dot(" in body else "loop"} {shape}'
    return found


def milliseconds(folder: str) -> collections.Counter[str]:
    """Milliseconds of a step by operation, from the profiler's files in `folder`."""
    times: collections.Counter[str] = collections.Counter()
    (file,) = pathlib.Path(folder).rglob('*.xplane.pb')
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                times[event.name] += event.duration_ns / STEPS / 1e6
    return times


def main(argv: list[str]) -> None:
    """Prints the milliseconds of a step, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--without', nargs='*', choices=('lowering', 'memory'), default=[])
    options = parser.parse_args(argv)
    if 'memory' not in options.without:
        memory.keep_freed()  # as in a run
    if 'lowering' in options.without:
        lowering.on_cpu = lambda: False
    trainer = Trainer()
    trainer.steps(4 * STEPS)
    blocks = [timed(lambda: trainer.steps(STEPS))['seconds'] / STEPS * 1e3 for _ in range(9)]
    print(f'{statistics.median(blocks):8.3f} ms  a step (median of 9 blocks of {STEPS}; least {min(blocks):.3f})')
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            trainer.steps(STEPS)
        times = milliseconds(folder)
    kinds = kinds_of(trainer.program)
    table: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for name, spent in times.items():
        if name in kinds:
            for kind in (kinds[name], kinds[name].split()[0] + 's in all'):
                table[kind] += spent
                counts[kind] += 1
    for kind, spent in table.most_common(24):
        print(f'{spent:8.3f} ms  {counts[kind]:4} x  {kind}')


if __name__ == '__main__':
    main(sys.argv[1:])
