"""The books of a run: hand-made events with known answers, random runs against a simulation that knows, and a real run."""

import dataclasses
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from research.core import files
from research.core.errors import ExitCode, StoppedError, UsageError
from research.train import ledger as ledgers
from research.train.ledger import CODES, ledger, lives_of, report

T0 = 1_800_000_000.0
BEGUN = {'start': 10.0, 'compile': 5.0}  # after 15 s


def start(began, step=0, alive=None, took=10.0):
    alive = None if alive is None else T0 + alive
    return {'event': 'start', 'time': T0 + began + took, 'began': T0 + began, 'step': step, 'previous_alive': alive}


def event(kind, at, seconds=None, **more):
    seconds = {} if seconds is None else {'seconds': seconds}
    return {'event': kind, 'time': T0 + at, **more, **seconds}


def save(at, step, seconds, folder='checkpoints'):
    return event('save', at, seconds, step=step, folder=folder)


def leave(at, code, seconds=None):
    return event('exit', at, seconds, status='some', code=code)


def books(*events):
    """(phases above zero rounded, wall, unaccounted rounded)."""
    result = ledger(events)
    check(result)
    seconds = {name: round(s, 5) for name, s in result.seconds.items() if round(s, 5)}
    return seconds, round(result.wall, 5), round(result.unaccounted, 5)


def check(result):
    assert math.isclose(math.fsum(result.seconds.values()) + result.unaccounted, result.wall, abs_tol=1e-9)
    assert min(result.seconds.values()) >= 0 and result.wall >= 0
    assert 0 <= result.goodput <= 1
    assert not re.search(r'-\d', ' '.join([*result.lines(), result.one_line()]))


LONG = {**BEGUN, 'train': 70.0, 'data': 5.0, 'evaluate': 6.0, 'save': 4.0}
CLEAN = (
    start(0),
    event('compile', 15, BEGUN),
    save(60, 10, {**BEGUN, 'train': 40.0, 'data': 3.0, 'save': 2.0}),
    leave(100, 0, LONG),
)


def test_one_clean_life():
    assert books(*CLEAN) == (LONG, 100, 0)
    assert ledger(CLEAN).lives == 1
    assert ledger(CLEAN).goodput == pytest.approx(0.7)


def test_no_events():
    assert books() == ({}, 0, 0)
    assert ledger([]).one_line() == 'goodput 0.0 % of 0.0 s'
    assert books(event('corrupt', 3, step=1), leave(5, 74, {'start': 2.0})) == ({}, 0, 0)


def test_what_the_phases_leave_out_is_unaccounted():
    assert books(start(0), leave(100, 0, {**BEGUN, 'train': 81.0})) == ({**BEGUN, 'train': 81}, 100, 4)
    assert books(start(0), leave(100, 0)) == ({'start': 10}, 100, 90)


def test_more_phases_than_wall_time_are_not_hidden():
    """Phases that count twice: the sum is not scaled to fit."""
    twice = ledger([start(0), leave(100, 0, {**BEGUN, 'train': 105.0})])
    check(twice)
    assert twice.unaccounted == pytest.approx(-20)
    assert twice.lines()[-1] == '  20.0 s more than the wall time are counted: was the clock set back?'
    assert 'unaccounted 20.0 %' in twice.one_line()


def test_the_worked_example():
    first = {'start': 10.0, 'compile': 5.0, 'train': 14.0, 'save': 1.0}
    events = [start(0), save(30, 10, first), start(50, 10, alive=40), leave(90, 0, {**first, 'train': 24.0})]
    expected = {'train': 38, 'save': 2, 'start': 20, 'compile': 10, 'lost': 10, 'down': 10}
    assert books(*events) == (expected, 90, 0)
    assert f'{100 * ledger(events).goodput:.1f} %' == '42.2 %'
    events[2]['step'] = 0
    assert books(*events) == ({**expected, 'train': 24, 'save': 1, 'lost': 25}, 90, 0)


