"""The command line from end to end: as a user types it, in a process of its own."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.train.test_loop import assert_identical, saved

ROOT = pathlib.Path(__file__).parents[1]
SMALL = (
    '--config=configs/digits_cnn.py', '--config.train.duration=40 steps', '--config.model=mlp', '--config.log.every=1 step',
    '--config.checkpoint.every=10 steps', '--config.evaluate.every=20 steps', '--config.log.model_table=false',
)  # fmt: skip


def launch(*arguments, cwd=ROOT, devices=1, **environment):
    flags = f'--xla_force_host_platform_device_count={devices}'
    command = [sys.executable, str(ROOT / 'launch.py'), *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, 'XLA_FLAGS': flags, **environment}
    )


def records(path):
    lines = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ('time', 'examples_per_second')} for r in lines]


def test_train_then_again_says_complete_in_seconds(tmp_path):
    arguments = (*SMALL, f'--workdir={tmp_path}/run')
    first = launch(*arguments)
    assert first.returncode == 0, first.stderr
    assert 'started from scratch' in first.stdout
    assert 'step 40' in first.stdout
    assert '\r' not in first.stdout
    assert '\x1b' not in first.stdout
    start = time.monotonic()
    again = launch(*arguments)
    assert again.returncode == 0
    assert 'is complete at step 40' in again.stdout
    assert time.monotonic() - start < 2
    found = launch('--mode=evaluate', f'--workdir={tmp_path}/run')
    assert found.returncode == 0, found.stderr
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert json.loads(found.stdout)['newest']['metrics'] == summary['metrics']


def test_jit_and_pmap_on_eight_devices_give_the_losses_of_one(tmp_path):
    # Nesterov, whose update is linear in the gradient: Adam turns the rounding of a gradient near zero into a whole step, so
    # that over several steps it is not this program that would be tested (BENCHMARKS.md, devices).
    losses = {}
    for name, devices, kind in (('one', 1, 'jit'), ('jit', 8, 'jit'), ('pmap', 8, 'pmap')):
        done = launch(
            '--config=configs/digits_cnn.py', '--config.train.duration=10 steps', '--config.log.every=1 step',
            f'--config.parallel.compile={kind}', f'--workdir={tmp_path}/{name}', '--config.optimizer=nesterov',
            '--config.optimizer.learning_rate=0.05', devices=devices,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        losses[name] = [r['loss'] for r in records(tmp_path / name) if r['split'] == 'train']
    assert len(losses['one']) == 10
    for name in ('jit', 'pmap'):
        assert max(abs(a - b) for a, b in zip(losses['one'], losses[name], strict=True)) <= 1e-6


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, number):
    assert launch(*SMALL, f'--workdir={tmp_path}/whole').returncode == 0
    command = [sys.executable, str(ROOT / 'launch.py'), *SMALL, f'--workdir={tmp_path}/parts']
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'XLA_FLAGS': ''}
    )
    metrics = tmp_path / 'parts' / 'metrics.jsonl'
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count('"train"') < 3):
        time.sleep(0.001)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert f'error: stopped by {number.name} at step' in stderr
    assert not (tmp_path / 'parts' / 'summary.json').exists()
    again = launch(*SMALL, f'--workdir={tmp_path}/parts')
    assert again.returncode == 0, again.stderr
    assert 'resumed from step' in again.stdout
    assert records(tmp_path / 'whole') == records(tmp_path / 'parts')
    assert_identical(saved(tmp_path / 'whole', 40), saved(tmp_path / 'parts', 40))


def test_without_a_workdir_each_config_has_its_own_folder(tmp_path):
    config = ROOT / 'configs' / 'digits_cnn.py'
    for seed in ('1', '2'):
        done = launch(
            f'--config={config}', '--config.train.duration=1 step', f'--config.seed={seed}', '--config.evaluate.final=test',
            '--config.model=mlp', cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / 'runs').glob('digits_cnn-*/summary.json'))) == 2


def test_a_run_directory_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / 'file').write_text('')
    done = launch(*SMALL, f'--workdir={tmp_path}/file/run')
    assert done.returncode == 74
    assert 'cannot be written' in done.stderr
    assert len(done.stderr.strip().split('\n')) <= 3


def test_the_doctor_tells_of_this_machine(tmp_path):
    done = launch('--mode=doctor', f'--workdir={tmp_path}')
    assert done.returncode == 0, done.stderr
    for word in ('jax', 'python', 'cpu', 'disk'):
        assert word in done.stdout.lower()


def test_an_unexpected_failure_beside_the_compiler_is_no_lost_peer(tmp_path):
    program = (
        'import sys, launch\nfrom research.core import guardian\nfrom research.train import flops\n'
        'def table(*parts):\n    raise RuntimeError("a mistake of a component")\n'
        'flops.table = table\nguardian.run(launch.main, sys.argv)'
    )
    arguments = ['--config=configs/digits_cnn.py', '--config.model.features=(64, 64, 64)', f'--workdir={tmp_path / "run"}']
    command = [sys.executable, '-c', program, *arguments]
    environment = {**os.environ, 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 1, done.stderr  # 134, which asks for another try, if Python had taken down what the thread uses
    assert 'RuntimeError: a mistake of a component' in done.stderr


def test_a_mistake_does_not_wait_for_the_compiler(tmp_path):
    program = (
        'import sys, time, launch\nfrom research.core import guardian\nfrom research.parallel import compile as compilation\n'
        'compilation.lower_step = lambda *parts: lambda: time.sleep(300)\nguardian.leave(launch.main(sys.argv))'
    )
    arguments = ['--config=configs/digits_cnn.py', f'--config.init_from={tmp_path}', f'--workdir={tmp_path / "run"}']
    command = [sys.executable, '-c', program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert 'config.init_from' in done.stderr
