"""Bad numbers: a step is skipped, a run goes back and leaves batches out, and gives up with something to look at."""

import json
import math

import numpy as np
import pytest

from research.core.errors import NumericalError, UsageError
from research.train import faults, loop, replay
from research.train.numbers import BASE, RECENT, BadNumbersError, Losses
from research.train.rollback import Shifted, shifted
from tests.train.test_loop import assert_identical, by_split, saved

FORM = '_'.join(('hf', 'a1B2c3D4e5' * 3))  # of a secret, in parts: this file holds none


@pytest.fixture
def batches_go_wrong(monkeypatch):
    """Has batches of the plan go wrong in this process: 'nan' or 'spike', first and last number."""

    def wrong(*some):
        monkeypatch.setattr(loop, 'make_feed', make_feed)
        faults._install_batches(list(some))

    make_feed = loop.make_feed
    monkeypatch.setattr(loop, 'make_feed', make_feed)  # put back at the end
    return wrong


def events_of(path, kind):
    events = [json.loads(line) for line in (path / 'events.jsonl').read_text().splitlines()]
    return [event for event in events if event['event'] == kind]


def test_one_bad_batch_changes_nothing_but_the_count(run, batches_go_wrong):
    batches_go_wrong(('nan', 5, 5))
    summary, records, path = run('train.duration=6 steps', 'checkpoint.every=1 step', 'checkpoint.keep=9', 'train.ema=0.9')
    before, after = saved(path, 5), saved(path, 6)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {'step', 'extra/skips/total', 'extra/skips/in_a_row'}
    assert (summary['skipped_steps'], summary['rollbacks']) == (1, 0)
    assert by_split(records, 'train')[5]['skipped'] == 1.0


def test_bad_batches_are_left_out_from_the_last_good_checkpoint(run, batches_go_wrong):
    _, clean, _ = run(folder='clean')
    batches_go_wrong(('nan', 5, 8))
    summary, records, path = run('train.max_skips=3')
    assert summary['rollbacks'] == 1
    assert json.loads((path / 'rollbacks.json').read_text())[0] | {'reason': ''} == {
        'at': 4,
        'count': 4,
        'step': 8,
        'reason': '',
    }
    train = by_split(records, 'train')
    assert [r['step'] for r in train] == list(range(1, 13))
    assert train[:4] == by_split(clean, 'train')[:4]
    # Batch 8 of the plan is the last bad one: it is skipped by the guard, not by the window, which ends where it was noticed.
    assert [r['step'] for r in train if r['skipped']] == [5]
    assert [(e['step'], e['to']) for e in events_of(path, 'rollback')] == [(8, 4)]
    assert summary['budget']['seconds']['lost'] > 0


@pytest.mark.parametrize('stop_at', [6, 10])
def test_a_run_that_went_back_resumes_bit_for_bit(run, batches_go_wrong, dies_at, stop_at):
    batches_go_wrong(('nan', 5, 8))
    _, records, whole = run('train.max_skips=3', folder='whole')
    dies_at(stop_at)
    with pytest.raises(RuntimeError, match='the machine is gone'):
        run('train.max_skips=3', folder='parts')
    _, records_again, parts = run('train.max_skips=3', folder='parts')
    assert_identical(saved(whole, 12), saved(parts, 12))
    assert by_split(records, 'train') == by_split(records_again, 'train')


@pytest.mark.parametrize('kind', ['jit', 'pmap'])
def test_numbers_that_stay_bad_end_with_a_bundle_that_can_be_replayed(run, batches_go_wrong, monkeypatch, capsys, kind):
    batches_go_wrong(('nan', 5, 10**6))
    with pytest.raises(NumericalError, match='the last 3 steps are not finite at step 7 after 2 rollbacks') as error:
        run('train.max_skips=3', 'train.max_rollbacks=2', 'optimizer=adamw', f'name={FORM}', f'parallel.compile={kind}')
    assert error.value.exit_code == 76
    assert FORM not in (run.path / 'failure' / 'bundle.json').read_text()  # people attach it to reports
    bundle = json.loads((run.path / 'failure' / 'bundle.json').read_text())
    assert [b['step'] for b in bundle['batches']] == [4, 5, 6]
    assert bundle['checkpoint'] == 4
    assert len(bundle['batches'][0]['ids']) == 64
    assert bundle['config']['train']['max_skips'] == 3
    monkeypatch.setattr(replay, 'make_feed', loop.make_feed)
    with pytest.raises(NumericalError, match='nan'):
        replay.report(run.path, [], False)
    assert 'resumed from step 4' in capsys.readouterr().out
    _, _, path = run('train.duration=1 step', folder='good')
    with pytest.raises(UsageError, match='has no failure to replay'):
        replay.report(path, [], False)


