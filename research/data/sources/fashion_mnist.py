"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): 60,000 + 10,000 images 28x28 of 10 kinds of clothing.

From a folder of its four IDX files where one is given (Debian's package dataset-fashion-mnist has them), else through TFDS,
which downloads it once.
"""

from research.data.source import DataSet
from research.data.sources.idx import FASHION_MNIST, idx


def fashion_mnist(*, dir: str | None = None, data_dir: str | None = None) -> DataSet:  # noqa: A002  the config's word
    """The splits 'train' and 'test': 'image' uint8 (28, 28, 1), 'label' int32.

    Args:
      dir: folder of the IDX files, such as /usr/share/datasets/fashion-mnist; None: TFDS.
      data_dir: where TFDS keeps its data; None: its default.
    """
    if dir is not None:
        return idx(dir=dir, class_names=FASHION_MNIST)
    from research.data.sources.tfds import tfds  # imported late: it takes a second

    return tfds(dataset='fashion_mnist', data_dir=data_dir)
