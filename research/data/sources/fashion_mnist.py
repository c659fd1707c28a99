"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): 60,000 + 10,000 images 28x28 of 10 kinds of clothing.

From a folder of its four IDX files where there is one (Debian's package dataset-fashion-mnist has them, and `python -m
bench.data fetch fashion_mnist` fetches it), else through TFDS, which downloads it once.
"""

import pathlib

from research.core import files
from research.data.source import DataSet
from research.data.sources.idx import FASHION_MNIST, idx

INSTALLED = pathlib.Path('/usr/share/datasets/fashion-mnist')


def fashion_mnist(*, dir: str | None = None, data_dir: str | None = None) -> DataSet:  # noqa: A002  the config's word
    """The splits 'train' and 'test': 'image' uint8 (28, 28, 1), 'label' int32.

    Args:
      dir: folder of the IDX files; None: where Debian's package or `bench.data` puts them, and TFDS if neither did.
      data_dir: where TFDS keeps its data; None: its default.
    """
    known = [files.data_folder() / 'deb' / INSTALLED.relative_to('/'), INSTALLED]
    folder = next((str(path) for path in known if path.is_dir()), None) if dir is None else dir
    if folder is not None:
        return idx(dir=folder, class_names=FASHION_MNIST)
    from research.data.sources.tfds import tfds  # imported late: it takes a second

    return tfds(dataset='fashion_mnist', data_dir=data_dir)