AT_50 = {**BEGUN, 'train': 30.0, 'save': 5.0}


def test_a_killed_life_without_a_sign_of_life_ends_with_its_last_event():
    events = [start(0), save(50, 10, AT_50), event('save_failed', 58, step=20), start(60, 10), leave(80, 0, BEGUN)]
    assert books(*events) == ({'start': 20, 'compile': 10, 'train': 30, 'save': 5, 'lost': 8, 'down': 2}, 80, 5)


def test_killed_twice():
    """The second life dies before its first snapshot: its start-up is known, the rest is lost."""
    events = [start(0), save(50, 10, AT_50), start(70, 10, alive=65), start(100, 10, alive=87), leave(115, 0, BEGUN)]
    expected = {'start': 30, 'compile': 10, 'train': 30, 'save': 5, 'lost': 15 + 7, 'down': 5 + 13}
    assert books(*events) == (expected, 115, 0)


def test_a_sign_of_life_is_neither_older_than_the_last_event_nor_younger_than_the_next_life():
    known = {'start': 20, 'compile': 10, 'train': 30, 'save': 5}
    for alive, wrong in ((45, {'down': 20}), (60, {'lost': 10, 'down': 10}), (75, {'lost': 20})):
        events = [start(0), save(50, 10, AT_50), start(70, 10, alive), leave(85, 0, BEGUN)]
        assert books(*events) == ({**known, **wrong}, 85, 0)


def test_fallback_to_an_older_checkpoint_takes_the_work_of_several_lives():
    """The checkpoints of steps 20 and 30 were damaged: what life 1 did after step 10, and all of life 2, is lost."""
    at_80 = {**BEGUN, 'train': 55.0, 'save': 6.0, 'evaluate': 4.0}
    second = {**BEGUN, 'train': 20.0, 'data': 3.0, 'save': 2.0}
    third = {**BEGUN, 'train': 7.0}
    events = [start(0), save(50, 10, AT_50), save(80, 20, at_80), leave(80, 75, at_80)]
    events += [start(100, 20), save(140, 30, second), leave(140, 1, second)]
    assert books(*events)[0]['train'] == 75
    events += [event('corrupt', 155, step=30), event('corrupt', 156, step=20), start(150, 10), leave(172, 0, third)]
    lost = (80 - 50) + (140 - 115)
    expected = {'start': 30, 'compile': 15, 'train': 30 + 7, 'save': 5, 'lost': lost, 'down': 20 + 10}
    assert books(*events) == (expected, 172, 0)
    # Again to step 10: nothing is lost twice.
    events += [start(172, 10), leave(187, 0, BEGUN)]
    assert books(*events) == ({**expected, 'start': 40, 'compile': 20, 'train': 30, 'lost': lost + 7}, 187, 0)


def test_a_best_checkpoint_is_none_to_go_on_from():
    later = {**AT_50, 'train': 40.0}
    events = [
        start(0),
        save(50, 10, AT_50),
        save(60, 10, later, 'best'),
        leave(60, 1, later),
        start(60, 10),
        leave(75, 0, BEGUN),
    ]
    assert books(*events) == ({'start': 20, 'compile': 10, 'train': 30, 'save': 5, 'lost': 10}, 75, 0)


def test_an_unknown_step_falls_to_the_save_before_it():
    """The event of a save can be missing (disk full): rather too much is called lost than too little."""
    later = {**AT_50, 'train': 60.0}
    events = [start(0), save(50, 10, AT_50), leave(80, 1, later), start(80, 15), leave(95, 0, BEGUN)]
    assert books(*events)[0]['lost'] == 30


def test_from_scratch_again_loses_all_useful_work():
    events = [*CLEAN, start(110, 0), leave(125, 0, BEGUN)]
    assert books(*events) == ({'start': 20, 'compile': 10, 'lost': 85, 'down': 10}, 125, 0)


