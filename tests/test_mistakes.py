"""What a user's mistake gives: exit code 2, at most three lines, the nearest valid name, in under a second, without jax."""

import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = '--config=configs/digits_cnn.py'

# (arguments, first line, fix)
MISTAKES = {
    'no config': ([], '--config is missing', 'for example --config=configs/digits_cnn.py; known: configs/bert_base_mlm.py'),
    'override without dashes': (
        [DIGITS, 'config.seed=3'],
        "unexpected argument 'config.seed=3'",
        'did you mean --config.seed=3?',
    ),
    'stray word': ([DIGITS, 'train'], "unexpected argument 'train'", 'flags are --NAME=VALUE: '),
    'misspelt flag': (['--confg=configs/digits_cnn.py'], "Unknown command line flag 'confg'", "did you mean 'config'?"),
    'misspelt workdir': ([DIGITS, '--wokdir=x'], "Unknown command line flag 'wokdir'", "did you mean 'workdir'?"),
    'unknown mode': (
        [DIGITS, '--mode=trian'],
        'flag --mode=trian',
        '--mode is one of train, evaluate, export, verify, replay, report, show, doctor',
    ),
    'missing config file': (
        ['--config=configs/digits_cn.py'],
        "there is no config file 'configs/digits_cn.py'",
        "did you mean 'configs/digits_cnn.py'?",
    ),
    'unknown config argument': (
        ['--config=configs/digits_cnn.py:epoch=3'],
        "the config file takes no argument 'epoch=3'",
        'write NAME.py:argument=value; known: epochs=',
    ),
    'unknown value of a config argument': (
        ['--config=configs/docs_gpt.py:tokenizer=bytes'],
        "the config's argument tokenizer='bytes' is unknown",
        "did you mean 'byte'?",
    ),
    'misspelt key': ([DIGITS, '--config.sed=3'], 'config.sed does not exist', "did you mean 'seed'?"),
    'misspelt key two levels down': (
        [DIGITS, '--config.train.early_stop.patence=3'],
        'config.train.early_stop.patence does not exist',
        "did you mean 'patience'?",
    ),
    'key at the wrong level': (
        [DIGITS, '--config.batch_size=3'],
        'config.batch_size does not exist',
        'did you mean config.data.batch_size?',
    ),
    'section instead of key': (
        [DIGITS, '--config.train=3'],
        'config.train is a section, not a value',
        'set one of its keys: duration, ',
    ),
    'no value': ([DIGITS, '--config.seed'], '--config.seed has no value', 'write --config.seed=VALUE'),
    'fraction for int': ([DIGITS, '--config.data.batch_size=64.5'], 'config.data.batch_size=64.5 is not int', 'give a number'),
    'word for int': ([DIGITS, '--config.data.batch_size=abc'], 'config.data.batch_size=abc is not int', 'give a number'),
    'yes for bool': (
        [DIGITS, '--config.train.skip_nonfinite=yes'],
        'config.train.skip_nonfinite=yes is not a bool',
        'use true or false',
    ),
    'out of range': ([DIGITS, '--config.data.batch_size=-1'], 'config.data.batch_size is -1', 'it must be at least 1 examples'),
    'not positive': (
        [DIGITS, '--config.optimizer.learning_rate=0'],
        'config.optimizer.learning_rate is 0',
        'it must be greater than 0.0',
    ),
    'unknown choice': ([DIGITS, '--config.parallel.compile=pmpa'], "config.parallel.compile is 'pmpa'", "did you mean 'pmap'?"),
    'unknown model': ([DIGITS, '--config.model=cmn'], "model 'cmn' does not exist", "did you mean 'cnn'?"),
    'unknown optimiser': ([DIGITS, '--config.optimizer=adma'], "optimizer 'adma' does not exist", "did you mean 'adam'?"),
    'unknown argument of the model': (
        [DIGITS, '--config.model.hiden=(3,)'],
        "config.model.hiden does not exist: model 'cnn' has no argument 'hiden'",
        "did you mean 'hidden'?",
    ),
    'misspelt key of an open section': (
        [DIGITS, '--config.optimizer.lerning_rate=1'],
        "config.optimizer.lerning_rate does not exist: optimizer 'adam' has no argument 'lerning_rate'",
        "did you mean 'learning_rate'?",
    ),
    'mistyped argument of the model': (
        [DIGITS, '--config.model.kernel=big'],
        'config.model.kernel=big is not int',
        'give a number',
    ),
    'missing argument of a source': (
        [DIGITS, '--config.data.source=idx'],
        "config.data.source.dir must be given: source 'idx' needs it",
        'set config.data.source.dir',
    ),
    'user module that is not there': (
        [DIGITS, '--config.model=no.such.module:Net'],
        "model 'no.such.module:Net': there is no module 'no.such.module'",
        'write package.module:Thing',
    ),
    'user class that is not there': (
        [DIGITS, '--config.model=research.models.cnn:CCN'],
        "model 'research.models.cnn:CCN': module 'research.models.cnn' has no 'CCN'",
        "did you mean 'CNN'?",
    ),
    'duration without unit': (
        [DIGITS, '--config.train.duration=10'],
        "config.train.duration: '10' is not a duration",
        "write '10 epochs'",
    ),
    'unknown unit': (
        [DIGITS, '--config.train.duration=10 parsecs'],
        "config.train.duration: 'parsecs' is not a unit",
        "write '10 epochs'",
    ),
    'budget in epochs': (
        [DIGITS, '--config.data.budget=2 epochs'],
        "config.data.budget is '2 epochs'",
        "write a share such as '5%'",
    ),
    'accumulation that does not divide': (
        [DIGITS, '--config.train.accumulate=7'],
        'config.train.accumulate=7 does not divide config.data.batch_size=',
        'choose a batch size',
    ),
    'splits that leave nothing': (
        [DIGITS, '--config.data.test=0.9', '--config.data.validation=0.9'],
        'config.data.validation=0.9',
        'less than 1',
    ),
    'augmentation that cannot be read': (
        [DIGITS, '--config.data.augment=flip(probability=)'],
        "config.data.augment='flip(probability=)' cannot be read",
        "write 'name(key=value, ...)'",
    ),
    'augmentation out of reach': (
        [DIGITS, '--config.data.augment.7.padding=2'],
        "config.data.augment.7.padding: there is no component '7'",
        'there are',
    ),
    'evaluate without workdir': ([DIGITS, '--mode=evaluate'], '--workdir is missing', 'for example --workdir=runs'),
}


