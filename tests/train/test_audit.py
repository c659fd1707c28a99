"""The replay audit: one wrong bit is found, its device named, and the state goes on as if it had never been."""

import json

import jax
import numpy as np
import pytest

from research.parallel import compile as compilation
from research.train import audit, faults
from tests.train.test_loop import assert_identical, by_split, saved

FEW = ('train.duration=8 steps', 'checkpoint.every=8 steps', 'evaluate.every=0 steps')


def test_a_wrong_bit_is_reported_with_its_device_and_outvoted(run, monkeypatch):
    _, records, clean = run(*FEW, folder='clean')
    monkeypatch.setattr(compilation, 'lower_step', compilation.lower_step)  # put back at the end
    faults._install_flips({4})  # the state that step 4 starts from: the fifth call
    summary, again, path = run(*FEW, 'train.audit_every=5 steps', folder='audited')
    assert summary['audit'] == {'steps': 1, 'differences': 1}
    events = [json.loads(line) for line in (path / 'events.jsonl').read_text().splitlines()]
    (event,) = [event for event in events if event['event'] == 'audit']
    assert event['step'] == 4
    assert any(problem.startswith('params/') and 'cpu' in problem.lower() for problem in event['problems'])
    assert_identical(saved(clean, 8), saved(path, 8))
    assert by_split(records, 'train') == by_split(again, 'train')


def test_without_a_fault_the_audit_changes_nothing(run):
    _, _, clean = run(*FEW, folder='clean')
    summary, _, path = run(*FEW, 'train.audit_every=2 steps', folder='audited')
    assert summary['audit'] == {'steps': 4, 'differences': 0}
    assert_identical(saved(clean, 8), saved(path, 8))


def test_short_lives_are_audited_as_one_long_one(run, dies_at):
    dies_at(3)
    with pytest.raises(RuntimeError, match='the machine is gone'):
        run(*FEW, 'train.audit_every=5 steps', 'checkpoint.every=1 step')
    summary, _, _ = run(*FEW, 'train.audit_every=5 steps', 'checkpoint.every=1 step')
    assert summary['audit']['steps'] == 1


def test_the_replica_that_is_not_like_the_others_is_named():
    devices = jax.devices()[:4]
    found = {('w', '0:', str(d)): (1, 2) for d in devices}
    assert audit.replicas(found) == []
    found['w', '0:', str(devices[2])] = (1, 3)
    assert audit.replicas(found) == [f'w on {devices[2]} is not like its replicas']
    other = dict.fromkeys(found, (1, 2))
    assert audit.problems(found, other) == [f'w on {devices[2]}']


def test_a_flipped_bit_is_one_bit():
    leaf = jax.device_put(np.ones((2, 3), np.float32))
    before, after = (np.asarray(x).view(np.uint32).reshape(-1) for x in (leaf, faults._flipped(leaf)))
    assert [bin(a ^ b).count('1') for a, b in zip(before.tolist(), after.tolist(), strict=True)] == [1, 0, 0, 0, 0, 0]
