"""What a run says it has spent: the examples it has really seen."""

import dataclasses
import types

import numpy as np
import pytest

from research.core.clock import Clock
from research.core.durations import Facts
from research.data.buckets import buckets
from research.data.few_labels import few_labels
from research.data.mixture import Mixture
from research.data.plan import TrainPlan, unique_examples
from research.data.source import ArraySource, DataSet
from research.parallel import mesh as meshes
from research.train import build
from research.train.run import Run
from tests import specs
from tests.specs import Letters
from tests.train.conftest import experiment_of


def part(n):
    return ArraySource({'x': np.arange(n, dtype=np.float32)})


def spent(train, batch_size, step):
    """The budget of a run of which only what `spent` asks for is there."""
    facts = Facts(batch_size, len(train), None)
    nothing = types.SimpleNamespace()
    run = Run(
        experiment_of(f'data.batch_size={batch_size}'), nothing, meshes.make_mesh(1), Clock(), nothing, nothing, nothing, facts,
        {'train': train}, nothing, {}, nothing, {},
    )  # fmt: skip
    return run.spent(step)


def test_unique_examples_of_a_mixture_are_not_more_than_its_small_part_has():
    budget = spent(Mixture([part(10), part(10**5)], (1, 1), (None, None)), 10, 100)
    assert (budget['examples'], budget['unique_examples']) == (1000, 10 + 500)


@pytest.mark.parametrize(('step', 'unique'), [(0, 0), (3, 96), (4, 100), (70, 100)])
def test_unique_examples_of_one_source_end_with_its_first_epoch(step, unique):
    assert spent(part(100), 32, step)['unique_examples'] == unique


def test_a_plan_that_does_not_say_how_many_are_unique_is_taken_for_epochs():
    source = part(100)
    source.plan = lambda batch_size, seed: TrainPlan(len(source), batch_size, seed)
    assert [unique_examples(source, steps, 32, 0) for steps in (0, 3, 4)] == [0, 96, 100]


def test_the_labelled_examples_are_some_of_all():
    images, labels = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1), np.arange(60, dtype=np.int32) % 2
    data = DataSet('toy', {'train': ArraySource({'image': images, 'label': labels})}, ('a', 'b'))
    train = few_labels(labels='10 examples', unlabelled=3)(data).splits['train']
    assert spent(train, 16, 40)['unique_examples'] == 60


def test_flops_of_buckets_are_those_of_the_shapes_that_are_drawn():
    """Three batches of four are a quarter as wide as the others: FLOPs of a step are the mean, not those of the widest."""
    rows = np.where(np.arange(100)[:, None] < 75, np.arange(32) < 8, np.arange(32) < 32).astype(np.int32)
    data = DataSet('rows', {'train': ArraySource({'tokens': rows, 'segment': rows})}, tokenizer=Letters(20))
    source = buckets(lengths=(8, 32))(data).splits['train']
    spec = specs.padded(32, 20)
    experiment = experiment_of('model=encoder(depth=1, width=16, heads=2)', 'task=masked', 'data.batch_size=8')
    task = build.make_task(experiment, spec)
    wide = build.measure(experiment, task, spec, rows).step_flops
    narrow = build.measure(experiment, task, dataclasses.replace(spec, examples=specs.padded(8, 20).examples), rows).step_flops
    assert narrow < wide / 3
    assert build.measure(experiment, task, spec, source).step_flops == pytest.approx(0.75 * narrow + 0.25 * wide)
