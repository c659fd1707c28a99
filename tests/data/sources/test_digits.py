"""The digits against scikit-learn's own arrays."""

import numpy as np
from sklearn import datasets

from research.data.sources.digits import digits


def test_images_are_scikit_learns_and_nothing_is_lost():
    found, (images, labels) = digits(), datasets.load_digits(return_X_y=True)
    source = found.splits['all']
    block = source[np.arange(len(source))]
    assert list(found.splits) == ['all']
    assert block['image'].shape == (1797, 8, 8, 1)
    assert block['image'].dtype == np.uint8
    assert block['label'].dtype == np.int32
    assert block['image'].max() == 255
    np.testing.assert_array_equal(np.round(block['image'].reshape(-1, 64) / 255 * 16), images)
    np.testing.assert_array_equal(source.labels(), labels)
    assert found.class_names == tuple('0123456789')
