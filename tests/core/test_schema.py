import pytest

from research.core import config_file, fields, schema
from research.core.durations import Duration
from research.core.errors import UsageError
from research.core.registry import Component, component, parse_many, signature


def override(*pairs, config=None):
    config = config or config_file.load('configs/digits_cnn.py')
    for path, text in pairs:
        config_file.override(config, path, text)
    return schema.resolve(config)


def test_every_field_has_a_default_a_type_and_a_meaning():
    for path, field in fields.walk(schema.Experiment):
        assert field.metadata['meaning'], path
        assert fields.type_name(field), path
    schema.resolve(schema.default_config())


@pytest.mark.parametrize(
    ('path', 'text', 'value'),
    [
        ('seed', '7', 7),
        ('seed', '1e3', 1000),
        ('data.validation', '0.25', 0.25),
        ('train.skip_nonfinite', 'False', False),
        ('train.duration', '2e15 flops', Duration(2e15, 'flops')),
        ('data.budget', '5%', '5%'),
        ('data.budget', 'none', None),
        ('parallel.devices', '4', 4),
        ('parallel.devices', 'None', None),
        ('price_per_device_hour', '1.5', 1.5),
        ('evaluate.final', "('test',)", ('test',)),
        ('evaluate.final', 'test', ('test',)),
        ('evaluate.final', 'validation, test', ('validation', 'test')),
        ('optimizer.rate_rules', "(('Dense.*', 0.1), ('.*', None))", (('Dense.*', 0.1), ('.*', None))),
        ('optimizer.clip', 'global_norm(max_norm=2.0)', Component('clip', 'global_norm', {'max_norm': 2.0})),
        ('data.augment', 'flip', (Component('augmentation', 'flip', {}),)),
        ('data.augment', 'none', ()),
        ('model', 'mlp(hidden=(3, 4))', Component('model', 'mlp', {'hidden': (3, 4)})),
        ('model.name', 'mlp', Component('model', 'mlp', {})),
    ],
)  # fmt: skip
def test_an_override_is_read_by_the_type_of_its_field(path, text, value):
    found = override((path, text))
    for word in path.removesuffix('.name').split('.'):
        found = getattr(found, word)
    assert found == value
    assert type(found) is type(value)


def test_arguments_of_open_sections():
    found = override(('optimizer.b1', '0.8'), ('model.dropout', '0.1'), ('optimizer.schedule', 'step(at=(0.5,))'))
    assert found.optimizer.arguments == {'b1': 0.8}
    assert found.model.arguments['dropout'] == 0.1
    assert found.optimizer.schedule.component == Component('schedule', 'step', {'at': (0.5,)})
    assert (
        found.optimizer.schedule.warmup == schema.resolve(config_file.load('configs/digits_cnn.py')).optimizer.schedule.warmup
    )


def test_another_component_leaves_no_argument_of_the_old_one():
    found = override(('optimizer.b1', '0.8'), ('optimizer.learning_rate', '0.5'), ('optimizer', 'lion'))
    assert (found.optimizer.name, found.optimizer.arguments, found.optimizer.learning_rate) == ('lion', {}, 0.5)


def test_an_argument_of_one_augmentation():
    found = override(('data.augment', 'flip, cutout'), ('data.augment.1.size', '3'))
    assert found.data.augment[1].arguments == {'size': 3}


def test_plain_values_read_back_to_an_equal_experiment():
    experiment = override(('data.augment', 'flip, cutout(size=2)'), ('optimizer.clip', 'value'), ('data.budget', '5%'))
    assert schema.resolve(fields.to_plain(experiment)) == experiment


def test_differences_know_what_matters():
    old = override()
    new = override(('log.every', '7 steps'), ('optimizer.learning_rate', '0.5'), ('model.dropout', '0.5'))
    found = {c.path: (c.old, c.new, c.resumable) for c in schema.differences(old, new)}
    assert found['log.every'] == (str(old.log.every), '7 steps', True)
    assert found['optimizer.learning_rate'] == (old.optimizer.learning_rate, 0.5, False)
    assert found['model.dropout'] == (None, 0.5, False)
    assert len(found) == 3
    assert schema.differences(old, old) == []


def test_a_users_own_component_needs_no_edit_here(tmp_path, monkeypatch):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'net.py').write_text(
        'class Net:\n    num_outputs: int\n    width: int = 3\n    depth: "int | None" = None\n'
    )
    (tmp_path / 'mine' / '__init__.py').write_text('raise RuntimeError("must not be imported to check a config")\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert component('model', 'mine.net:Net(width=4)', 'config.model').arguments == {'width': 4}
    for bad in ('mine.net:Net(wdith=4)', 'mine.net:Net(width="x")', 'mine.net:Net(num_outputs=3)'):
        with pytest.raises(UsageError):
            component('model', bad, 'config.model')


def test_what_the_program_supplies_is_no_argument_of_a_config():
    assert 'num_outputs' not in signature('model', 'cnn')
    assert 'decay' not in signature('optimizer', 'adam')
    assert 'total' not in signature('schedule', 'cosine')


@pytest.mark.parametrize('text', ['f(__import__("os"))', 'f(x=__import__("os"))', 'f(x=1)(y=2)', 'f(x=open)', 'f(**{})'])
def test_component_texts_execute_nothing(text):
    with pytest.raises(UsageError, match='cannot be read'):
        parse_many(text, 'config.data.augment')


def test_a_bare_word_stays_one_where_a_word_may_stand():
    assert override(('task.class_weights', 'balanced')).task.arguments['class_weights'] == 'balanced'


def test_a_subclass_of_a_class_in_another_file_keeps_its_arguments(tmp_path, monkeypatch):
    (tmp_path / 'deeper.py').write_text(
        'from research.models.cnn import CNN\nfrom elsewhere import Unknown\n\nclass Mine(CNN):\n    extra: int = 1\n\n'
        'class Strange(Unknown):\n    extra: int = 1\n\nclass Bare:\n    width: int = 1\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert {'features', 'extra', 'dropout'} <= set(signature('model', 'deeper:Mine'))
    assert signature('model', 'deeper:Strange') is None  # its base cannot be read: it checks itself
    with pytest.raises(UsageError, match="has no argument 'fetures'"):
        component('model', 'deeper:Mine(fetures=(3,))', 'config.model')
    with pytest.raises(UsageError, match='has no field num_outputs'):
        component('model', 'deeper:Bare', 'config.model')


def test_elements_of_tuples_are_checked():
    for bad in ('(3.5,)', "(32, 'x')"):
        with pytest.raises(UsageError, match='which is not tuple'):
            override(('model.hidden', bad))


@pytest.mark.parametrize('rules', ['0.1', "(('x',),)", "(('.*', '1'),)", "('.*', 1.0)"])
def test_rules_that_are_no_pairs_are_refused(rules):
    with pytest.raises(UsageError):
        override(('optimizer.rate_rules', rules))


def test_the_default_folder_depends_on_what_is_trained_alone():
    text = 'configs/digits_cnn.py'
    folder = lambda *overrides, text=text: config_file.default_workdir(text, config_file.resolve(text, overrides)).name  # noqa: E731
    assert folder() == folder('log.every=7 steps') == folder('checkpoint.keep=5') == 'digits_cnn'
    others = {folder('seed=1'), folder('seed=2'), folder('model=mlp'), folder(text=text + ':epochs=3')}
    assert len(others | {'digits_cnn'}) == 5
    assert folder(text=text + ':epochs=3') == folder('train.duration=3 epochs')
