"""A run of several processes that cannot be lost. `python -m bench.soak` hits many more of them."""

import os
import subprocess
import sys

import pytest

from bench.fault_runs import SMALL, Course, free_port, struck
from tests.test_reliability import SHORT, WITHIN_S, events


@pytest.fixture(scope='module')
def base_of_two(tmp_path_factory):
    return Course(tmp_path_factory.mktemp('two') / 'run', processes=2, arguments=SHORT).run()


def test_two_processes_lose_one_and_go_on_exactly(base_of_two, tmp_path):
    course = Course(tmp_path / 'run', processes=2, arguments=SHORT)
    life = course.life('kill@data:60', victim=1)
    assert life.codes[1] == -9
    assert life.codes[0] in (134, -6), life.told[0]
    assert life.ended[0] - life.ended[1] <= 15
    assert 'of this run is lost' in life.told[0]
    course.run()
    assert course.proof() == base_of_two.proof()
    assert course.leftovers() == []


def test_two_processes_stop_at_the_same_step(base_of_two, tmp_path):
    course = Course(tmp_path / 'run', processes=2, arguments=SHORT)
    life = course.life('term@data:50', victim=1)
    assert life.codes == [75, 75], life.told[0]
    assert max(life.ended) - struck(life)[0] <= WITHIN_S
    steps = [next(line for line in told.splitlines() if 'stopped by SIGTERM at step' in line) for told in life.told]
    assert steps[0] == steps[1]
    course.run()
    assert course.proof() == base_of_two.proof()


def test_two_processes_bear_a_full_disk_and_a_device_that_computes_wrong(base_of_two, tmp_path):
    audited = (*SHORT, '--config.train.audit_every=30 steps', '--config.checkpoint.retry_minutes=0.5')
    course = Course(tmp_path / 'run', processes=2, arguments=audited)
    life = course.life(('full@save:3,room@save:4', 'flip@59'))
    assert life.codes == [0, 0], life.told[0]
    assert 'training goes on' in life.told[0]
    assert 'Traceback' not in life.told[0]
    assert events(course, 'save_failed')
    (event,) = events(course, 'audit')  # told by the main process, seen by the other
    assert event['step'] == 59
    assert any('params/' in problem for problem in event['problems'])
    proof = course.proof()
    for what in ('state', 'records', 'ids'):
        assert proof[what] == base_of_two.proof()[what]


def test_waiting_for_other_processes_has_a_bound(tmp_path):
    environment = {
        **os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{free_port()}',
        'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0',
    }  # fmt: skip
    command = [sys.executable, 'launch.py', *SMALL, f'--workdir={tmp_path}/run', '--config.watchdog.start=9']
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert found.returncode == 124, found.stderr
    assert 'hosts.py' in (tmp_path / 'run' / 'stacks.txt').read_text()
