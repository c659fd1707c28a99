"""scikit-learn's copy of the UCI handwritten digits: real data that needs no download, for first runs and tests.

digits().splits['all'][np.array([0])]     # {'image': uint8 (1, 8, 8, 1), 'label': int32 [0]}
"""

import numpy as np

from research.data.source import ArraySource, DataSet

LEVELS = 16  # the grey levels of the original are 0, 1, ..., 16


def digits() -> DataSet:
    """1797 images of handwritten digits in one split 'all': 'image' uint8 (8, 8, 1), 'label' int32.

    The original's grey levels v in 0..16 become round(v * 255 / 16): seventeen different values, so nothing is lost
    (v = round(image / 255 * 16)), and the images fill the range of uint8 as those of other sources do.
    """
    from sklearn import datasets  # takes a second to import

    images, labels = datasets.load_digits(return_X_y=True)  # (1797, 64) float in 0..16
    image = np.round(images * 255 / LEVELS).astype(np.uint8).reshape(-1, 8, 8, 1)  # (1797, 8, 8, 1)
    source = ArraySource({'image': image, 'label': labels.astype(np.int32)})
    return DataSet('digits', {'all': source}, tuple('0123456789'))
