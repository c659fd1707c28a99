"""The loop: what a run writes, exact resume, budgets, early stop, best, starting from another run."""

import contextlib
import json

import jax
import numpy as np
import pytest

from research.core import leaves
from research.core.errors import NumericalError, StorageError, UsageError
from research.train import array_store, hooks
from research.train.checkpoint import Checkpoints
from research.train.evaluate_run import evaluate_run
from research.train.loop import train
from research.train.run_directory import RunDirectory
from tests.train.conftest import experiment_of


def saved(path, step, folder='checkpoints'):
    """Every array of a checkpoint by name, as stored."""
    where = path / folder / str(step) / 'state'
    return leaves.flat(array_store.read(where, array_store.structure(where)))


def assert_identical(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def by_split(records, split):
    timed = ('time', 'examples_per_second', 'tokens_per_second')
    return [{k: v for k, v in r.items() if k not in timed} for r in records if r['split'] == split]


def test_a_run_tells_everything(run):
    summary, records, path = run('train.ema=0.9')
    assert summary['status'] == 'completed'
    assert summary['step'] == 12
    assert set(summary['metrics']) == {'validation', 'test'}
    assert [r['step'] for r in by_split(records, 'train')] == list(range(1, 13))
    assert [r['step'] for r in by_split(records, 'validation')] == [6, 12]
    assert [r['step'] for r in by_split(records, 'test')] == [12]
    assert {'loss', 'accuracy', 'gradient_norm', 'learning_rate', 'skipped'} <= set(by_split(records, 'train')[0])
    assert records[-1]['accuracy'] == summary['metrics']['test']['accuracy']
    recorded = json.loads((path / 'run.json').read_text())
    assert recorded['config']['train']['ema'] == 0.9
    assert {'argv', 'git', 'packages', 'devices', 'data_fingerprint', 'seed'} <= set(recorded)
    events = [json.loads(line)['event'] for line in (path / 'events.jsonl').read_text().splitlines()]
    assert events[:2] == ['start', 'compile']
    assert events[-1] == 'exit'
    assert events.count('save') == 3
    budget = summary['budget']
    assert budget['examples'] == 12 * 64
    assert budget['unique_examples'] == 12 * 64
    assert budget['flops'] > 2 * 3 * 4810 * 64 * 0.5
    assert set(budget['seconds']) == {'start', 'restore', 'compile', 'data', 'train', 'evaluate', 'save'}
    assert budget['device_seconds'] == pytest.approx(8 * sum(budget['seconds'].values()), rel=0.01)


CAREFUL = {
    'averaged and augmented': ('train.ema=0.9', 'model.dropout=0.2', 'data.augment=pad_crop(padding=1)', 'optimizer=adamw'),
    'muon, log out of step': ('optimizer=muon', 'optimizer.clip=adaptive', 'log.every=5 steps', 'data.placement=device'),
    'microbatches, bfloat16, frozen leaf': (
        'optimizer=lion', 'train.accumulate=2', 'train.precision=bfloat16',
        "optimizer.rate_rules=(('Dense_0/.*', None), ('.*', 1.0))",
    ),
    'pmap, batch statistics': ('model=cnn(features=(4,), pool=(2,), norm="batch")', 'parallel.compile=pmap', 'optimizer=lamb'),
}  # fmt: skip


@pytest.mark.parametrize('stop_at', [4, 8])
@pytest.mark.parametrize('name', CAREFUL)
def test_k_and_k_steps_equal_2k_bit_for_bit(run, dies_at, name, stop_at):
    overrides = CAREFUL[name]
    summary, records, whole = run(*overrides, folder='whole')
    dies_at(stop_at + 1)
    with pytest.raises(RuntimeError, match='the machine is gone'):
        run(*overrides, folder='parts')
    again, records_again, parts = run(*overrides, folder='parts')
    assert_identical(saved(whole, 12), saved(parts, 12))
    for split in ('train', 'validation', 'test'):
        assert by_split(records, split) == by_split(records_again, split)
    assert summary['metrics'] == again['metrics']
    events = [json.loads(line) for line in (parts / 'events.jsonl').read_text().splitlines()]
    assert [e['origin'] for e in events if e['event'] == 'start'] == ['started from scratch', f'resumed from step {stop_at}']


def test_a_finished_run_is_left_alone(run):
    _, _, path = run()
    before = {p: p.stat().st_mtime_ns for p in path.rglob('*') if p.is_file()}
    assert train(experiment_of(), path, quiet=True) == json.loads((path / 'summary.json').read_text())
    assert {p: p.stat().st_mtime_ns for p in path.rglob('*') if p.is_file()} == before


def test_a_changed_config_is_refused_with_the_difference_unless_allowed(run):
    run()
    with pytest.raises(UsageError, match=r'optimizer.learning_rate: 0.001 -> 0.5'):
        run('optimizer.learning_rate=0.5')
    summary, _, _ = run('log.every=3 steps', 'checkpoint.keep=1')  # does not matter: still complete
    assert summary['step'] == 12
    summary, records, _ = run('train.duration=16 steps', allow_change=True)
    assert summary['step'] == 16
    assert [r['step'] for r in by_split(records, 'train')] == list(range(1, 17))


def test_other_data_are_refused(run, monkeypatch):
    experiment = experiment_of('checkpoint.every=4 steps')
    _, _, path = run()
    (path / 'summary.json').unlink()
    monkeypatch.setattr('research.train.loop.fingerprint', lambda source: 'other')
    with pytest.raises(UsageError, match='training data are not those'):
        train(experiment, path, quiet=True)


def damage(folder):
    for file in folder.rglob('*'):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(b'x' * 10)


def test_a_damaged_checkpoint_is_put_away_and_the_one_before_gives_the_same_run(run):
    summary, records, path = run()
    whole = saved(path, 12)
    (path / 'summary.json').unlink()
    damage(path / 'checkpoints' / '12')
    again, records_again, _ = run()
    assert_identical(whole, saved(path, 12))
    assert again['metrics'] == summary['metrics']
    for split in ('train', 'validation', 'test'):
        assert by_split(records, split) == by_split(records_again, split)
    assert (path / 'checkpoints' / '12.corrupt').is_dir()
    events = [json.loads(line) for line in (path / 'events.jsonl').read_text().splitlines()]
    assert [e['step'] for e in events if e['event'] == 'corrupt'] == [12]


def test_damaged_checkpoints_are_never_replaced_by_a_fresh_start(run):
    _, _, path = run()
    (path / 'summary.json').unlink()
    for step in ('8', '12'):
        damage(path / 'checkpoints' / step)
    for _ in range(2):  # also when asked again
        with pytest.raises(StorageError, match=r'no checkpoint in .* is good'):
            run()
    assert sorted(p.name for p in (path / 'checkpoints').iterdir()) == ['12.corrupt', '8.corrupt']


def test_a_checkpoint_of_another_model_is_refused_leaf_by_leaf(run):
    run()
    with pytest.raises(StorageError, match=r'Dense_0/kernel is float32\(64, 16\), expected float32\(64, 17\)'):
        run('model.hidden=(17,)', allow_change=True)


def test_the_data_budget_and_the_compute_budget_do_what_they_say(run):
    whole, _, _ = run('train.duration=2 epochs', 'checkpoint.every=0 steps')
    tenth, _, _ = run('train.duration=2 epochs', 'data.budget=10%', 'checkpoint.every=0 steps', folder='tenth')
    assert whole['budget']['unique_examples'] == pytest.approx(10 * tenth['budget']['unique_examples'], abs=10)
    assert tenth['step'] == -(-2 * tenth['budget']['unique_examples'] // 64)
    flops_per_step = whole['budget']['flops'] / whole['step']
    few, _, _ = run(f'train.duration={5.5 * flops_per_step} flops', folder='few')
    assert few['step'] == 5
    assert few['budget']['flops'] <= 5.5 * flops_per_step


def test_money_is_device_hours_times_price(run):
    summary, _, _ = run('train.duration=1 step', 'price_per_device_hour=2.5')
    assert summary['budget']['money_usd'] == pytest.approx(summary['budget']['device_seconds'] / 3600 * 2.5)
    assert run('train.duration=1 step', folder='free')[0]['budget']['money_usd'] is None


def test_early_stop_and_its_memory(run):
    overrides = (
        'train.duration=100 steps', 'evaluate.every=2 steps', 'optimizer=sgd', 'optimizer.learning_rate=1e-9',
        'train.early_stop.metric=validation/accuracy', 'train.early_stop.mode=max', 'train.early_stop.patience=3',
    )  # fmt: skip
    summary, _, path = run(*overrides)
    assert summary['step'] == 8  # the first evaluation is the best, three more are borne
    assert 'validation/accuracy has not risen for 3' in summary['stopped_early']
    (path / 'summary.json').unlink()
    again, _, _ = run(*overrides)
    assert again['step'] == 8  # stopped for good, also when asked again


def test_the_best_state_is_kept_and_evaluated(run):
    overrides = (
        'checkpoint.best=validation/loss',
        'checkpoint.best_mode=min',
        'optimizer.learning_rate=0.003',
        'evaluate.every=3 steps',
    )
    summary, records, path = run(*overrides)
    losses = {r['step']: r['loss'] for r in by_split(records, 'validation')}
    best = min(losses, key=losses.get)
    assert summary['best']['step'] == best
    assert summary['best']['metrics']['validation']['loss'] == losses[best]
    assert [p.name for p in (path / 'best').iterdir() if p.name.isdigit()] == [str(best)]


def test_starting_from_another_run(run):
    _, _, path = run()
    summary, _, _ = run(f'init_from={path}', 'optimizer.learning_rate=1e-9', 'train.ema=0.9', folder='other')
    np.testing.assert_allclose(summary['metrics']['test']['loss'], run()[0]['metrics']['test']['loss'], rtol=1e-5)
    with pytest.raises(UsageError, match='holds no checkpoints'):
        run('init_from=/nowhere', folder='third')


def test_numbers_that_stay_bad_end_the_run_with_their_code(run):
    with pytest.raises(NumericalError, match='not finite') as error:
        run('optimizer=sgd', 'optimizer.learning_rate=1e30', 'train.max_skips=3', 'train.duration=50 steps')
    assert error.value.exit_code == 76


def test_any_run_can_be_evaluated_again(run):
    summary, _, path = run('checkpoint.best=validation/accuracy')
    found = evaluate_run(path, [])
    assert found['newest']['metrics'] == summary['metrics']
    assert found['best']['metrics'] == summary['best']['metrics']
    only = evaluate_run(path, ['evaluate.final=test', 'data.evaluation_batch_size=40'])
    assert set(only['newest']['metrics']) == {'test'}
    assert only['newest']['metrics']['test'] == pytest.approx(summary['metrics']['test'], rel=1e-6)
    with pytest.raises(UsageError, match='holds no run'):
        evaluate_run(path / 'nothing', [])


def test_a_run_of_a_stranger_runs_no_code(run, tmp_path):
    _, _, path = run('train.duration=1 step')
    record = json.loads((path / 'run.json').read_text())
    for key, value in (
        ('source', {'name': 'subprocess:call', 'args': ['touch', str(tmp_path / 'harm')]}),
        ('augment', [{'name': 'os:system'}]),
    ):
        changed = json.loads(json.dumps(record))
        changed['config']['data'][key] = value
        (path / 'run.json').write_text(json.dumps(changed))
        with pytest.raises(UsageError, match='names code outside Fulcrum'):
            evaluate_run(path, [])
    assert not (tmp_path / 'harm').exists()


def test_regression_of_the_digit(run):
    summary, _, _ = run(
        'task=regress(inputs="image")', 'train.duration=60 epochs', 'optimizer.learning_rate=0.003', 'log.every=50 steps',
        'evaluate.every=0 steps', 'checkpoint.every=0 steps', 'model.hidden=(64,)',
    )  # fmt: skip
    assert summary['metrics']['test']['r2'] > 0.8
    assert summary['metrics']['test']['mse'] < 1.5


def test_an_unknown_split_or_batch_that_devices_cannot_share_is_told_at_once(run):
    with pytest.raises(UsageError, match="no split 'tset'"):
        run('evaluate.final=tset')
    with pytest.raises(UsageError, match='cannot be shared by 8 devices'):
        run('data.batch_size=60')
    with pytest.raises(UsageError, match='jax sees 8 cpu device'):
        run('parallel.devices=9')


def test_nothing_is_fetched_or_compiled_between_log_steps(run, monkeypatch):
    fetches, compilations, seen = [], [], {}
    for place, name in ((jax, 'device_get'), (hooks, 'fetched')):
        fetch = getattr(place, name)
        monkeypatch.setattr(place, name, lambda tree, fetch=fetch: fetches.append(1) or fetch(tree))
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compilations.append(name) if name.endswith('backend_compile_duration') else None
    )
    original = hooks.LogHook.__call__

    def counting(self, step, state, terms):
        original(self, step, state, terms)
        seen[step] = (len(fetches), len(compilations))

    monkeypatch.setattr(hooks.LogHook, '__call__', counting)
    run('log.every=10 steps', 'train.duration=30 steps', 'evaluate.every=0 steps', 'checkpoint.every=0 steps')
    assert len(compilations) > 0
    assert seen[3] == seen[9]
    assert seen[10][0] == seen[9][0] + 1
    assert seen[11] == seen[19]
    assert seen[20] == (seen[19][0] + 1, seen[19][1])  # nothing is compiled after the first record
    assert seen[21] == seen[29]


@contextlib.contextmanager
def death_after(monkeypatch, step):
    """The process dies after `step` steps."""
    original = hooks.LogHook.__call__

    def dying(self, k, state, terms):
        original(self, k, state, terms)
        if k == step:
            raise RuntimeError('the machine is gone')

    with monkeypatch.context() as patch:
        patch.setattr(hooks.LogHook, '__call__', dying)
        with pytest.raises(RuntimeError, match='the machine is gone'):
            yield


def test_a_run_whose_new_config_is_interrupted_is_not_complete(run, monkeypatch):
    run()
    with death_after(monkeypatch, 17):
        run('train.duration=20 steps', allow_change=True)
    assert run('train.duration=20 steps')[0]['step'] == 20


def test_a_new_config_that_does_not_fit_leaves_the_run_to_its_old_one(run):
    _, _, path = run('train.duration=8 steps')
    with pytest.raises(StorageError, match='does not fit'):
        run('model.hidden=(17,)', 'train.duration=8 steps', allow_change=True)
    assert run('train.duration=8 steps')[0]['step'] == 8
    assert evaluate_run(path, [])['newest']['step'] == 8


def test_a_start_that_failed_before_its_first_step_blocks_nothing(run):
    with pytest.raises(UsageError, match='holds no checkpoints'):
        run('init_from=/nowhere')
    assert run()[0]['step'] == 12


def test_evaluating_a_live_run_touches_nothing(run):
    _, _, path = run()
    under_way = path / 'checkpoints' / '16.orbax-checkpoint-tmp'
    under_way.mkdir()
    (under_way / 'array').write_text('x')
    evaluate_run(path, [])
    assert (under_way / 'array').exists()


def test_a_second_process_is_refused(run, tmp_path):
    directory = RunDirectory(tmp_path / 'run')
    directory.create()
    with directory.lock.held(), pytest.raises(UsageError, match=r'process \d+ on .* trains in'):
        run()
    assert run()[0]['step'] == 12


BEST = ('checkpoint.best=validation/loss', 'evaluate.every=4 steps')


def test_a_best_state_that_cannot_be_saved_does_not_end_a_run(run, monkeypatch, capsys):
    prepared, refused = Checkpoints._prepared, []

    def full(self, target, size):
        if self.folder.name == 'best' and target.name == '12.tmp':
            refused.append(target.name)
            return 'No space left on device'
        return prepared(self, target, size)

    monkeypatch.setattr(Checkpoints, '_prepared', full)
    summary = train(experiment_of(*BEST, 'checkpoint.retry_minutes=0.0001'), run.path)
    assert refused == ['12.tmp']
    assert summary['best']['step'] == 8
    assert 'the best state, of step 12, could not be saved; the one of step 8 is kept' in capsys.readouterr().out


def test_a_damaged_best_state_does_not_keep_a_run_from_its_end(run, capsys):
    summary, _, path = run(*BEST)
    (path / 'summary.json').unlink()
    data = max((p for p in (path / 'best').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    again = train(experiment_of(*BEST), path)
    assert again['metrics'] == summary['metrics']
    assert again['best'] is None
    assert [p.name for p in (path / 'best').iterdir()] == [f'{summary["best"]["step"]}.corrupt']
    out = capsys.readouterr().out
    assert 'is damaged' in out
    assert 'the best state is lost' in out


def test_the_best_state_is_of_the_course_that_was_kept(run, monkeypatch):
    overrides = ('checkpoint.best=validation/loss', 'evaluate.every=5 steps', 'checkpoint.every=8 steps')
    with death_after(monkeypatch, 11):  # best is step 10, the newest checkpoint step 8
        run(*overrides)
    summary, records, path = run(*overrides)
    assert summary['best']['step'] == 10
    losses = {r['step']: r['loss'] for r in by_split(records, 'validation')}
    assert summary['best']['metrics']['validation']['loss'] == losses[10]
    events = [json.loads(line) for line in (path / 'events.jsonl').read_text().splitlines()]
    assert [e['step'] for e in events if e['event'] == 'save' and e['folder'] == 'best'] == [5, 10, 10]


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('checkpoint.best=validation/acuracy', "did you mean 'validation/accuracy'"),
        ('checkpoint.best=test/accuracy', "'test/accuracy' is not measured"),
        ('train.early_stop.metric=loss', "'loss' is not measured"),
    ],
)
def test_a_metric_that_is_never_measured_cannot_be_watched(run, override, message):
    with pytest.raises(UsageError, match=message):
        run(override)
    with pytest.raises(UsageError, match='nothing is evaluated before the end'):
        run('checkpoint.best=validation/loss', 'evaluate.every=0 steps')


def test_losses_are_watched_downwards_and_scores_upwards():
    names = ('validation/loss', 'validation/mae', 'validation/accuracy', 'test/f1_macro')
    assert [hooks.direction(name) for name in names] == ['min', 'min', 'max', 'max']


def test_a_run_that_ends_in_bad_numbers_is_not_completed(run):
    with pytest.raises(NumericalError, match='not finite'):
        run('optimizer=sgd', 'optimizer.learning_rate=1e30', 'log.every=12 steps')


def test_without_the_guard_bad_states_are_not_saved(run, tmp_path):
    overrides = ('optimizer=sgd', 'optimizer.learning_rate=1e30', 'train.skip_nonfinite=false', 'log.every=12 steps')
    with pytest.raises(NumericalError, match='the state holds NaN'):
        run(*overrides, 'checkpoint.every=2 steps')
    kept = [int(p.name) for p in (tmp_path / 'run').glob('checkpoints/*') if p.name.isdigit()]
    assert all(np.isfinite(v).all() for step in kept for v in saved(tmp_path / 'run', step).values())
    events = [json.loads(line) for line in (tmp_path / 'run' / 'events.jsonl').read_text().splitlines()]
    assert (events[-1]['event'], events[-1]['code']) == ('exit', 76)


def test_device_seconds_add_up_over_other_numbers_of_devices(run, monkeypatch):
    with death_after(monkeypatch, 9):
        run('parallel.devices=8')
    checkpointed = json.loads((run.path / 'checkpoints' / '8' / 'manifest.json').read_text())['meta']
    budget = run('parallel.devices=1')[0]['budget']
    own = sum(budget['seconds'].values()) - sum(checkpointed['seconds'].values())
    assert budget['device_seconds'] == pytest.approx(checkpointed['device_seconds'] + own, rel=0.02)
    assert checkpointed['device_seconds'] == pytest.approx(8 * sum(checkpointed['seconds'].values()), rel=0.05)


def test_an_evaluation_cannot_move_the_splits(run):
    _, _, path = run()
    with pytest.raises(UsageError, match=r'cannot change what was trained: data\.test'):
        evaluate_run(path, ['data.test=0.6'])