def test_a_save_of_step_0_holds_no_work():
    begun = {**BEGUN, 'save': 2.0}
    events = [start(0), save(17, 0, begun), leave(17, 75, begun), start(20, 0), leave(35, 0, BEGUN)]
    assert books(*events) == ({'start': 20, 'compile': 10, 'lost': 2, 'down': 3}, 35, 0)


def test_rounding_below_zero_is_zero():
    """What a life takes over of earlier ones is subtracted again: (a + b) - b."""
    assert ledger([start(0), leave(100, 0, {**LONG, 'restore': -1e-14})]).seconds['restore'] == 0


ROLLED = {**BEGUN, 'restore': 1.0, 'train': 30.0, 'save': 4.5, 'lost': 14.5}


def test_rollback_inside_a_life():
    rollback = event('rollback', 65, ROLLED, step=14, to=10)
    events = [start(0), save(50, 10, AT_50), save(58, 12, {**AT_50, 'train': 37.0, 'save': 6.0}), rollback]
    last = {**ROLLED, 'train': 49.0, 'save': 5.5}
    assert books(*events, leave(85, 0, last)) == (last, 85, 0)
    # After it, step 10 means what was kept; the course of step 12 has ended.
    ended = {**ROLLED, 'lost': 34.5, 'start': 20, 'compile': 10}
    assert books(*events, leave(85, 1, last), start(85, 10), leave(100, 0, BEGUN)) == (ended, 100, 0)
    assert books(*events, leave(85, 1, last), start(85, 12), leave(100, 0, BEGUN)) == (ended, 100, 0)


def test_a_rollback_whose_line_is_torn_makes_no_negative_loss():
    events = [
        start(0),
        save(50, 10, AT_50),
        leave(84, 1, {**ROLLED, 'train': 29.0, 'lost': 34.5}),
        start(84, 10),
        leave(99, 0, BEGUN),
    ]
    assert books(*events) == ({**ROLLED, 'train': 29, 'lost': 34.5, 'start': 20, 'compile': 10}, 99, 0)


def test_rollback_into_an_earlier_life():
    first, second = {**AT_50, 'train': 60.0}, {**BEGUN, 'restore': 1.0, 'lost': 9.0}
    events = [start(0), save(50, 10, AT_50), save(80, 20, first), leave(80, 75, first), start(80, 20)]
    events += [event('rollback', 105, second, step=25, to=10), leave(112, 0, {**second, 'train': 7.0})]
    expected = {'start': 20, 'compile': 10, 'restore': 1, 'train': 37, 'save': 5, 'lost': 39}
    assert books(*events) == (expected, 112, 0)


def test_stopped_by_a_signal_and_resumed_loses_nothing():
    """Waiting for the disk, and evaluating, at the step of the checkpoint belongs to what is kept."""
    waited = {**AT_50, 'save': 8.0, 'evaluate': 2.0}
    events = [start(0), save(50, 10, AT_50), event('signal', 55, name='SIGTERM', step=10), leave(55, 75, waited)]
    events += [start(60, 10), leave(80, 0, {**BEGUN, 'train': 5.0})]
    expected = {'start': 20, 'compile': 10, 'train': 35, 'save': 8, 'evaluate': 2, 'down': 5}
    assert books(*events) == (expected, 80, 0)


def test_a_life_that_never_started_is_down_time():
    """Its exit is not taken for that of the killed life before it, nor its sign of life for that one's."""
    failed = leave(75, 124, {'start': 5.0})
    events = [
        start(0),
        save(50, 10, AT_50),
        event('corrupt', 74, step=20),
        failed,
        start(80, 10, alive=74),
        leave(95, 0, BEGUN),
    ]
    assert books(*events) == ({'start': 20, 'compile': 10, 'train': 30, 'save': 5, 'down': 30}, 95, 0)
    assert [life.code for life in lives_of(events)] == [None, 0]
    assert len(lives_of(events)[0].attempts) == 1
    events[2:2] = [leave(60, 76, {**AT_50, 'train': 40.0})]
    assert books(*events)[0]['down'] == 20


