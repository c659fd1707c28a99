"""scikit-learn's copy of the UCI handwritten digits: real data that needs no download, for first runs and tests.

digits().splits['all'][np.array([0])]     # {'image': uint8 (1, 8, 8, 1), 'label': int32 [0]}
"""

import gzip
import importlib.util
import pathlib

import numpy as np

from research.data.source import ArraySource, DataSet

LEVELS = 16  # the grey levels of the original are 0, 1, ..., 16


def digits() -> DataSet:
    """1797 images of handwritten digits in one split 'all': 'image' uint8 (8, 8, 1), 'label' int32.

    The original's grey levels v in 0..16 become round(v * 255 / 16): seventeen different values, so nothing is lost
    (v = round(image / 255 * 16)), and the images fill the range of uint8 as those of other sources do.
    """
    table = _table()
    image = np.round(table[:, :-1] * 255 / LEVELS).astype(np.uint8).reshape(-1, 8, 8, 1)  # (1797, 8, 8, 1)
    source = ArraySource({'image': image, 'label': table[:, -1].astype(np.int32)})
    return DataSet('digits', {'all': source}, tuple('0123456789'))


def _table() -> np.ndarray:
    """Grey levels and class of each image, (1797, 65) float, from the file that `sklearn.datasets.load_digits` reads.

    Importing scikit-learn, and scipy with it, is what the quick start's first step would wait for longest.
    """
    package = importlib.util.find_spec('sklearn')  # imports nothing
    if package is None or package.origin is None:
        raise ImportError("No module named 'sklearn'", name='sklearn')
    with gzip.open(pathlib.Path(package.origin).parent / 'datasets' / 'data' / 'digits.csv.gz', 'rt') as file:
        return np.loadtxt(file, delimiter=',')
