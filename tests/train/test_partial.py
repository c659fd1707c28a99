"""Partial loading: strict, with everything listed; positions, stacked layers, adapters; averaged parameters of a run."""

import jax
import numpy as np
import pytest

from research.core import leaves
from research.core.errors import UsageError
from research.models.vit import resize_positions
from research.train import partial, start
from research.train.partial import EVERYTHING, load_into
from research.train.weights import read_run
from tests.train.conftest import experiment_of
from tests.train.test_step import parts_of

NORMAL = np.random.default_rng(0).normal


def arrays(**shapes):
    return {name.replace('__', '/'): NORMAL(size=shape).astype(np.float32) for name, shape in shapes.items()}


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_everything_is_loaded_by_name_in_the_type_of_the_model():
    target = {'a': {'kernel': np.zeros((2, 3), np.float32)}, 'b': np.zeros(4, np.float32)}
    weights = {'b': np.arange(4, dtype=np.float64), 'a/kernel': np.ones((2, 3), np.float16)}
    found, report = load_into(target, weights, EVERYTHING)
    assert found['b'].dtype == found['a']['kernel'].dtype == np.float32
    assert_equal(leaves.flat(found), weights)
    report.check('these', 'those')
    assert report.summary() == '2 leaves loaded, 0 fresh'


def test_every_problem_is_listed():
    target = arrays(head__kernel=(4, 3), head__bias=(3,), body=(4, 4), **{f'more_{i}': (2,) for i in range(6)})
    weights = arrays(head__kernel=(4, 10), head__bias=(10,), body=(4, 4), classifier=(4,))
    found, report = load_into(target, weights, EVERYTHING)
    assert_equal(found, {**target, 'body': weights['body']})
    with pytest.raises(UsageError) as error:
        report.check("config.init_from='x'", start.FIX, ' (all of it: report.txt)')
    assert error.value.message == (
        "config.init_from='x' does not fit this model: 6 missing (more_0, more_1, more_2, more_3, ...); "
        '1 unexpected (classifier); 2 mis-shaped (head/bias (10,) for (3,), head/kernel (4, 10) for (4, 3)) '
        '(all of it: report.txt)'
    )
    assert 'number of classes' in error.value.fix
    lines = report.text().splitlines()
    assert [line.split()[0] for line in lines] == ['loaded', *['missing'] * 6, 'unexpected', *['misshaped'] * 2]
    assert lines[-2] == 'misshaped   head/bias (10,) for (3,)'


def test_rules_say_what_starts_fresh_and_what_is_left_out():
    target = arrays(head__kernel=(4, 3), body=(4, 4), new=(2,))
    weights = arrays(head__kernel=(4, 10), body=(4, 4), pooler=(3,))
    rules = (('head/.*|new', False), ('pooler', False), ('.*', True))
    found, report = load_into(target, weights, rules)
    assert_equal(found, {**target, 'body': weights['body']})
    report.check('these', 'those')
    assert (report.fresh, report.left_out) == (('head/kernel', 'new'), ('head/kernel', 'pooler'))
    with pytest.raises(UsageError, match=r"init_rules: 'haed/.\*' decides no leaf"):
        load_into(target, weights, (('haed/.*', False), ('.*', True)))
    with pytest.raises(UsageError, match=r"init_rules: '.\*' has 1.0\n  fix: give True"):
        load_into(target, weights, (('.*', 1.0),))


def test_layers_by_name_and_stacked_layers_are_the_same():
    single = {f'stack/layers_{i}/up/kernel': NORMAL(size=(2, 3)) for i in range(11)}  # layers_10 comes after layers_9
    single['head'] = NORMAL(size=2)
    stacked = {'stack/layers/up/kernel': np.stack([single[f'stack/layers_{i}/up/kernel'] for i in range(11)])}
    stacked['head'] = single['head']
    for weights, target in ((single, stacked), (stacked, single), (single, single), (stacked, stacked)):
        found, report = load_into(jax.tree.map(np.zeros_like, target), weights, EVERYTHING)
        report.check('these', 'those')
        assert_equal(found, target)
    fewer = {'stack/layers/up/kernel': np.zeros((4, 2, 3)), 'head': np.zeros(2)}
    assert load_into(fewer, single, EVERYTHING)[1].misshaped == ('stack/layers/up/kernel (11, 2, 3) for (4, 2, 3)',)
    fewer = {'stack/layers_0/up/kernel': np.zeros((2, 3)), 'head': np.zeros(2)}
    assert len(load_into(fewer, stacked, EVERYTHING)[1].unexpected) == 10


