"""Memory does not grow with the steps: of a run ten times as long, with ten times the records, evaluations and checkpoints."""

import pathlib
import re

import jax

from research.core import config_file
from research.train import loop

SHORT, LONG = 60, 600  # steps
OFTEN = ('log.every=2 steps', 'evaluate.every=12 steps', 'checkpoint.every=6 steps')
ALLOWED = 20e6  # bytes, what one float32 array of 9,300 numbers a step would come to


def resident():
    """Bytes that this process holds in memory."""
    return 1024 * int(re.search(r'VmRSS:\s+(\d+) kB', pathlib.Path('/proc/self/status').read_text())[1])


def test_memory_is_flat_between_a_run_and_one_ten_times_as_long(tmp_path, monkeypatch):
    seen, steps = {}, loop._steps

    def look(step, state, found):
        if step in (SHORT, LONG):
            jax.block_until_ready(state)
            arrays = jax.live_arrays()
            seen[step] = {'arrays': len(arrays), 'bytes': sum(a.nbytes for a in arrays), 'resident': resident()}

    monkeypatch.setattr(loop, '_steps', lambda run, step, state, hooks: steps(run, step, state, [*hooks, look]))
    settings = [f'train.duration={LONG} steps', 'model.features=(8,8,8)', *OFTEN]
    experiment = config_file.resolve('configs/digits_cnn.py', settings)
    loop.train(experiment, tmp_path, quiet=True)
    short, long = seen[SHORT], seen[LONG]
    assert long['arrays'] <= short['arrays'] + 4
    assert long['bytes'] <= 1.02 * short['bytes']
    assert long['resident'] - short['resident'] < ALLOWED
