"""Transforms of table columns against scikit-learn and scipy; what is learnt comes from the training rows alone."""

import numpy as np
import pytest
from scipy import stats
from sklearn import datasets, preprocessing

from research.core import registry
from research.core.errors import UsageError
from research.data.columns import encode_categories, quantile_normalise, standardise
from research.data.mixture import Mixture
from research.data.source import ArraySource, DataSet, Subset

X = datasets.load_wine().data.astype(np.float32)  # (178, 13), columns of very different scale
TRAIN, TEST = np.arange(120), np.arange(120, 178)


def with_missing(x, share=0.1):
    holes = np.random.default_rng(0).random(x.shape) < share
    return np.where(holes, np.nan, x).astype(np.float32)


def numbers(x=X, key='numeric'):
    label = (np.arange(len(x)) % 3).astype(np.int32)
    rows = ArraySource({key: x, 'label': label})
    return DataSet('wine', {'train': Subset(rows, TRAIN), 'test': Subset(rows, TEST)}, ('a', 'b', 'c'))


def words(train, test, label=True):
    splits = {}
    for name, columns in (('train', train), ('test', test)):
        arrays = {key: np.array(column, object) for key, column in columns.items()}
        extra = {'label': np.zeros(len(next(iter(arrays.values()))), np.int32)} if label else {}
        splits[name] = ArraySource({**arrays, **extra})
    return DataSet('words', splits)


def whole(source):
    return source[np.arange(len(source))]


TRANSFORMS = {
    'standardise': (standardise, preprocessing.StandardScaler()),
    'quantile_normalise': (
        lambda: quantile_normalise(quantiles=50),
        preprocessing.QuantileTransformer(n_quantiles=50, output_distribution='normal', subsample=None),
    ),
}


@pytest.mark.parametrize('name', TRANSFORMS)
@pytest.mark.parametrize('share', [0.0, 0.2])
def test_numbers_are_scaled_as_scikit_learn_does(name, share):
    ours, reference = TRANSFORMS[name]
    x = with_missing(X, share)
    changed = ours()(numbers(x))
    reference.fit(x[TRAIN].astype(np.float64))
    for split, rows in (('train', TRAIN), ('test', TEST)):
        got = whole(changed.splits[split])
        np.testing.assert_allclose(got['numeric'], reference.transform(x[rows].astype(np.float64)), rtol=1e-5, atol=1e-6)
        assert got['numeric'].dtype == np.float32
        np.testing.assert_array_equal(np.isnan(got['numeric']), np.isnan(x[rows]))
        assert set(got) == {'numeric', 'label'}


def test_standardise_by_hand_and_a_constant_column():
    x = np.float32([[1, 7], [3, 7], [np.nan, 7], [9, 8]])
    data = DataSet('x', {'train': ArraySource({'numeric': x[:3]}), 'test': ArraySource({'numeric': x[3:]})})
    changed = standardise()(data)
    np.testing.assert_array_equal(whole(changed.splits['train'])['numeric'], [[-1, 0], [1, 0], [np.nan, 0]])
    np.testing.assert_array_equal(whole(changed.splits['test'])['numeric'], [[7, 1]])


def test_quantiles_are_normal_scores_and_bear_an_outlier():
    values = np.sort(np.random.default_rng(0).lognormal(size=101)).astype(np.float32)
    values[-1] = 1e30
    data = DataSet('x', {'train': ArraySource({'numeric': values[:, None]})})
    got = whole(quantile_normalise(quantiles=101)(data).splits['train'])['numeric'][:, 0]
    np.testing.assert_allclose(got[1:-1], stats.norm.ppf(np.arange(1, 100) / 100), atol=1e-5)
    assert (got[0], got[-1]) == (pytest.approx(-5.2, abs=0.01), pytest.approx(5.2, abs=0.01))
    assert np.isfinite(got).all()


@pytest.mark.parametrize('make', [standardise, quantile_normalise])
def test_other_splits_change_nothing(make):
    plain = make()(numbers())
    x = X.copy()
    x[TEST] *= 1000
    other = make()(numbers(x))
    np.testing.assert_array_equal(whole(plain.splits['train'])['numeric'], whole(other.splits['train'])['numeric'])
    x[TRAIN] *= np.where(np.arange(13) == 3, np.linspace(1, 2, 120)[:, None], 1)  # while the training rows do count
    moved = make()(numbers(x))
    assert (whole(moved.splits['train'])['numeric'] != whole(plain.splits['train'])['numeric'])[:, 3].any()


@pytest.mark.parametrize('make', [standardise, quantile_normalise])
def test_rows_keep_their_keys_labels_and_blocks(make):
    data = numbers()
    changed = make()(data)
    for split in data.splits:
        np.testing.assert_array_equal(changed.splits[split].keys(), data.splits[split].keys())
        np.testing.assert_array_equal(changed.splits[split].labels(), data.splits[split].labels())
        block = np.array([5, 0, 5])
        np.testing.assert_array_equal(changed.splits[split][block]['numeric'], whole(changed.splits[split])['numeric'][block])
    assert (changed.name, changed.class_names) == ('wine', ('a', 'b', 'c'))


def test_another_key_and_integers():
    bytes_ = np.arange(1, 9, dtype=np.uint8).reshape(4, 2)
    data = DataSet('x', {'train': ArraySource({'features': bytes_})})
    got = whole(standardise(key='features')(data).splits['train'])['features']
    np.testing.assert_allclose(got, preprocessing.scale(bytes_.astype(np.float64)), rtol=1e-6)


