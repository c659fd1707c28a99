"""Teachers: the model of a run, whose bits no step moves and which a checkpoint holds; which runs are refused."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import leaves
from research.core.errors import UsageError
from research.data.build import build_splits
from research.train import adapters, build, teacher
from research.train.evaluate_run import evaluate_run
from research.train.loop import train
from research.train.run_directory import RunDirectory
from research.train.weights import read_run
from tests.tasks.tiny_text import LETTERS, spec_of
from tests.train.conftest import experiment_of
from tests.train.test_loop import saved
from tests.train.test_step import parts_of

TEACHER = ('model=cnn(features=(8,), pool=(2,), hidden=(), norm="batch")', 'train.ema=0.5', 'optimizer.learning_rate=0.01')


def student_of(path, *overrides):
    return ('task=' + f'distill(teacher="{path}", temperature=3.0, weight=0.7)', *overrides)


@pytest.fixture(scope='module')
def taught(tmp_path_factory):
    """A CNN with running statistics and an average, trained on the digits; its run directory."""
    path = tmp_path_factory.mktemp('teacher')
    train(experiment_of(*TEACHER, 'parallel.devices=1', 'train.duration=30 steps', 'evaluate.final=()'), path, quiet=True)
    return path


def test_a_student_learns_from_a_run_and_its_checkpoint_holds_the_teacher(run, taught):
    settings = (*student_of(taught), 'train.ema=0.9', 'optimizer=adamw', 'parallel.devices=1')
    summary, records, path = run(*settings)
    assert {'hard_loss', 'soft_loss', 'accuracy'} <= set(records[0])
    assert records[11]['soft_loss'] < records[0]['soft_loss']
    assert set(summary['metrics']['test']) == {'loss', 'accuracy'}
    weights, _ = read_run(taught, 'config.init_from')
    kept = {name: leaf for name, leaf in saved(path, 12).items() if '/teacher/' in name}
    assert len(kept) == len(weights) == 7
    for name, leaf in kept.items():
        short = name.split('/teacher/')[1].removeprefix('params/')
        np.testing.assert_array_equal(leaf, weights[short], err_msg=name)
    assert not [name for name in saved(path, 12) if 'optimizer_state' in name and 'Conv_0' in name]
    for checkpoint in (taught / 'checkpoints').iterdir():  # neither evaluation nor resumption needs the teacher's weights
        checkpoint.rename(taught / checkpoint.name)
    try:
        assert evaluate_run(path, [])['newest']['metrics'] == summary['metrics']
        more, _, _ = run(*settings, 'train.duration=13 steps', allow_change=True)
        assert more['step'] == 13
    finally:
        for checkpoint in [p for p in taught.iterdir() if p.name.isdigit()]:
            checkpoint.rename(taught / 'checkpoints' / checkpoint.name)


def test_a_student_may_have_an_adapter_too(taught):
    adapter = 'adapter=lora(rank=2, rules=(("Dense_0/kernel", "lora"), (".*", "freeze")))'
    parts, *_ = parts_of(experiment_of(*student_of(taught), adapter), 1)
    state = parts.init()
    assert set(state.model_state) == {'base', 'teacher'}
    assert np.any(state.model_state['teacher']['params']['Conv_0']['kernel'])
    assert set(leaves.flat(state.params)) == {'Dense_0/a_kernel', 'Dense_0/b_kernel'}
    size = adapters.describe_size(state.params, state.model_state, (('.*', 1.0),))
    assert size == '160 of 1,370 parameters trained'  # 2 * (64 + 16) of those and the student's 1,210


def changed(path, tmp_path, section, value):
    """A copy of a run's record with another value; its checkpoints are not needed to refuse it."""
    record = RunDirectory(path).read_run()
    record['config'][section[0]] = value if len(section) == 1 else {**record['config'][section[0]], section[1]: value}
    (tmp_path / 'run.json').write_text(json.dumps(record))
    return tmp_path


def test_teachers_that_are_refused(taught, tmp_path):
    experiment = experiment_of()
    spec = build_splits(experiment.data)[1]
    with pytest.raises(UsageError, match=r"config.task.teacher='/nowhere' holds no run"):
        teacher.restore(experiment, spec, '/nowhere')
    other = changed(taught, tmp_path, ('model',), {'name': 'subprocess:call'})
    with pytest.raises(UsageError, match='names code that your config does not: subprocess:call'):
        teacher.restore(experiment, spec, str(other))
    own = changed(taught, tmp_path, ('model',), {'name': 'tests.tasks.test_distill:Linear'})
    with pytest.raises(UsageError, match=r"from 'tests' too$"):
        teacher.restore(experiment, spec, str(own))
    of_same_package = experiment_of('model=tests.parallel.test_model_axis:Ruled')
    assert teacher.restore(of_same_package, spec, str(own)).model(num_outputs=2).num_outputs == 2
    other = changed(taught, tmp_path, ('data', 'preprocess'), [])
    with pytest.raises(UsageError, match=r'was trained with config.data.preprocess=\[\], the student has \[\{'):
        teacher.restore(experiment, spec, str(other))


