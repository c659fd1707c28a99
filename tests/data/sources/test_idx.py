"""IDX folders written here byte by byte, after the format's description."""

import gzip
import struct

import numpy as np
import pytest

from research.core.errors import UsageError
from research.data.sources.idx import FASHION_MNIST, idx, read_idx

CODES = {'uint8': 8, 'int8': 9, 'int16': 11, 'int32': 12, 'float32': 13, 'float64': 14}


def encode(array):
    header = struct.pack('>HBB', 0, CODES[array.dtype.name], array.ndim) + struct.pack(f'>{array.ndim}I', *array.shape)
    return header + array.astype(array.dtype.newbyteorder('>')).tobytes()


def write(path, array, packed=True):
    data = encode(array)
    (path.with_name(path.name + '.gz') if packed else path).write_bytes(gzip.compress(data, mtime=0) if packed else data)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    found = {}
    for prefix, n in (('train', 7), ('t10k', 4)):
        found[f'{prefix}-images-idx3-ubyte'] = rng.integers(0, 256, (n, 5, 6), np.uint8)
        found[f'{prefix}-labels-idx1-ubyte'] = np.arange(n, dtype=np.uint8) % 3
    return found


def make(folder, arrays, packed=True):
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        write(folder / name, array, packed)
    return str(folder)


@pytest.mark.parametrize('packed', [True, False])
def test_round_trip(tmp_path, arrays, packed):
    found = idx(dir=make(tmp_path / 'toy', arrays, packed))
    assert (found.name, list(found.splits), found.class_names) == ('toy', ['train', 'test'], ('0', '1', '2'))
    for split, prefix in (('train', 'train'), ('test', 't10k')):
        source = found.splits[split]
        order = np.arange(len(source))[::-1]
        block = source[order]
        assert block['label'].dtype == np.int32
        np.testing.assert_array_equal(block['image'], arrays[f'{prefix}-images-idx3-ubyte'][order][..., None])
        np.testing.assert_array_equal(block['label'], arrays[f'{prefix}-labels-idx1-ubyte'][order])


@pytest.mark.parametrize('dtype', CODES)
def test_every_type_of_the_format(tmp_path, dtype):
    array = (np.arange(24).reshape(2, 3, 4) * 3).astype(dtype)
    (tmp_path / 'a').write_bytes(encode(array))
    found = read_idx(tmp_path / 'a')
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_class_names(tmp_path, arrays):
    assert idx(dir=make(tmp_path / 'fashion-mnist', arrays)).class_names == FASHION_MNIST
    assert idx(dir=make(tmp_path / 'toy', arrays), class_names=('a', 'b', 'c')).class_names == ('a', 'b', 'c')
    with pytest.raises(UsageError, match=r'class_names has 2 names, but .* has labels up to 2'):
        idx(dir=make(tmp_path / 'toy', arrays), class_names=('a', 'b'))


def test_missing_folder_names_the_debian_package_only_for_its_own(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r'there is no folder .*/none\n  fix: correct dir'):
        idx(dir=str(tmp_path / 'none'))
    monkeypatch.setattr('pathlib.Path.is_dir', lambda _: False)
    with pytest.raises(UsageError, match='apt-get install dataset-fashion-mnist'):
        idx(dir='/usr/share/datasets/fashion-mnist')


def test_missing_file(tmp_path, arrays):
    folder = make(tmp_path / 'toy', arrays)
    (tmp_path / 'toy' / 't10k-labels-idx1-ubyte.gz').unlink()
    with pytest.raises(UsageError, match=r'has neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz'):
        idx(dir=folder)


def test_count_mismatch_and_wrong_axes(tmp_path, arrays):
    images, labels = 'train-images-idx3-ubyte', 'train-labels-idx1-ubyte'
    with pytest.raises(UsageError, match=f'{images}.gz has 7 images, but .*{labels}.gz has 6 labels'):
        idx(dir=make(tmp_path / 'a', arrays | {labels: arrays[labels][:6]}))
    with pytest.raises(UsageError, match=f'{labels}.gz holds uint8'):
        idx(dir=make(tmp_path / 'b', arrays | {labels: arrays[images]}))
    with pytest.raises(UsageError, match=f'{images}.gz holds int16'):
        idx(dir=make(tmp_path / 'c', arrays | {images: arrays[images].astype(np.int16)}))


WHOLE = encode(np.zeros((3, 2), np.uint8))


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (b'\x89PNG\r\n', 'is not an IDX file: it begins with 89 50 4e 47'),
        (b'', 'is not an IDX file'),
        (b'\0\0\x0a\x01' + bytes(4), 'is not an IDX file'),
        (WHOLE[:7], 'ends inside its header'),
        (WHOLE[:-1], r'announces \(3, 2\), 6 bytes of values, but holds 5'),
        (WHOLE + b'x', 'but holds 7'),
        (b'\0\0\x08\x03' + b'\xff' * 12, 'of values, but holds 0'),
        (gzip.compress(WHOLE, mtime=0)[:-4], 'is damaged'),
        (gzip.compress(WHOLE, mtime=0)[:12] + b'\xff\xff' + gzip.compress(WHOLE, mtime=0)[14:], 'is damaged'),
    ],
)
def test_damaged_files_are_named(tmp_path, data, message):
    (tmp_path / 'broken').write_bytes(data)
    with pytest.raises(UsageError, match=f'broken .*{message}'):
        read_idx(tmp_path / 'broken')