def test_layers_with_a_gap_or_of_two_shapes_are_reported_and_not_renumbered():
    target = {'stack/layers/up/kernel': np.zeros((2, 2, 3))}
    gap = {f'stack/layers_{i}/up/kernel': np.ones((2, 3)) for i in (1, 3)}
    two_shapes = {f'stack/layers_{i}/up/kernel': np.ones((2, 3 + i)) for i in (0, 1)}
    for weights in (gap, two_shapes):
        _, report = load_into(target, weights, EVERYTHING)
        assert report.missing == ('stack/layers/up/kernel',)
        assert report.unexpected == tuple(weights)
        assert not report.loaded


def test_positions_of_targets_are_resized_too():
    target = {'position/embedding': np.zeros((6, 2)), 'target_position/embedding': np.zeros((6, 2))}
    found, report = load_into(target, {name: np.arange(8.0).reshape(4, 2) for name in target}, EVERYTHING)
    report.check('these', 'those')
    assert len(report.resized) == 2
    np.testing.assert_array_equal(found['target_position/embedding'][:4], np.arange(8.0).reshape(4, 2))


def test_positions_of_text_are_cut_or_repeated():
    table = {'position/embedding': NORMAL(size=(4, 2)).astype(np.float32)}
    rows = table['position/embedding']
    for length, expected in ((2, rows[:2]), (6, rows[[0, 1, 2, 3, 0, 1]])):
        found, report = load_into({'position/embedding': np.zeros((length, 2), np.float32)}, table, EVERYTHING)
        np.testing.assert_array_equal(found['position/embedding'], expected)
        assert report.resized == (f'position/embedding (4, 2) -> ({length}, 2)',)
        assert report.summary() == '1 leaves loaded, 1 of them resized, 0 fresh'
    for shape in ((4, 3), (4,)):
        assert load_into({'position/embedding': np.zeros(shape)}, table, EVERYTHING)[1].misshaped
    assert load_into({'position/embedding': np.zeros((6, 2))}, table, EVERYTHING, resize=False)[1].misshaped
    assert load_into({'embed/embedding': np.zeros((6, 2))}, {'embed/embedding': np.zeros((4, 2))}, EVERYTHING)[1].misshaped


@pytest.mark.parametrize('tokens', [0, 1])
def test_positions_of_images_are_resized_as_a_grid(tokens):
    def model(places):
        patch = {'tower/patch/kernel': np.ones((2, 2, 3, 4), np.float32), 'tower/class_token': np.ones((1, 1, 4), np.float32)}
        patch = patch if tokens else {'tower/patch/kernel': patch['tower/patch/kernel']}
        return {**patch, 'tower/position/embedding': NORMAL(size=(places, 4)).astype(np.float32)}

    weights = model(9 + tokens)
    found, report = load_into(model(25 + tokens), weights, EVERYTHING)
    table = weights['tower/position/embedding']
    np.testing.assert_array_equal(found['tower/position/embedding'], resize_positions(table, (3, 3), (5, 5)))
    np.testing.assert_array_equal(found['tower/position/embedding'][:tokens], table[:tokens])
    assert report.resized == (f'tower/position/embedding ({9 + tokens}, 4) -> ({25 + tokens}, 4)',)
    assert load_into(model(24 + tokens), weights, EVERYTHING)[1].misshaped  # no square grid