def test_a_streak_longer_than_what_is_kept_goes_back_to_the_oldest_that_is(run, batches_go_wrong):
    """The guard has kept the state as it was, so that a checkpoint from within is as good as one from before."""
    batches_go_wrong(('nan', 3, 9))
    few = ('checkpoint.every=2 steps', 'checkpoint.keep=1', 'log.every=10 steps', 'train.max_skips=3')
    summary, records, path = run(*few)
    (event,) = events_of(path, 'rollback')
    assert (event['step'], event['to']) == (10, 8)
    assert summary['step'] == 12
    assert summary['skipped_steps'] == 5  # those up to the checkpoint; it was not begun anew
    assert [r['step'] for r in by_split(records, 'train')] == [10, 12]


def test_a_spike_that_no_checkpoint_is_older_than_deletes_nothing(run, batches_go_wrong):
    batches_go_wrong(('spike', 168, 10**6))
    with pytest.raises(NumericalError, match='no checkpoint from before is kept') as error:
        run(
            'train.duration=220 steps', 'optimizer.learning_rate=0.01', 'log.every=60 steps', 'checkpoint.every=1 step',
            'checkpoint.keep=1', 'evaluate.every=0 steps', 'evaluate.final=validation', 'train.spike_sigmas=20',
        )  # fmt: skip
    assert 'config.checkpoint.keep' in error.value.fix
    assert [p.name for p in (run.path / 'checkpoints').iterdir()] == ['179']  # those of before the 168th are gone
    assert (run.path / 'failure' / 'bundle.json').exists()


def test_a_run_that_saved_nothing_is_replayed_from_scratch_and_leaves_no_past(run, batches_go_wrong, monkeypatch, capsys):
    batches_go_wrong(('nan', 1, 10**6))
    few = ('train.max_skips=2', 'train.max_rollbacks=1', 'checkpoint.every=0 steps')
    with pytest.raises(NumericalError, match='another --workdir, or with --allow_config_change'):
        run(*few)
    assert not list((run.path / 'checkpoints').glob('*'))
    monkeypatch.setattr(replay, 'make_feed', loop.make_feed)
    with pytest.raises(NumericalError, match='nan'):
        replay.report(run.path, [], False)
    assert 'started from scratch' in capsys.readouterr().out
    batches_go_wrong()
    summary, records, path = run(*few, 'optimizer.learning_rate=0.002')  # another experiment, in the same place
    _, clean, _ = run(*few, 'optimizer.learning_rate=0.002', folder='clean')
    assert summary['rollbacks'] == 0
    assert by_split(records, 'train') == by_split(clean, 'train')
    assert not (path / 'failure').exists()
    assert [e['event'] for e in events_of(path, 'start')] == ['start']


def test_a_replay_tells_parameters_from_data(run, monkeypatch, capsys):
    monkeypatch.setattr(replay, 'make_feed', loop.make_feed)
    with pytest.raises(NumericalError):
        run('optimizer=sgd', 'optimizer.learning_rate=1e30', 'train.max_skips=2', 'train.max_rollbacks=1')
    with pytest.raises(NumericalError) as error:
        replay.report(run.path, [], False)
    assert 'the largest parameter is' in error.value.fix
    assert 'De-optimized' not in capsys.readouterr().out


