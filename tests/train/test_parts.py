"""The small parts of training: evaluation, FLOPs, records, progress, checkpoints, hooks' arithmetic."""

import io
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from research.core.errors import AccessError, StorageError
from research.data.augment import chain, normalise
from research.data.build import build_splits
from research.data.pipeline import HostFeed
from research.data.plan import EvaluationPlan
from research.parallel import mesh as meshes
from research.train import build, flops, hooks
from research.train import writer as writer_module
from research.train.evaluate import Evaluator, chosen
from research.train.progress import Pace, Reporter, clock_text
from research.train.provenance import provenance
from research.train.run import shown
from research.train.run_directory import RunDirectory
from research.train.writer import Writer
from tests.train.conftest import experiment_of


@pytest.mark.parametrize(('devices', 'batch'), [(1, 353), (1, 100), (8, 64), (8, 8)])
def test_evaluation_is_exact_over_remainders_batches_and_devices(devices, batch):
    experiment = experiment_of("task.metrics=('accuracy', 'f1', 'auroc')")
    splits, spec = build_splits(experiment.data)
    task = build.make_task(experiment, spec)
    mesh = meshes.make_mesh(devices)
    whole = splits['test'][np.arange(len(splits['test']))]
    inputs = {**whole, 'image': jnp.asarray(whole['image'] / 255, jnp.float32), 'mask': jnp.ones(len(whole['label']))}
    variables = task.init(jax.random.key(3), inputs)
    plan = EvaluationPlan(len(splits['test']), batch)
    feed = HostFeed(splits['test'], plan, meshes.batch_sharding(mesh))
    found = Evaluator(task, chain([normalise()]), mesh)(variables, feed, len(plan))
    logits = np.asarray(task.predict(variables, inputs), np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert found['accuracy'] == pytest.approx(sklearn.metrics.accuracy_score(whole['label'], logits.argmax(-1)), abs=1e-12)
    assert found['f1_macro'] == pytest.approx(
        sklearn.metrics.f1_score(whole['label'], logits.argmax(-1), average='macro', zero_division=0)
    )
    assert found['loss'] == pytest.approx(sklearn.metrics.log_loss(whole['label'], probabilities), rel=1e-5)


def test_flops_of_an_mlp_are_those_on_paper():
    experiment = experiment_of('model.hidden=(1024,)')
    splits, spec = build_splits(experiment.data)
    facts = build.measure(experiment, build.make_task(experiment, spec), spec, splits['train'])
    # Forward 2 per weight and example; backward the weights' gradients, and the inputs' of all layers but the first.
    first, second = 64 * 1024, 1024 * 10
    assert facts.step_flops == pytest.approx(64 * (2 * 2 * first + 3 * 2 * second), rel=0.03)


def test_the_model_table_shows_shapes_parameters_bytes_and_flops():
    experiment = experiment_of()
    _, spec = build_splits(experiment.data)
    task = build.make_task(experiment, spec)
    text = flops.table(task.module, {'inputs': jax.ShapeDtypeStruct((64, 8, 8, 1), jnp.float32)})
    for word in ('Dense_0', 'float32[64,16]', '1,040 (4.2 KB)', 'flops', 'vjp_flops', 'Total Parameters: 1,210'):
        assert word in text


def test_records_are_on_disk_at_once_and_in_tensorboard(tmp_path):
    directory = RunDirectory(tmp_path)
    with Writer(directory, tensorboard=True) as writer:
        writer.write(3, 'train', 1.5, {'loss': 0.25, 'per_class': [1.0, float('nan')], 'mfu': None})
        record = json.loads(directory.metrics.read_text())  # before it is closed
    assert record == {'step': 3, 'split': 'train', 'time': 1.5, 'loss': 0.25, 'per_class': [1.0, None], 'mfu': None}
    data = b''.join(p.read_bytes() for p in directory.tensorboard.iterdir())
    assert b'train/loss' in data
    assert b'per_class' not in data


def test_tensorboard_may_fail_or_hang(tmp_path, monkeypatch):
    class Failing:
        def add_scalar(self, *item):
            raise OSError('no space left')

        def close(self):
            raise OSError('no space left')

    class Hanging(Failing):
        def add_scalar(self, *item):
            gone.wait(20)

    gone = threading.Event()
    monkeypatch.setattr(writer_module, 'BOARD_CLOSE_S', 0.2)
    for kind in (Failing, Hanging):
        told = []
        directory = RunDirectory(tmp_path / kind.__name__)
        directory.create()
        monkeypatch.setattr(writer_module, '_tensorboard', lambda folder, kind=kind: kind())
        began = time.monotonic()
        with Writer(directory, tensorboard=True, say=told.append) as writer:
            for step in range(3):
                writer.write(step, 'train', 1.0, {'loss': 0.25})
        assert time.monotonic() - began < 5
        assert [r['step'] for r in directory.read_metrics()] == [0, 1, 2]
        assert bool(told) == (kind is Failing)
    gone.set()


def test_records_that_wait_for_the_disk_are_told_of_and_count(tmp_path):
    told = []
    directory = RunDirectory(tmp_path / 'run')
    with Writer(directory, tensorboard=False, say=told.append) as writer:
        for step in (1, 2):
            writer.write(step, 'validation', 1.0, {'loss': 0.25})  # there is no folder
        assert len(told) == 1
        assert 'wait in memory' in told[0]
        assert 'No such file' in writer.flush(sync=True)
        assert [r['step'] for r in writer.records()] == [1, 2]
        directory.create()
        writer.keep_until(1)
        assert writer.flush(sync=True) is None
        assert [r['step'] for r in writer.records()] == [1]
        writer.write(2, 'validation', 1.0, {'loss': 0.5})
    assert [(r['step'], r['loss']) for r in directory.read_metrics()] == [(1, 0.25), (2, 0.5)]


def test_records_after_a_step_are_dropped(tmp_path):
    directory = RunDirectory(tmp_path)
    with Writer(directory, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.write(step, 'train', step, {'loss': 1.0})
    directory.keep_metrics_until(3)
    assert [r['step'] for r in directory.read_metrics()] == [1, 2, 3]


@pytest.mark.parametrize(
    ('refusal', 'error'),
    [(PermissionError(13, 'Permission denied'), AccessError), (OSError(28, 'No space left on device'), StorageError)],
)
def test_a_folder_that_refuses_has_its_exit_code(tmp_path, monkeypatch, refusal, error):
    def refuse(*arguments, **options):
        raise refusal

    monkeypatch.setattr('pathlib.Path.touch', refuse)
    with pytest.raises(error) as raised:
        RunDirectory(tmp_path / 'run').create()
    assert raised.value.exit_code == {AccessError: 77, StorageError: 74}[error]


def test_plain_lines_come_every_few_seconds_and_name_the_phase(monkeypatch):
    now = [0.0]
    monkeypatch.setattr('research.train.progress.time.monotonic', lambda: now[0])
    reporter = Reporter(plain_every=5.0)
    out = reporter.console.file = io.StringIO()
    with reporter:
        now[0] = 100.0
        reporter.begin(0, 100)
        for step in range(1, 101):
            now[0] += 1
            reporter.advance(step)
            reporter.figures('loss 0.5')
    lines = [line for line in out.getvalue().split('\n') if line]
    assert 20 <= len(lines) <= 22
    assert 'step 51/100 51%  ETA 0:00:49  loss 0.5' in lines
    assert all('\r' not in line and '\x1b' not in line for line in lines)


def test_pace_and_times():
    assert Pace(3, 10).remaining() == '-:--:--'
    assert [clock_text(s) for s in (0, 59.6, 3600, 90061, -5)] == ['0:00:00', '0:01:00', '1:00:00', '25:01:01', '0:00:00']


def test_figures_are_shown_for_people():
    assert shown({'loss': 0.123456, 'accuracy': 1.0, 'tiny': 1e-7, 'big': 123456.0, 'list': [1.0], 'none': None}) == (
        'loss 0.1235  accuracy 1.0000  tiny 1e-07  big 1.23e+05'
    )


@pytest.mark.parametrize(
    ('values', 'mode', 'margin', 'since'),
    [
        ([3.0, 2.0, 1.0], 'min', 0.0, 0),
        ([1.0, 2.0, 3.0], 'min', 0.0, 2),
        ([1.0, 1.0, 1.0], 'max', 0.0, 2),
        ([1.0, 1.05, 1.2], 'max', 0.1, 0),
        ([1.0, 1.05, 1.08], 'max', 0.1, 2),
        ([float('nan'), 5.0, float('nan')], 'min', 0.0, 1),
        ([float('nan')] * 3, 'max', 0.0, 3),
        ([], 'min', 0.0, 0),
    ],
)
def test_evaluations_since_the_best(values, mode, margin, since):
    assert hooks.evaluations_since_best(values, mode, margin) == since


def test_the_best_step():
    values = [(1, 0.5), (2, float('nan')), (3, 0.9), (4, 0.9), (5, 0.1)]
    assert hooks.best_step(values, 'max') == 3
    assert hooks.best_step(values, 'min') == 5
    assert hooks.best_step([(1, float('nan'))], 'max') is None


def test_provenance_keeps_no_environment_but_jax_flags(monkeypatch):
    monkeypatch.setenv('MY_SECRET_TOKEN', 'xyzzy')
    found = provenance()
    assert 'xyzzy' not in json.dumps(found)
    assert found['devices']['count'] == 8
    assert found['packages']['jax'] == jax.__version__
    assert found['environment']['JAX_PLATFORMS'] == 'cpu'


def test_every_round_of_a_scan_counts():
    def scanned(x, kernels):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

    def nested(x, kernels):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(scanned)(x, kernels), None), x, length=3)[0]

    x, kernels = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    one = 2 * 8 * 16 * 16
    assert flops.count(scanned, x, kernels) == pytest.approx(5 * one, rel=0.02)
    assert flops.count(nested, x, kernels) == pytest.approx(15 * one, rel=0.02)
    gradient = jax.grad(lambda kernels, x: nested(x, kernels).sum())
    assert flops.count(gradient, kernels, x) == pytest.approx(15 * 4 * one, rel=0.15)  # forward twice, backward twice


def test_an_evaluation_can_be_limited_to_evenly_spaced_batches():
    assert chosen(10, 3) == [0, 3, 6]
    assert chosen(10, None) == chosen(10, 99) == list(range(10))
    assert chosen(7, 1) == [0]
