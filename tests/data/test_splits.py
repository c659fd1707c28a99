import numpy as np
import pytest
import scipy.stats

from research.core.durations import parse
from research.core.errors import UsageError
from research.data import splits
from research.data.source import ArraySource, DataSet, Subset


def make(n, seed=0, classes=3):
    random = np.random.default_rng(seed)
    return ArraySource(
        {'x': random.normal(size=(n, 4)).astype(np.float32), 'label': random.integers(0, classes, n).astype(np.int32)}
    )


def keys(source):
    return set(source.keys().tolist())


def test_splits_are_disjoint_complete_and_about_as_large_as_asked():
    source = make(5000)
    parts = splits.split(DataSet('d', {'all': source}), validation=0.1, test=0.2)
    assert keys(parts['train']) | keys(parts['validation']) | keys(parts['test']) == keys(source)
    assert sum(len(p) for p in parts.values()) == 5000
    for name, share in (('validation', 0.1), ('test', 0.2)):
        assert scipy.stats.binomtest(len(parts[name]), 5000, share).pvalue > 1e-4


def test_an_example_never_changes_its_split_when_data_grow_or_move():
    source = make(2000)
    small = splits.split(DataSet('d', {'all': Subset(source, np.arange(999, 99, -1))}), 0.1, 0.2)
    large = splits.split(DataSet('d', {'all': source}), 0.1, 0.2)
    for name in small:
        assert keys(small[name]) <= keys(large[name])


def test_duplicates_stay_together():
    source = make(500)
    twice = Subset(source, np.concatenate([np.arange(500), np.arange(500)]))
    parts = splits.split(DataSet('d', {'all': twice}), 0.2, 0.2)
    assert not keys(parts['train']) & keys(parts['test'])
    assert not keys(parts['train']) & keys(parts['validation'])


def test_own_splits_are_kept():
    train, test = make(1000, 1), make(50, 2)
    parts = splits.split(DataSet('d', {'train': train, 'test': test}), 0.1, 0.2)
    assert parts['test'] is test
    assert keys(parts['train']) | keys(parts['validation']) == keys(train)
    assert splits.split(DataSet('d', {'train': train, 'test': test}), 0.0, 0.2)['train'] is train


@pytest.mark.parametrize(('given', 'message'), [({'test': make(5)}, 'no training split'), ({'all': make(3)}, 'is empty')])
def test_nothing_to_train_on_is_refused(given, message):
    with pytest.raises(UsageError, match=message):
        splits.split(DataSet('d', given), 0.01, 0.01)


@pytest.mark.parametrize('seed', [0, 1])
def test_budgets_are_nested_and_stratified(seed):
    random = np.random.default_rng(0)
    labels = random.choice(4, size=3000, p=[0.7, 0.2, 0.08, 0.02]).astype(np.int32)
    source = ArraySource({'x': random.normal(size=(3000, 2)), 'label': labels})
    before = set()
    for text, size in (('7 examples', 7), ('1%', 30), ('100 examples', 100), ('10%', 300), ('33.3%', 999), ('100%', 3000)):
        chosen = splits.subset(source, parse(text), seed)
        assert len(chosen) == size
        assert before <= keys(chosen)
        before = keys(chosen)
        counts = np.bincount(chosen.labels(), minlength=4)
        assert (np.abs(counts - size * np.bincount(labels) / 3000) <= 1).all()


def test_another_subset_seed_is_another_subset_in_no_order_of_the_data():
    source = make(2000)
    a, b = (splits.subset(source, parse('10%'), seed) for seed in (0, 1))
    shared = len(keys(a) & keys(b))
    assert scipy.stats.hypergeom(2000, 200, 200).sf(shared) > 1e-4
    assert scipy.stats.kstest(a.indices / 2000, 'uniform').pvalue > 1e-4


def test_regression_targets_are_not_taken_for_classes():
    source = ArraySource({'x': np.arange(40.0).reshape(20, 2), 'label': np.linspace(0, 1, 20).astype(np.float32)})
    assert len(splits.subset(source, parse('5 examples'), 0)) == 5


def test_a_budget_beyond_the_data_is_refused():
    with pytest.raises(UsageError, match='more than the 20 training examples'):
        splits.subset(make(20), parse('21 examples'), 0)
