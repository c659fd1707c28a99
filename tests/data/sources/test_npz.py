"""Npz files in the spellings people use, and each refusal."""

import numpy as np
import pytest

from research.core.errors import UsageError
from research.data.sources.npz import npz

RNG = np.random.default_rng(0)
GREY, COLOUR = RNG.integers(0, 256, (6, 4, 5), np.uint8), RNG.integers(0, 256, (6, 4, 5, 3), np.uint8)
LABELS = np.array([0, 1, 2, 1, 0, 2])


def save(tmp_path, **arrays):
    np.savez(tmp_path / 'toy.npz', **arrays)
    return str(tmp_path / 'toy.npz')


def whole(source):
    return source[np.arange(len(source))]


@pytest.mark.parametrize(
    ('names', 'splits'),
    [
        (('image', 'label'), ['all']),
        (('x', 'y'), ['all']),
        (('x_train', 'y_train', 'x_test', 'y_test'), ['test', 'train']),
        (('train_images', 'train_labels', 'val_images', 'val_labels'), ['train', 'validation']),
    ],
)
def test_spellings(tmp_path, names, splits):
    arrays = {
        name: GREY if name.replace('_', ' ').split()[0 if 'x' in name else -1] in ('x', 'image', 'images') else LABELS
        for name in names
    }
    found = npz(path=save(tmp_path, **arrays))
    assert (found.name, sorted(found.splits), found.class_names) == ('toy', splits, ('0', '1', '2'))
    for source in found.splits.values():
        block = whole(source)
        np.testing.assert_array_equal(block['image'], GREY[..., None])
        np.testing.assert_array_equal(block['label'], LABELS)
        assert (block['image'].dtype, block['label'].dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(source.labels(), LABELS)


def test_colour_wide_integers_and_column_labels(tmp_path):
    found = npz(path=save(tmp_path, x=COLOUR.astype(np.int64), y=LABELS[:, None].astype(np.uint8)))
    np.testing.assert_array_equal(whole(found.splits['all'])['image'], COLOUR)
    np.testing.assert_array_equal(whole(found.splits['all'])['label'], LABELS)


def test_features_and_regression(tmp_path):
    x, y = RNG.normal(size=(5, 3)), RNG.normal(size=5)
    found = npz(path=save(tmp_path, x=x, y=y))
    block = whole(found.splits['all'])
    assert found.class_names is None
    assert found.splits['all'].labels() is None
    np.testing.assert_array_equal(block['features'], x.astype(np.float32))
    np.testing.assert_array_equal(block['label'], y.astype(np.float32))


def test_classes_are_counted_over_all_splits(tmp_path):
    found = npz(path=save(tmp_path, x_train=GREY, y_train=LABELS * 0, x_test=GREY, y_test=LABELS))
    assert found.class_names == ('0', '1', '2')


class Trap:
    def __reduce__(self):
        return (pytest.fail, ('the file was unpickled',))


@pytest.mark.parametrize(
    ('arrays', 'message'),
    [
        ({'x': np.array([Trap()], object), 'y': LABELS}, "'x' cannot be read"),
        ({'x': GREY, 'y': np.array(['a'] * 6)}, "'y' is not an array of numbers"),
        ({'x': GREY, 'y': LABELS, 'weights': LABELS}, "not clear what 'weights' is"),
        ({'x_train_test': GREY, 'y': LABELS}, "not clear what 'x_train_test' is"),
        ({'x': GREY, 'images': GREY, 'y': LABELS}, "input of split 'all' twice, 'images' is the second"),
        ({'x_train': GREY}, "no target for split 'train'"),
        ({'y_train': LABELS}, "no input for split 'train'"),
        ({'x': GREY, 'y': LABELS[:5]}, "split 'all' has 6 inputs, but 5 targets"),
        ({'x': GREY / 255, 'y': LABELS}, "images 'x' are float64, not bytes"),
        ({'x': GREY.astype(int) - 300, 'y': LABELS}, "images 'x' are int64, not bytes"),
        ({'x': LABELS, 'y': LABELS}, r"'x' has shape \(6,\)"),
        ({'x': GREY, 'y': np.eye(6)}, r"targets 'y' have shape \(6, 6\)"),
        ({'x': GREY, 'y': LABELS - 1}, "'y' holds the class -1"),
        (
            {'x': np.array([[1, np.nan], [np.inf, np.nan], [1, 1]]), 'y': LABELS[:3]},
            "2 rows of 'x' hold values that are not finite",
        ),
        ({'x': GREY, 'y': np.array([1, np.nan, 1, 1, 1, np.inf])}, "2 values of 'y' are not finite"),
        ({'x_train': GREY, 'y_train': LABELS, 'x_test': GREY, 'y_test': LABELS / 2}, 'integer targets in one split and floats'),
        ({}, 'holds no arrays'),
    ],
)
def test_refusals(tmp_path, arrays, message):
    with pytest.raises(UsageError, match=message):
        npz(path=save(tmp_path, **arrays))


def test_not_an_npz(tmp_path):
    with pytest.raises(UsageError, match='there is no file'):
        npz(path=str(tmp_path / 'none.npz'))
    np.save(tmp_path / 'a.npy', GREY)
    with pytest.raises(UsageError, match=r'is not an \.npz file'):
        npz(path=str(tmp_path / 'a.npy'))