def test_an_exit_before_compiling_is_its_own():
    assert books(start(0), leave(12, 1, {'start': 11.0, 'restore': 1.0})) == ({'start': 11, 'restore': 1}, 12, 0)


def test_a_running_life_ends_with_its_last_event():
    events = [start(0), save(50, 10, AT_50), event('audit', 53, step=12)]
    assert books(*events) == (AT_50, 53, 3)


def test_the_clock_is_set():
    """Forwards; backwards inside a life, between two lives, and inside one that is killed."""
    assert books(*CLEAN[:-1], leave(5000, 0, LONG)) == (LONG, 5000, 4900)
    inside = ledger([start(0), leave(-3500, 0, {**BEGUN, 'train': 85.0})])
    check(inside)
    assert (inside.wall, inside.unaccounted, inside.goodput) == (0, -100, 0)
    between = books(*CLEAN, start(-30, 10), leave(20, 0, {**BEGUN, 'train': 35.0}))
    assert between[1:] == (20, -130)  # 100 s + 50 s of phases in 20 s of the clock
    killed = [start(0), save(50, 10, AT_50), event('audit', 20, step=11), start(30, 10, alive=25), leave(45, 0, BEGUN)]
    assert books(*killed) == ({'start': 20, 'compile': 10, 'train': 30, 'save': 5, 'down': 5}, 45, -25)
    assert ledger(killed).goodput == pytest.approx(30 / 45)


def test_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / 'events.jsonl'
    path.write_text(''.join(files.json_line(e) for e in CLEAN) + '{"event": "start", "ti')
    assert ledger(files.read_json_lines(path)) == ledger(CLEAN)


def test_the_old_format_is_unaccounted():
    """No 'began', no sign of life; what snapshots there are do not begin where the life does."""
    old = {'event': 'start', 'time': T0, 'origin': 'started from scratch', 'step': 0}
    events = [old, event('save', 20, step=10, folder='checkpoints'), leave(40, 75)]
    assert books(*events) == ({}, 40, 40)
    assert books(*events, start(50, 10), leave(70, 0, {**BEGUN, 'train': 5.0})) == ({**BEGUN, 'train': 5, 'down': 10}, 70, 40)
    assert books(old, leave(40, 0, {'start': 30.0, 'train': 35.0})) == ({}, 40, 40)


def test_an_exit_of_old_without_a_code_was_a_completed_run():
    old = {'event': 'start', 'time': T0, 'origin': 'started from scratch', 'step': 0}
    events = [old, event('exit', 40, status='completed', step=12)]
    assert books(*events) == ({}, 40, 40)
    assert lives_of(events)[0].code == 0


def test_an_old_life_that_was_killed_stays_unaccounted():
    """Nothing is known of it: its time after the last event is no more 'lost' than that before."""
    old = {'event': 'start', 'time': T0, 'origin': 'started from scratch', 'step': 0}
    events = [old, event('save', 20, step=10, folder='checkpoints'), start(50, 10, alive=30), leave(65, 0, BEGUN)]
    assert books(*events) == ({**BEGUN, 'down': 20}, 65, 30)


def test_a_metric_that_is_not_finite_is_told_of(tmp_path, capsys):
    files.write_json(tmp_path / 'run.json', {'config': {'name': 'a', 'train': {'duration': '1 epochs'}}})
    record = {'step': 3, 'split': 'train', 'time': T0, 'loss': float('nan'), 'accuracy': 0.5, 'skipped': 2}
    (tmp_path / 'metrics.jsonl').write_text(files.json_line(record))
    report(tmp_path, [], False)
    assert 'train       step 3  loss not finite  accuracy 0.5  skipped 2\n' in capsys.readouterr().out