TRAIN_WORDS = {'colour': ['red', 'blue', 'red', '', 'grün'], 'size': ['s', 's', 'l', 'l', 'm']}
TEST_WORDS = {'colour': ['blue', 'violet', '', 'zzz', 'a'], 'size': ['m', 'xl', 'l', 's', '']}


def test_categories_are_numbered_by_the_training_values():
    changed = encode_categories()(words(TRAIN_WORDS, TEST_WORDS))
    train, test = (whole(changed.splits[split]) for split in ('train', 'test'))
    # colour: blue 1, grün 2, red 3; size: l 1, m 2, s 3. Missing and new values are 0.
    np.testing.assert_array_equal(train['category'], [[3, 3], [1, 3], [3, 1], [0, 1], [2, 2]])
    np.testing.assert_array_equal(test['category'], [[1, 2], [0, 0], [0, 1], [0, 3], [0, 0]])
    assert train['category'].dtype == np.int32
    assert changed.cardinalities == (4, 4)
    assert set(train) == {'category', 'label'}


def test_categories_agree_with_scikit_learn():
    values = np.random.default_rng(0).choice(['aa', 'b', 'Ä', 'd e', '007'], (50, 2))
    changed = encode_categories()(words({'x': values[:30, 0], 'y': values[:30, 1]}, {'x': values[30:, 0], 'y': values[30:, 1]}))
    reference = preprocessing.OrdinalEncoder(handle_unknown='use_encoded_value', unknown_value=-1).fit(values[:30])
    np.testing.assert_array_equal(whole(changed.splits['test'])['category'], reference.transform(values[30:]) + 1)


def test_rare_categories_and_chosen_columns_in_their_order():
    data = words(TRAIN_WORDS, TEST_WORDS)
    rare = encode_categories(min_count=2)(data)
    np.testing.assert_array_equal(whole(rare.splits['train'])['category'], [[1, 2], [0, 2], [1, 1], [0, 1], [0, 0]])
    assert rare.cardinalities == (2, 3)
    none_left = encode_categories(min_count=99)(data)
    assert none_left.cardinalities == (1, 1)
    assert not whole(none_left.splits['train'])['category'].any()
    size_first = encode_categories(columns=('size', 'colour'))(data)
    np.testing.assert_array_equal(whole(size_first.splits['train'])['category'][0], [3, 3])
    np.testing.assert_array_equal(whole(size_first.splits['train'])['category'][1], [3, 1])
    only = whole(encode_categories(columns=('size',))(data).splits['train'])
    assert only['category'].shape == (5, 1)
    assert only['colour'].dtype == object


def test_test_rows_do_not_number_categories():
    one, other = (encode_categories()(words(TRAIN_WORDS, test)) for test in (TEST_WORDS, {k: ['q'] * 9 for k in TEST_WORDS}))
    np.testing.assert_array_equal(whole(one.splits['train'])['category'], whole(other.splits['train'])['category'])
    assert one.cardinalities == other.cardinalities


def test_mixtures_stay_mixtures():
    part = ArraySource({'numeric': X[:60]})
    data = DataSet('two', {'train': Mixture([part, ArraySource({'numeric': X[60:120]})], (3, 1), (None, None))})
    changed = standardise()(data).splits['train']
    assert isinstance(changed, Mixture)
    np.testing.assert_allclose(whole(changed)['numeric'], preprocessing.scale(X[:120].astype(np.float64)), rtol=1e-4, atol=1e-6)


EMPTY = np.where(np.arange(13) == 4, np.nan, X).astype(np.float32)


@pytest.mark.parametrize(
    ('transform', 'data', 'message'),
    [
        (lambda: standardise(key='numbers'), numbers(), "no columns of numbers under 'numbers'\n  fix: .*known: numeric"),
        (lambda: standardise(key='label'), numbers(), "no columns of numbers under 'label'"),
        (standardise, numbers(EMPTY), "column 4 of 'numeric' is missing in all 120 training rows"),
        (quantile_normalise, numbers(EMPTY), "column 4 of 'numeric' is missing in all 120 training rows"),
        (standardise, numbers(X[:, :0]), "no columns of numbers under 'numeric'"),
        (lambda: quantile_normalise(quantiles=1), numbers(), 'quantiles is 1, but must be at least 2'),
        (encode_categories, numbers(), 'the examples have no columns of text'),
        (
            lambda: encode_categories(columns=('clour',)),
            words(TRAIN_WORDS, TEST_WORDS),
            "no column of text 'clour'\n.*'colour'",
        ),
        (lambda: encode_categories(columns=()), words(TRAIN_WORDS, TEST_WORDS), 'names no column'),
        (encode_categories, encode_categories()(words(TRAIN_WORDS, TEST_WORDS)), 'the columns are encoded already'),
    ],
)
def test_refusals(transform, data, message):
    with pytest.raises(UsageError, match=message):
        transform()(data)


def test_configs_can_name_them():
    for text in ('standardise', 'quantile_normalise(quantiles=10)', 'encode_categories(min_count=2, columns=("a",))'):
        assert callable(registry.component('transform', text, 'config.data.transforms').build())
    with pytest.raises(UsageError, match='min_count'):
        registry.component('transform', 'encode_categories(min_cout=2)', 'config.data.transforms')
