"""Tables against the csv module and numpy; each refusal names its column and its rows."""

import csv
import gzip

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from sklearn import datasets

from research.core.errors import UsageError
from research.data.sources.table import table

CSV = 'age,dose,smokes,outcome\n61,0.5,true,ill\n47,1.5,false,cured\n33,2.25,false,ill\n'


def save(path, text=CSV):
    path.write_text(text)
    return str(path)


def whole(found, split='all'):
    return found.splits[split][np.arange(len(found.splits[split]))]


def test_csv_with_text_classes(tmp_path):
    found = table(path=save(tmp_path / 'trial.csv'), target='outcome')
    block = whole(found)
    assert (found.name, found.class_names) == ('trial', ('cured', 'ill'))
    assert (block['features'].dtype, block['label'].dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(block['features'], [[61, 0.5, 1], [47, 1.5, 0], [33, 2.25, 0]])
    np.testing.assert_array_equal(block['label'], [1, 0, 1])
    np.testing.assert_array_equal(found.splits['all'].labels(), [1, 0, 1])


def test_real_data_in_all_three_formats(tmp_path):
    x, y = datasets.load_diabetes(return_X_y=True)
    names = [f'c{i}' for i in range(10)]
    with open(tmp_path / 'd.csv', 'w', newline='') as file:
        csv.writer(file).writerows([[*names, 'y'], *(map(repr, map(float, (*row, t))) for row, t in zip(x, y, strict=True))])
    with gzip.open(tmp_path / 'd.csv.gz', 'wb') as file:
        file.write((tmp_path / 'd.csv').read_bytes())
    parquet.write_table(pa.table({**{n: x[:, i] for i, n in enumerate(names)}, 'y': y}), tmp_path / 'd.parquet')
    for suffix in ('csv', 'csv.gz', 'parquet'):
        found = table(path=str(tmp_path / f'd.{suffix}'), target='y')
        assert (found.name, found.class_names, found.splits['all'].labels()) == ('d', None, None)
        np.testing.assert_array_equal(whole(found)['features'], x.astype(np.float32))
        np.testing.assert_array_equal(whole(found)['label'], y.astype(np.float32))


def test_chosen_columns_in_their_order(tmp_path):
    found = table(path=save(tmp_path / 'a.csv'), target='outcome', columns=('dose', 'age'))
    np.testing.assert_array_equal(whole(found)['features'], [[0.5, 61], [1.5, 47], [2.25, 33]])


@pytest.mark.parametrize(
    ('values', 'classes', 'names', 'label'),
    [
        ([7, 3, 7, 5], None, ('3', '5', '7'), [2, 0, 2, 1]),
        ([7, 3, 7, 5], False, None, [7, 3, 7, 5]),
        (['true', 'false', 'true', 'true'], None, ('False', 'True'), [1, 0, 1, 1]),
        ([0.5, 1.5, 0.5, 2], None, None, [0.5, 1.5, 0.5, 2]),
        ([0.5, 1.5, 0.5, 2], True, ('0.5', '1.5', '2.0'), [0, 1, 0, 2]),
        (list(range(51)), None, None, list(range(51))),
        (list(range(50)), None, tuple(map(str, range(50))), list(range(50))),
        (['NA', 'none', 'NA', 'x'], None, ('NA', 'none', 'x'), [0, 1, 0, 2]),
    ],
)
def test_targets(tmp_path, values, classes, names, label):
    text = 'x,y\n' + ''.join(f'{i},{value}\n' for i, value in enumerate(values))
    found = table(path=save(tmp_path / 'a.csv', text), target='y', classes=classes)
    assert found.class_names == names
    np.testing.assert_array_equal(whole(found)['label'], label)
    assert whole(found)['label'].dtype == (np.float32 if names is None else np.int32)


def test_categories_and_decimals_of_parquet(tmp_path):
    from decimal import Decimal

    columns = {'x': pa.array([Decimal('1.5'), Decimal('2.5')]), 'y': pa.array(['b', 'a']).dictionary_encode()}
    parquet.write_table(pa.table(columns), tmp_path / 'a.parquet')
    found = table(path=str(tmp_path / 'a.parquet'), target='y')
    np.testing.assert_array_equal(whole(found)['features'], [[1.5], [2.5]])
    assert found.class_names == ('a', 'b')


def test_a_column_that_turns_to_floats_late_is_still_numeric(tmp_path):
    rows = 300_000  # beyond pyarrow's block of one megabyte
    save(tmp_path / 'a.csv', 'x,y\n' + '1,0\n' * rows + '1.5,1\n')
    assert whole(table(path=str(tmp_path / 'a.csv'), target='y'))['features'][-1] == 1.5


def test_folder_shares_the_classes_of_train(tmp_path):
    save(tmp_path / 'train.csv', 'x,y\n1,b\n2,a\n3,1\n')
    save(tmp_path / 'test.csv', 'y,x\nb,4\n')
    save(tmp_path / 'validation.csv', 'x,y\n5,1\n')  # alone, this column reads as integers
    found = table(path=str(tmp_path), target='y')
    assert (sorted(found.splits), found.class_names) == (['test', 'train', 'validation'], ('1', 'a', 'b'))
    np.testing.assert_array_equal(whole(found, 'test')['features'], [[4]])
    assert [whole(found, s)['label'].tolist() for s in ('train', 'test', 'validation')] == [[2, 1, 0], [2], [0]]
    save(tmp_path / 'test.csv', 'x,y\n1,zebra\n')
    with pytest.raises(
        UsageError, match=r"test.csv: the target 'y' has values that train has not: zebra\n  fix: known: 1, a, b"
    ):
        table(path=str(tmp_path), target='y')


@pytest.mark.parametrize(
    ('text', 'arguments', 'message'),
    [
        ('x,y\nred,1\n2,0\n,1\n', {}, "column 'x' holds text in 2 of 3 rows"),
        ('x,z,y\n1,,1\n,,0\n3,1,1\n', {}, "column 'x' is missing or not finite in 1 of 3 rows; column 'z' .* 2 of 3 rows"),
        ('x,y\ninf,1\nnan,0\n1.5,1\n,1\n', {}, "column 'x' is missing or not finite in 3 of 4 rows"),
        ('x,z,y\n1,,1\n2,,0\n', {}, "column 'z' is missing or not finite in 2 of 2 rows"),
        ('x,y\n2020-01-01,1\n', {}, "column 'x' holds date32.* in 1 of 1 rows"),
        ('x,y\n1,\n2,a\n', {}, "target 'y' is missing in 1 of 2 rows"),
        ('x,y\n1,\n2,3\n', {}, "target 'y' is missing in 1 of 2 rows"),
        ('x,y\n1,2020-01-01\n', {}, "target 'y' is date32"),
        ('x,y\n1,a\n', {'classes': False}, "target 'y' is text"),
        (CSV, {'target': 'outcom'}, r"has no column 'outcom'\n  fix: did you mean 'outcome'"),
        (CSV, {'target': 'outcome', 'columns': ('agee',)}, r"has no column 'agee'\n  fix: did you mean 'age'"),
        (CSV, {'target': 'age', 'columns': ('age', 'dose')}, 'name at least one feature, not the target'),
        ('y\n1\n', {}, 'name at least one feature, not the target'),
        ('x,x,y\n1,2,3\n', {}, 'has the columns x twice'),
        ('x,y\n', {}, 'has no rows'),
        ('', {}, 'cannot be read: Empty CSV file'),
        ('x,y\n1\n', {}, 'cannot be read: CSV parse error'),
    ],
)
def test_refusals(tmp_path, text, arguments, message):
    with pytest.raises(UsageError, match=message):
        table(path=save(tmp_path / 'a.csv', text), **{'target': 'y', **arguments})


def test_files_that_cannot_be_had(tmp_path):
    with pytest.raises(UsageError, match='there is no file or folder'):
        table(path=str(tmp_path / 'none'), target='y')
    save(tmp_path / 'test.csv')
    with pytest.raises(UsageError, match=r'has no train\.csv'):
        table(path=str(tmp_path), target='y')
    save(tmp_path / 'train.csv')
    save(tmp_path / 'train.parquet')
    with pytest.raises(UsageError, match=r'has both train\.csv and train\.parquet'):
        table(path=str(tmp_path), target='y')
    with pytest.raises(UsageError, match=r'train\.parquet cannot be read'):
        table(path=str(tmp_path / 'train.parquet'), target='y')
    with pytest.raises(UsageError, match='is not a table that can be read'):
        table(path=save(tmp_path / 'a.xlsx'), target='y')
    (tmp_path / 'b.csv.gz').write_bytes(gzip.compress(CSV.encode())[:-9])
    with pytest.raises(UsageError, match=r'b\.csv\.gz cannot be read'):
        table(path=str(tmp_path / 'b.csv.gz'), target='outcome')


TYPED = 'age,ward,zip,smokes,outcome\n61,east,007,true,ill\n,west,7,false,cured\n33,,12,,ill\n'


def test_typed_columns_keep_text_and_missing_values(tmp_path):
    found = table(path=save(tmp_path / 'a.csv', TYPED), target='outcome', typed=True)
    block = whole(found)
    np.testing.assert_array_equal(block['numeric'], np.float32([[61, 7, 1], [np.nan, 7, 0], [33, 12, np.nan]]))
    assert block['numeric'].dtype == np.float32
    assert (block['ward'].dtype, block['ward'].tolist()) == (np.dtype(object), ['east', 'west', ''])
    assert set(block) == {'numeric', 'ward', 'label'}
    assert (found.class_names, block['label'].tolist()) == (('cured', 'ill'), [1, 0, 1])


def test_categories_that_look_like_numbers_keep_their_characters(tmp_path):
    found = table(path=save(tmp_path / 'a.csv', TYPED), target='outcome', typed=True, categories=('zip', 'smokes'))
    block = whole(found)
    assert block['zip'].tolist() == ['007', '7', '12']
    assert block['smokes'].tolist() == ['true', 'false', '']
    assert block['numeric'].shape == (3, 1)


def test_typed_columns_of_parquet(tmp_path):
    columns = {
        'x': pa.array([1.5, None, 2.5]),
        'colour': pa.array(['red', None, 'blue']).dictionary_encode(),
        'code': pa.array([7, 8, None]),
        'empty': pa.nulls(3),
        'y': pa.array([0.25, 0.5, 0.75]),
    }
    parquet.write_table(pa.table(columns), tmp_path / 'a.parquet')
    found = table(path=str(tmp_path / 'a.parquet'), target='y', typed=True, categories=('code',))
    block = whole(found)
    np.testing.assert_array_equal(block['numeric'], np.float32([[1.5, np.nan], [np.nan, np.nan], [2.5, np.nan]]))
    assert (block['colour'].tolist(), block['code'].tolist()) == (['red', '', 'blue'], ['7', '8', ''])
    assert (found.class_names, block['label'].tolist()) == (None, [0.25, 0.5, 0.75])


def test_the_training_table_says_what_is_text(tmp_path):
    save(tmp_path / 'train.csv', 'x,c,y\n1,1,a\n2,b,b\n')
    save(tmp_path / 'test.csv', 'x,c,y\n3,01,a\n')  # alone, this column reads as integers
    found = table(path=str(tmp_path), target='y', typed=True)
    assert whole(found, 'test')['c'].tolist() == ['01']
    save(tmp_path / 'test.csv', 'x,c,y\nthree,1,a\n')
    with pytest.raises(UsageError, match=r"test\.csv: column 'x' holds text in 1 of 1 rows"):
        table(path=str(tmp_path), target='y', typed=True)


def test_typed_columns_of_one_kind_only(tmp_path):
    words = whole(table(path=save(tmp_path / 'a.csv', 'a,b,y\nu,v,1\nw,x,2\n'), target='y', typed=True))
    assert words['numeric'].shape == (2, 0)
    numbers = whole(table(path=save(tmp_path / 'b.csv', 'a,y\n1,1\n2,2\n'), target='y', typed=True, columns=('a',)))
    assert set(numbers) == {'numeric', 'label'}


def test_typed_rows_have_the_hash_of_their_raw_values(tmp_path):
    """Row order, other rows and transforms do not move a row; any of its values does."""
    keys = {}
    for name, rows in (
        ('a', ['1,u,0', '2,v,1', ',,1']),
        ('b', ['2,v,1', '3,longer text,0', ',,1', '1,u,0']),
        ('c', ['1,w,0', '2,v,0']),
    ):
        text = 'x,c,y\n' + '\n'.join(rows) + '\n'
        source = table(path=save(tmp_path / f'{name}.csv', text), target='y', typed=True, classes=True).splits['all']
        keys[name] = source.keys().tolist()
    assert [keys['b'][3], keys['b'][0], keys['b'][2]] == keys['a']
    assert not set(keys['c']) & set(keys['a'])


@pytest.mark.parametrize(
    ('text', 'arguments', 'message'),
    [
        (
            'x,y\ninf,1\nnan,0\n-inf,1\n,1\n',
            {},
            "column 'x' is infinite, or too large for float32, in 2 of 4 rows\n  fix: correct them",
        ),
        ('x,y\n1e39,1\n1,0\n', {}, "column 'x' is infinite, or too large for float32, in 1 of 2 rows"),
        ('x,y\n2020-01-01,1\n', {}, "column 'x' holds date32.* in 1 of 1 rows"),
        ('x,y\n1,\n2,a\n', {}, "target 'y' is missing in 1 of 2 rows"),
        ('mask,y\na,1\n', {}, "a column of text is called 'mask'.*\n  fix: rename it"),
        ('x,y\n1,1\n', {'categories': ('z',)}, r"categories=\('z',\), but 'z' is no feature"),
        ('x,y\n1,1\n', {'categories': ('y',)}, "'y' is no feature"),
        ('x,y\n1,1\n', {'categories': ('x',), 'typed': False}, 'of a table that is not typed\n.*typed=True'),
    ],
)
def test_refusals_of_typed_tables(tmp_path, text, arguments, message):
    with pytest.raises(UsageError, match=message):
        table(path=save(tmp_path / 'a.csv', text), **{'target': 'y', 'typed': True, **arguments})