def test_the_table_and_the_line():
    first = {'start': 20.0, 'restore': 4.0, 'compile': 26.0, 'train': 400.0, 'data': 8.0, 'save': 2.0}
    second = {**first, 'train': 112.3, 'evaluate': 10.0}
    events = [start(0, took=20), save(460, 10, first), start(476.2, 10, alive=463), leave(659.5, 0, second)]
    assert ledger(events).lines() == [
        'goodput 77.7 % of 0:11:00 in 2 lives',
        '  step            0:08:32   77.7 %',
        '  data wait        16.0 s    2.4 %',
        '  evaluation       10.0 s    1.5 %',
        '  save              4.0 s    0.6 %',
        '  start-up         40.0 s    6.1 %',
        '  restore           8.0 s    1.2 %',
        '  compile          52.0 s    7.9 %',
        '  lost work         3.0 s    0.5 %',
        '  down             13.2 s    2.0 %',
        '  unaccounted       1.0 s    0.2 %',
    ]
    assert ledger(events).one_line() == (
        'goodput 77.7 % of 0:11:00: step 77.7 %, data wait 2.4 %, evaluation 1.5 %, save 0.6 %, start-up 6.1 %, '
        'restore 1.2 %, compile 7.9 %, lost work 0.5 %, down 2.0 %, unaccounted 0.2 %'
    )


@dataclasses.dataclass
class Work:
    """A piece of time of the simulation, and of which life."""

    phase: str
    seconds: float
    life: int | None