def test_the_weights_of_an_adapted_model_lie_in_two_places():
    variables = {
        'params': {'query': {'a_kernel': np.ones((2, 1)), 'b_kernel': np.ones((1, 2))}, 'head': {'a_kernel': np.ones(3)}},
        'base': {'query': {'kernel': np.ones((2, 2))}},
        'batch_stats': {'norm': {'mean': np.ones(2)}},
        'teacher': {'params': {'query': {'kernel': np.ones((2, 2))}}},
    }
    named = partial.named(variables)
    assert set(named) == {'query/kernel', 'head/a_kernel', 'batch_stats/norm/mean'}  # the head has no adapter, just such a name
    renewed = partial.renewed(variables, {name: leaf + 1 for name, leaf in named.items()})
    changed = {name for name, leaf in leaves.flat(renewed).items() if (leaf == 2).all()}
    assert changed == {'base/query/kernel', 'params/head/a_kernel', 'batch_stats/norm/mean'}
    assert jax.tree.structure(renewed) == jax.tree.structure(variables)


def test_a_run_gives_its_averaged_parameters_and_its_running_statistics(run):
    settings = ('model=cnn(features=(4,), pool=(2,), hidden=(), norm="batch")', 'train.duration=6 steps')
    _, _, path = run(*settings, 'train.ema=0.9', 'parallel.devices=1')
    weights, origin = read_run(path, 'config.init_from')
    assert origin == f'parameters of step 6 from {path}, averaged'
    parts, *_ = parts_of(experiment_of(*settings, 'train.ema=0.5', f'init_from={path}'), 1)
    report_file = path / 'report.txt'
    state, origin = start._from_other(parts.init(), path, EVERYTHING, report_file)
    assert origin.endswith(': 7 leaves loaded, 0 fresh')
    assert report_file.read_text().startswith(f'parameters of step 6 from {path}, averaged\nloaded')
    from tests.train.test_loop import saved

    kept = saved(path, 6)
    for name in ('Dense_0', 'Conv_0', 'BatchNorm_0'):
        for leaf, array in state.params[name].items():
            np.testing.assert_array_equal(array, kept[f'extra/ema/{name}/{leaf}'])
            np.testing.assert_array_equal(array, state.extra['ema'][name][leaf])
            assert not np.array_equal(array, kept[f'params/{name}/{leaf}'])
            np.testing.assert_array_equal(array, weights[f'{name}/{leaf}'])
    for leaf in ('mean', 'var'):
        name = f'model_state/batch_stats/BatchNorm_0/{leaf}'
        np.testing.assert_array_equal(state.model_state['batch_stats']['BatchNorm_0'][leaf], kept[name])
    abstract = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), parts.abstract)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == abstract


def test_another_model_is_refused_with_a_report_or_loaded_in_part(run):
    _, _, path = run('train.duration=1 step', 'parallel.devices=1')
    with pytest.raises(UsageError) as error:
        run(f'init_from={path}', 'model.hidden=(16, 8)', 'parallel.devices=1', folder='other')
    report = path.parent / 'other' / 'init_report.txt'
    assert error.value.message == (
        f"config.init_from='{path}' does not fit this model: 2 missing (Dense_2/bias, Dense_2/kernel); "
        f'2 mis-shaped (Dense_1/bias (10,) for (8,), Dense_1/kernel (16, 10) for (16, 8)) (all of it: {report})'
    )
    assert len(str(error.value).splitlines()) == 2
    assert 'misshaped   Dense_1/kernel (16, 10) for (16, 8)\n' in report.read_text()
    rules = 'init_rules=(("Dense_[12]/.*", False), (".*", True))'
    with pytest.raises(UsageError, match='init_rules leave leaves fresh, but nothing is loaded'):
        experiment_of(rules)
    experiment = experiment_of('model.hidden=(16, 8)', f'init_from={path}', rules)
    fresh = parts_of(experiment, 1)[0].init()
    state, origin = start._from_other(fresh, path, experiment.init_rules, report)
    assert origin == f'parameters of step 1 from {path}: 2 leaves loaded, 4 fresh'
    assert 'fresh       Dense_2/kernel\n' in report.read_text()
    assert 'left out    Dense_1/kernel\n' in report.read_text()
    assert not np.array_equal(state.params['Dense_0']['kernel'], fresh.params['Dense_0']['kernel'])
    np.testing.assert_array_equal(state.params['Dense_1']['kernel'], fresh.params['Dense_1']['kernel'])
