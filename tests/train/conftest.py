"""A small real problem for the tests of training: the digits, an MLP, a few steps."""

import json

import pytest

from research.core import config_file, schema
from research.train import hooks
from research.train.loop import train


def experiment_of(*overrides, **sections):
    """The digits under an MLP for 12 steps, with 'key=value' overrides."""
    config = schema.default_config()
    config.name = 'test'
    config.model = {'name': 'mlp', 'hidden': (16,)}
    config.data.batch_size = 64
    config.train.duration = '12 steps'
    config.evaluate.every = '6 steps'
    config.checkpoint.every = '4 steps'
    config.log.every = '1 step'
    config.log.tensorboard = False
    config.log.model_table = False
    plain = json.loads(config.to_json())
    for override in overrides:
        path, _, text = override.partition('=')
        config_file.override(plain, path, text)
    return schema.resolve(plain)


@pytest.fixture
def dies_at(monkeypatch):
    """Has the first run that logs a given step end there, as a machine does."""

    def die(step):
        original, died = hooks.LogHook.__call__, []

        def interrupted(self, now, state, terms):
            original(self, now, state, terms)
            if now == step and not died:
                died.append(step)
                raise RuntimeError('the machine is gone')

        monkeypatch.setattr(hooks.LogHook, '__call__', interrupted)

    return die


@pytest.fixture
def run(tmp_path):
    """Trains an experiment in a folder below `tmp_path`; returns (summary, records, folder)."""

    def run_one(*overrides, folder='run', **options):
        path = tmp_path / folder
        summary = train(experiment_of(*overrides), path, quiet=True, **options)
        records = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
        return summary, records, path

    run_one.path = tmp_path / 'run'
    return run_one