def test_a_loss_that_jumps_makes_the_run_go_back(run, batches_go_wrong):
    batches_go_wrong(('spike', 168, 179))
    summary, records, path = run(
        'train.duration=220 steps', 'optimizer.learning_rate=0.01', 'log.every=10 steps', 'checkpoint.every=10 steps',
        'checkpoint.keep=6', 'evaluate.every=0 steps', 'evaluate.final=validation', 'train.spike_sigmas=20',
    )  # fmt: skip
    (event,) = events_of(path, 'rollback')
    assert 'the loss has jumped' in event['reason']
    assert event['to'] <= 170
    assert event['step'] in (180, 190)
    assert summary['rollbacks'] == 1
    assert all(math.isfinite(r['loss']) for r in by_split(records, 'train'))


def test_shifting_is_arithmetic():
    history = [{'at': 4, 'count': 3}, {'at': 6, 'count': 10}]
    assert [shifted(k, history) for k in (0, 3, 4, 5, 6, 9)] == [0, 3, 7, 8, 19, 22]

    class Plan:
        batch_size = 2

        def batch(self, step):
            return step

    assert Shifted(Plan(), history).batch(5) == 8
    assert Shifted(Plan(), history).batch_size == 2


def noisy(n, level, seed=0):
    return list(level + 0.02 * np.random.default_rng(seed).standard_normal(n))


def test_a_spike_is_a_median_far_from_the_median_before():
    losses = Losses(30.0)
    losses.add([2.3, *noisy(BASE, 0.5), *noisy(RECENT, 1.6, 1)])
    with pytest.raises(BadNumbersError) as error:
        losses.check(137)
    assert error.value.since < 137 - 4
    for calm in (
        [2.3, *noisy(200, 0.5)],
        [2.3, *noisy(150, 0.5), 50.0, 60.0, *noisy(20, 0.5)],  # two bad batches are no spike
        [2.3, *(2.3 * np.exp(-np.arange(300) / 50))],
        [2.3, *noisy(20, 0.5), *noisy(10, 5.0)],  # too few to judge by
    ):
        losses = Losses(30.0)
        losses.add(calm)
        losses.check(len(calm))
    losses = Losses(None)
    losses.add([2.3, *noisy(BASE, 0.5), *noisy(RECENT, 100.0)])
    losses.check(137)


def test_what_is_left_unjudged_would_not_have_spiked(monkeypatch):
    """Losses of all kinds, beside a judge who looks at each."""
    random, spikes = np.random.default_rng(0), 0
    for _ in range(400):
        values = np.abs(random.normal(random.uniform(0, 3), random.choice([0.001, 0.02, 0.3]), random.integers(40, 260)))
        for _ in range(random.integers(0, 4)):  # stretches around half of those that a median is of
            begin, size = random.integers(len(values)), random.integers(2, 14)
            values[begin : begin + size] += random.choice([0.02, 0.3, 3.0, np.nan, np.inf])
        sigmas = float(random.choice([0.0, 1.0, 5.0, 30.0]))
        found = verdict(Losses(sigmas), values.tolist())
        with monkeypatch.context() as patch:
            patch.setattr(Losses, '_high', lambda self, values: [True] * len(values))
            assert found == verdict(Losses(sigmas), values.tolist())
        spikes += found is not None
    assert 50 < spikes < 350


def verdict(losses, values):
    """When and why the losses are told to spike, if they do."""
    losses.add(values)
    try:
        losses.check(len(values))
    except BadNumbersError as error:
        return error.since, error.reason
    return None


def test_losses_judge_the_same_after_a_restart():
    values = [2.3, *noisy(300, 0.5), *noisy(30, 2.0, 1)]

    def judged(stops):
        losses, told = Losses(30.0), None
        for step in range(1, len(values) + 1):
            losses.add([values[step - 1]])
            if step in stops:
                losses = Losses(30.0, json.loads(json.dumps(losses.to_keep())))
            if step % 25 == 0 and told is None:
                try:
                    losses.check(step)
                except BadNumbersError as error:
                    told = (error.since, error.step, error.reason)
        return told

    assert judged(()) is not None
    assert judged((7, 133, 290, 301, 310)) == judged(())