class Simulation:
    """A run that keeps its own books, piece by piece: the truth to compare with."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.now, self.step, self.life = 0.0, 0, 0
        self.died = None  # when the life before was killed; None: it left by itself
        self.work, self.events, self.saves = [], [], {}  # saves: step -> number of pieces that were done by then
        self.told = 0  # number of pieces that were done by the newest event
        self.live()

    def spend(self, phase):
        self.work.append(Work(phase, float(self.random.exponential(3.0)), self.life))
        self.now += self.work[-1].seconds

    def tell(self, kind, **more):
        own = [w for w in self.work if w.life == self.life]
        seconds = {p: sum(w.seconds for w in own if w.phase == p) for p in {w.phase for w in own}}
        self.events.append(event(kind, self.now, seconds, **more))
        self.told = len(self.work)

    def go_back(self, step):
        """To the state of `step`: the work since, and the checkpoints since, are gone."""
        for work in self.work[self.saves.get(step, 0) :]:
            work.phase = 'lost' if work.phase in ledgers.USEFUL else work.phase
        self.saves = {s: n for s, n in self.saves.items() if s <= step}
        self.step = step

    def live(self):
        """One life, of whatever length, to whatever end."""
        began = self.now
        damaged = self.random.random() < 0.3
        self.go_back(int(self.random.choice([0, *self.saves])) if damaged else max(self.saves, default=0))
        self.spend('start')
        self.events.append(start(began, self.step, self.died, took=self.now - began))
        self.told = len(self.work)
        self.spend('compile')
        self.tell('compile')
        for _ in range(self.random.integers(0, 12)):
            self.take_step()
        if self.random.random() < 0.5:
            self.tell('exit', status='some', code=0)
            self.died = None
        else:
            self.spend('train')
            self.died = self.now
            for work in self.work[self.told :]:
                work.phase = 'lost'
        self.life += 1

    def live_again(self):
        """After a pause."""
        self.spend('down')
        self.work[-1].life = None
        self.live()

    def take_step(self):
        self.step += 1
        self.spend('data')
        self.spend('train')
        if self.random.random() < 0.3:
            self.spend('evaluate')
        if self.random.random() < 0.3:
            self.spend('save')
            self.tell('save', step=self.step, folder='checkpoints')
            self.saves[self.step] = len(self.work)
        elif self.random.random() < 0.2:
            now, to = self.step, max(self.saves, default=0)
            self.go_back(to)
            self.spend('restore')
            self.tell('rollback', step=now, to=to)


@pytest.mark.parametrize('seed', range(60))
def test_random_runs_are_counted_as_a_simulation_knows_them(seed):
    run = Simulation(seed)
    for _ in range(run.random.integers(0, 8)):
        run.live_again()
    if run.died is not None:  # only the next life tells of the death
        run.now = run.events[-1]['time'] - T0
        del run.work[run.told :]
    result = ledger(run.events)
    check(result)
    truth = {p: sum(w.seconds for w in run.work if w.phase == p) for p in result.seconds}
    assert result.seconds == pytest.approx(truth, abs=1e-4)
    assert result.wall == pytest.approx(run.now, abs=1e-4)
    assert abs(result.unaccounted) <= 1e-4


@pytest.mark.parametrize('seed', range(40))
def test_clocks_that_jump_spoil_no_sum(seed):
    """Any times, in any order, and a record that lacks lines: never below zero, and the sum is the wall time."""
    random = np.random.default_rng(seed)
    run = Simulation(seed)
    for _ in range(5):
        run.live_again()
    events = [e for e in run.events if random.random() < 0.9]
    for e in events:
        for key in ('time', 'began', 'previous_alive'):
            if e.get(key) is not None:
                e[key] += float(random.choice([0.0, -3600.0, 3600.0]))
    check(ledger(events))


def test_a_real_run_is_accounted_for(run, dies_at, capsys):
    """Killed by an error after a checkpoint, resumed: within 1 % of the wall time, and told without a word too many."""
    dies_at(6)
    with pytest.raises(RuntimeError, match='gone'):
        run()
    run()
    path = run.path
    result = ledger(files.read_json_lines(path / 'events.jsonl'))
    check(result)
    assert result.lives == 2
    assert abs(result.unaccounted) <= 0.01 * result.wall
    assert {name for name, s in result.seconds.items() if s} >= {
        'train',
        'start',
        'compile',
        'save',
        'evaluate',
        'lost',
        'down',
    }
    before = {p: p.stat().st_mtime_ns for p in path.rglob('*')}
    report(path, [], False)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f'test in {path}: completed at step 12'
    assert told[1] == 'step 12 of 12 steps, newest checkpoint 12; saves 3, rollbacks 0'
    assert told[2 : 2 + len(result.lines())] == result.lines()
    assert [line.split()[0] for line in told[-5:]] == ['train', 'validation', 'test', 'life', 'life']
    assert told[-2].endswith('from step 0: exit code 1 (an unexpected error)')
    assert told[-1].endswith('from step 4: exit code 0 (done)')
    assert before == {p: p.stat().st_mtime_ns for p in path.rglob('*')}


def test_a_run_that_is_killed_is_told_of(tmp_path, capsys):
    files.write_json(tmp_path / 'run.json', {'config': {'name': 'a', 'train': {'duration': '1 epochs'}}})
    report(tmp_path, [], False)
    assert capsys.readouterr().out.startswith(f'a in {tmp_path}: no training yet\nstep 0 of 1 epochs, newest checkpoint none')
    events = [start(0), save(50, 10, AT_50), start(70, 10), leave(77, 74, {'start': 5.0})]
    (tmp_path / 'events.jsonl').write_text(''.join(files.json_line(e) for e in events[:-1]))
    report(tmp_path, [], False)
    told = capsys.readouterr().out
    assert 'not complete: running, or killed\n' in told
    assert 'life 1: 50.0 s from step 0: killed\n' in told
    events[-1]['time'] = T0 + 99
    (tmp_path / 'events.jsonl').write_text(''.join(files.json_line(e) for e in events))
    report(tmp_path, [], False)
    assert 'killed; then 1 that ended before the first step (exit code 74)' in capsys.readouterr().out


def test_mistakes(tmp_path):
    with pytest.raises(UsageError, match='holds no run'):
        report(tmp_path, [], False)
    with pytest.raises(UsageError, match=r'--config\.seed=3 has no use in --mode=report'):
        report(tmp_path, ['seed=3'], False)


def test_every_exit_code_has_words():
    assert set(CODES) == {1, *map(int, ExitCode)}
    assert CODES[StoppedError.exit_code] == 'stopped on request'


def test_needs_no_jax():
    code = 'import sys, research.train.ledger; sys.exit("jax" in sys.modules or "rich" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
