"""What a start must not wait for, told without a clock: modules that nobody needs yet, and programs that nobody needs at all.

The seconds are measured by `python -m bench.startup`.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
QUICK_START = ('--config=configs/digits_cnn.py', '--config.log.plain_every=0.001')  # a line for each step
NEEDED_TO_TRAIN = {'jax', 'jaxlib', 'numpy', 'flax', 'optax', 'rich'}
# What saving and curves need, and other data sources and modes: the first step of the quick start does not.
NOT_BEFORE_STEP_1 = {
    'orbax', 'tensorstore', 'tensorboardX', 'google', 'sklearn', 'scipy', 'joblib', 'pandas', 'pyarrow', 'grain', 'datasets',
    'tensorflow_datasets', 'tokenizers', 'transformers', 'safetensors', 'huggingface_hub', 'PIL', 'matplotlib', 'IPython',
    'torch', 'tensorflow', 'keras',
}  # fmt: skip


def output(folder, *arguments, interpreter=(), **environment):
    """What a command says: standard output and standard error as one text, in their order."""
    flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=1'
    done = subprocess.run(
        [sys.executable, *interpreter, 'launch.py', *arguments, f'--workdir={folder}'],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, 'XLA_FLAGS': flags, **environment},
    )
    return done.stdout, done.returncode


def imported(text):
    """The packages whose import `python -X importtime` tells of."""
    return {name.split('.')[0] for name in re.findall(r'import time:\s+\d+ \|\s+\d+ \|\s+(\S+)', text)}


@pytest.mark.parametrize(
    ('arguments', 'code'),
    [
        (('--help',), 0),
        (('--config=configs/digits_cnn.py', '--mode=show'), 0),
        (('--confg=configs/digits_cnn.py',), 2),
        (('--config=configs/digit_cnn.py',), 2),
        (('--config=configs/digits_cnn.py', '--config.train.early_stop.patence=3'), 2),
        (('--config=configs/digits_cnn.py', '--config.model=cn'), 2),
        (('--config=configs/digits_cnn.py', '--config.data.source=digits(n=3)'), 2),
    ],
)
def test_help_and_mistakes_are_answered_before_anything_large_is_imported(tmp_path, arguments, code):
    text, found = output(tmp_path / 'run', *arguments, interpreter=('-X', 'importtime'))
    assert found == code, text[-500:]
    assert 'absl' in imported(text)
    assert not imported(text) & (NEEDED_TO_TRAIN | NOT_BEFORE_STEP_1)


def test_the_first_step_waits_for_no_module_that_it_does_not_need(tmp_path):
    text, code = output(tmp_path / 'run', *QUICK_START, '--config.train.duration=2 steps', interpreter=('-X', 'importtime'))
    assert code == 0, text[-2000:]
    before, line, after = text.partition('step 1/2')
    assert line
    assert imported(before) >= NEEDED_TO_TRAIN
    assert not imported(before) & NOT_BEFORE_STEP_1
    assert imported(after) >= {'orbax', 'tensorboardX'}


def test_few_programs_are_compiled_before_the_first_step_and_none_after_the_second(tmp_path):
    every = [f'--config.{name}.every=1 steps' for name in ('log', 'evaluate', 'checkpoint')]
    text, code = output(tmp_path / 'run', *QUICK_START, *every, '--config.train.duration=5 steps', JAX_LOG_COMPILES='1')
    assert code == 0, text[-2000:]
    before, *later = (re.findall(r'Finished XLA compilation of (\S+)', part) for part in re.split(r'(?m)^step \d/5', text))
    assert len(later) == 5
    assert len(before) == 3, before  # the first state, the step, and the learning rate for the log
    assert list(map(len, later)) == [2, 0, 0, 0, 0], later  # the evaluation, and the fingerprints of a save
