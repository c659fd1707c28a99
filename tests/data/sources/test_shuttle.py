"""The shuttle readings: a small file of the same form, and the real one where it has been fetched."""

import gzip

import numpy as np
import pytest

from research.core import registry
from research.core.errors import UsageError
from research.core.files import data_folder
from research.data import splits
from research.data.sources.shuttle import FILE, shuttle

HEADER = ','.join(f'f{i}' for i in range(1, 10)) + ',anomaly\n'
ROWS = ['50,21,77,0,28,0,27,48,22,1', '53,0,82,0,52,-5,29,30,2,0', '37,0,76,0,28,18,40,48,8,0']


def write(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'shuttle.csv.gz').write_bytes(gzip.compress((HEADER + '\n'.join(ROWS) + '\n').encode()))


def test_a_small_file(tmp_path):
    write(tmp_path)
    found = shuttle(dir=str(tmp_path))
    block = found.splits['all'][np.arange(3)]
    assert (found.name, found.class_names) == ('shuttle', ('normal', 'anomaly'))
    np.testing.assert_array_equal(block['numeric'], [list(map(float, row.split(',')[:9])) for row in ROWS])
    np.testing.assert_array_equal(block['label'], [1, 0, 0])
    np.testing.assert_array_equal(found.splits['all'].labels(), [1, 0, 0])
    assert (block['numeric'].dtype, block['label'].dtype) == (np.float32, np.int32)


def test_where_it_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv('FULCRUM_DATA', str(tmp_path))
    with pytest.raises(UsageError, match=r'shuttle\.csv\.gz\n  fix: python -m bench.data fetch shuttle'):
        shuttle()
    write((tmp_path / FILE).parent)
    built = registry.component('source', 'shuttle', 'config.data.source').build()
    assert len(built.splits['all']) == 3


@pytest.mark.skipif(not (data_folder() / FILE).is_file(), reason='python -m bench.data fetch shuttle')
def test_the_real_file_is_as_documented():
    source = shuttle().splits['all']
    block = source[np.arange(len(source))]
    assert (block['numeric'].shape, int(block['label'].sum())) == ((49_097, 9), 3_511)
    assert len(np.unique(source.keys())) == 49_097
    parts = splits.split(shuttle(), 0.1, 0.2)
    assert {name: len(part) for name, part in parts.items()} == {'train': 34_315, 'validation': 4_917, 'test': 9_865}