def launch(arguments, cwd=ROOT):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / 'launch.py'), *arguments], cwd=cwd, capture_output=True, text=True, timeout=60
    )
    return done, time.monotonic() - start


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_told_in_three_lines(name):
    arguments, message, fix = MISTAKES[name]
    done, seconds = launch(arguments)
    lines = done.stderr.strip().split('\n')
    assert done.returncode == 2, done.stderr
    assert done.stdout == ''
    assert len(lines) <= 3
    assert lines[0].startswith(f'error: {message}') or message in lines[0], lines
    assert fix in done.stderr, lines
    assert 'Traceback' not in done.stderr
    assert seconds < 1.0


BROKEN = {
    'raises': ('def get_config():\n    return 1 / 0\n', 'bad.py:2: ZeroDivisionError: division by zero'),
    'syntax': ('def get_config(:\n', 'bad.py:1: SyntaxError'),
    'no function': ('x = 1\n', 'bad.py has no function get_config'),
    'returns nothing': ('def get_config():\n    pass\n', 'bad.py returned None'),
    'misspelt key': (
        'from research.core.schema import default_config\n\ndef get_config():\n    c = default_config()\n'
        '    c.trian.duration = "1 epoch"\n    return c\n',
        "bad.py:5: the config has no key 'trian'",
    ),
    'invented key': (
        'from research.core.schema import default_config\n\ndef get_config():\n    c = default_config()\n'
        '    c.optimizer.b3 = 1\n    return c\n',
        "config.optimizer.b3 does not exist: optimizer 'adam' has no argument 'b3'",
    ),
    'wrong type': (
        'from research.core.schema import default_config\n\ndef get_config():\n    c = default_config()\n'
        '    c.seed = "three"\n    return c\n',
        "config.seed is 'three', which is not int",
    ),
    'class has no bases to read': (
        'from research.core.schema import default_config\n\ndef get_config():\n    c = default_config()\n'
        '    c.model = {"features": (3,)}\n    return c\n',
        'config.model has no name',
    ),
}


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_config_file_is_told_with_its_line(name, tmp_path):
    source, message = BROKEN[name]
    (tmp_path / 'bad.py').write_text(source)
    done, seconds = launch([f'--config={tmp_path / "bad.py"}'])
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().split('\n')) <= 3
    assert seconds < 1.0


def test_debug_shows_the_traceback():
    done, _ = launch([DIGITS, '--config.seed=x', '--debug'])
    assert done.returncode == 2
    assert 'Traceback' in done.stderr


def test_the_same_override_twice_is_warned_of():
    done, _ = launch([DIGITS, '--config.seed=3', '--config.seed=4', '--mode=show'])
    assert 'given twice' in done.stderr
    assert 'config.seed = 4' in done.stdout


def test_help_and_show_need_no_jax():
    for arguments in (['--help'], [DIGITS, '--mode=show']):
        probe = f'import sys, launch; launch.main(["launch.py"] + {arguments!r}); sys.exit("jax" in sys.modules)'
        done = subprocess.run([sys.executable, '-c', probe], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert 'config' in done.stdout