def test_a_teacher_whose_columns_were_scaled_otherwise_is_refused(taught, tmp_path):
    plain = experiment_of(*student_of(taught))
    _, spec = build_splits(plain.data)
    scaled = [{'name': 'standardise'}]
    other = changed(taught, tmp_path, ('data', 'transforms'), scaled)
    with pytest.raises(
        UsageError, match=r"was trained with the transforms \[\{'name': 'standardise'\}\], the student has \[\]"
    ):
        teacher.restore(plain, spec, str(other))
    same = experiment_of(*student_of(taught), 'data.transforms=standardise')
    assert teacher.restore(same, spec, str(other))
    less = experiment_of(*student_of(taught), 'data.transforms=standardise', 'data.budget=5%')
    with pytest.raises(UsageError, match=r'standardise learns from the training examples, .* differ by config.data.budget'):
        teacher.restore(less, spec, str(other))


def test_a_teacher_of_other_transforms_is_refused_but_not_one_of_other_examples(taught, tmp_path):
    experiment = experiment_of()
    spec = build_splits(experiment.data)[1]
    few = {'name': 'few_labels', 'labels': '100 examples'}
    longer = changed(taught, tmp_path, ('data', 'transforms'), [few, {'name': 'pad', 'length': 9}])
    with pytest.raises(UsageError, match=r"with the transforms \[\{'name': 'pad', 'length': 9\}\], the student has \[\]"):
        teacher.restore(experiment, spec, str(longer))
    fewer = changed(taught, tmp_path, ('data', 'transforms'), [few])
    assert teacher.restore(experiment, spec, str(fewer))
    assert teacher.restore(experiment_of('data.budget=5%', 'data.validation=0.2'), spec, str(fewer))
    scaled = {'name': 'standardise'}
    of_few = changed(taught, tmp_path, ('data', 'transforms'), [few, scaled])
    with pytest.raises(UsageError, match=r"with the transforms \[\{'name': 'few_labels'"):  # it learnt from those few
        teacher.restore(experiment_of('data.transforms=standardise'), spec, str(of_few))


@pytest.mark.parametrize('key', ['source', 'validation', 'test', 'budget', 'subset_seed'])
def test_what_learns_from_the_training_split_needs_the_same_one(taught, tmp_path, key):
    others = {'source': {'name': 'shuttle'}, 'validation': 0.3, 'test': 0.3, 'budget': '50%', 'subset_seed': 7}
    experiment = experiment_of('data.transforms=standardise')
    record = RunDirectory(taught).read_run()
    assert record['config']['data'][key] != others[key]
    record['config']['data'] |= {'transforms': [{'name': 'standardise'}], key: others[key]}
    (tmp_path / 'run.json').write_text(json.dumps(record))
    with pytest.raises(UsageError, match=rf'differ by config\.data\.{key}\n'):
        teacher.restore(experiment, build_splits(experiment_of().data)[1], str(tmp_path))


def test_a_teacher_of_other_class_names_is_refused(taught, tmp_path):
    experiment = experiment_of()
    spec = build_splits(experiment.data)[1]
    names = list(spec.class_names)
    for classes, message in (
        ([names[1], names[0], *names[2:]], "has the class '1' where the student has '0'"),
        (names[:-1], "has the class None where the student has '9'"),
        ([*names, 'x'], "has the class 'x' where the student has None"),
    ):
        record = {**RunDirectory(taught).read_run(), 'class_names': classes}
        (tmp_path / 'run.json').write_text(json.dumps(record))
        with pytest.raises(UsageError, match=message):
            teacher.restore(experiment, spec, str(tmp_path))
    for classes in (names, None):
        record = {**RunDirectory(taught).read_run(), 'class_names': classes}
        (tmp_path / 'run.json').write_text(json.dumps(record))
        assert teacher.restore(experiment, spec, str(tmp_path))


def test_a_teacher_of_other_classes_is_refused(taught, monkeypatch):
    nameless = {key: value for key, value in RunDirectory(taught).read_run().items() if key != 'class_names'}
    monkeypatch.setattr(RunDirectory, 'read_run', lambda self: nameless)
    experiment = experiment_of(*student_of(taught))
    _, spec = build_splits(experiment.data)
    fewer = dataclasses.replace(spec, class_names=spec.class_names[:4], class_counts=spec.class_counts[:4])
    task = build.make_task(experiment, fewer)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), build.preprocessed(experiment, build.abstract_batch(spec, 8)))
    state = types.SimpleNamespace(model_state={'teacher': task.init(jax.random.key(0), zeros)['teacher']})
    with pytest.raises(UsageError, match=r'the teacher of config.task does not fit this model: 2 mis-shaped \(Dense_0/bias'):
        build.with_constants(state, task)


def test_a_teacher_with_another_tokenizer_is_refused(taught, monkeypatch):
    spec = spec_of('tokens')

    class Other:
        fingerprint = 'other'

    monkeypatch.setattr(teacher.tokenizers, 'load', lambda folder: Other())
    with pytest.raises(UsageError, match='reads with another tokenizer'):
        teacher.restore(experiment_of(), spec, str(taught))
    monkeypatch.setattr(teacher.tokenizers, 'load', lambda folder: LETTERS)
    teacher.restore(experiment_of(), spec, str(taught))
