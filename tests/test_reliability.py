"""A run that cannot be lost: real processes, hit by real faults. `python -m bench.soak` does many more of them."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest

from bench.fault_runs import SMALL, Course, free_port, struck

WITHIN_S = 10.0  # from a signal to the end
SHORT = ('--config.train.duration=120 steps', '--config.evaluate.every=60 steps')  # so that the last step is evaluated


def events(course, kind):
    lines = [json.loads(line) for line in (course.workdir / 'events.jsonl').read_text().splitlines()]
    return [line for line in lines if line['event'] == kind]


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    return Course(tmp_path_factory.mktemp('base') / 'run', arguments=SHORT).run()


def test_kills_at_random_times_change_nothing(base, tmp_path):
    rng = random.Random(os.environ.get('FULCRUM_SEED', '7'))
    course = Course(tmp_path / 'run', arguments=SHORT)
    for _ in range(2):
        course.life(kill_after=rng.uniform(0.5, 1.0) * base.lives[0].seconds)
    course.life(f'kill@{rng.choice(["manifest", "rename", "evaluate", "save"])}:2')
    course.run()
    assert course.proof() == base.proof()
    assert course.leftovers() == []


# Faults of one life after the other, and the step that is on disk afterwards.
SIGNALS = [
    ('term@start:1', None),
    ('int@compile:1', None),
    ('usr1@data:33', 32),
    ('term@evaluate:1', 60),
    ('int@save:3', 80),  # the first two are those of step 60
    ('slow@90-90,hup@data:11', 90),  # while a read hangs
    ('usr1@evaluate:1', 120),  # that of the last step, which is then left to the next life
]


def test_a_signal_is_heard_in_every_phase(base, tmp_path):
    course = Course(tmp_path / 'run', arguments=SHORT)
    for fault, step in SIGNALS:
        life = course.life(fault)
        assert life.codes == [75], life.told[0]
        assert life.ended[0] - struck(life)[0] <= WITHIN_S, fault
        saved = [int(path.name) for path in (course.workdir / 'checkpoints').glob('*') if path.name.isdigit()]
        assert max(saved, default=None) == step, fault
        if step is not None:
            assert events(course, 'exit')[-1]['code'] == 75
        assert 'took over' not in life.told[0]  # each has given the lock back
        assert not (course.workdir / 'stacks.txt').exists() or step is None  # left at once
    course.run()
    assert not (course.workdir / 'stacks.txt').exists()
    assert course.proof() == base.proof()


def test_a_reader_that_goes_away_stops_no_run(tmp_path):
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    command = [sys.executable, 'launch.py', *SMALL, *SHORT, '--config.log.plain_every=0.01', f'--workdir={tmp_path}/run']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        process.stdout.close()
        told = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, told
    assert (tmp_path / 'run' / 'summary.json').exists()


@pytest.mark.parametrize('fault', ['hang@data:9', 'gil@train:1'])
def test_a_hang_ends_with_the_stacks_of_every_thread(tmp_path, fault):
    bounds = tuple(f'--config.watchdog.{phase}=3' for phase in ('data', 'train'))
    course = Course(tmp_path / 'run', arguments=(*SHORT, *bounds))
    assert course.life(fault, limit=60).codes == [124]
    assert (
        '"MainThread"' in (course.workdir / 'stacks.txt').read_text()
        or 'Thread 0x' in (course.workdir / 'stacks.txt').read_text()
    )


def test_a_full_disk_is_borne_and_then_named(base, tmp_path):
    course = Course(tmp_path / 'run', arguments=(*SHORT, '--config.checkpoint.retry_minutes=0.05'))
    life = course.life('full@save:3,room@save:5')
    assert life.codes == [0], life.told[0]
    assert 'training goes on' in life.told[0]
    assert 'Traceback' not in life.told[0]
    assert course.proof() == base.proof()
    course = Course(tmp_path / 'other', arguments=course.arguments)
    life = course.life('full@save:3')
    assert life.codes == [74], life.told[0]
    assert 'the last good one is step' in life.told[0]
    assert course.leftovers() == []
    course.run()
    assert course.proof() == base.proof()


def test_an_output_that_takes_nothing_stops_no_run(tmp_path):
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    command = [sys.executable, 'launch.py', *SMALL, *SHORT, f'--workdir={tmp_path}/run']
    with open('/dev/full', 'w') as full:
        assert subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, timeout=120).returncode == 0
    assert (tmp_path / 'run' / 'summary.json').exists()


def test_a_second_process_is_refused_and_a_dead_one_replaced(tmp_path):
    course = Course(tmp_path / 'run', arguments=('--config.train.duration=100000 steps',))
    first = course._start(0, free_port(), '')
    try:
        for line in first.stdout:
            if line.startswith('ids 9'):
                break
        second = Course(tmp_path / 'run', arguments=course.arguments).life()
        assert second.codes == [2]
        assert f'process {first.pid} on' in second.told[0]
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
    third = Course(tmp_path / 'run', arguments=course.arguments).life('term@data:3')
    assert third.codes == [75]
    assert 'took over' in third.told[0]
