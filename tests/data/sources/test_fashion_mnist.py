"""Fashion-MNIST is read from where `bench.data` or Debian puts it, and through TFDS only where neither did."""

import gzip
import struct

import numpy as np

from research.data.sources import fashion_mnist as source
from research.data.sources import tfds


def test_what_was_fetched_is_read_and_tfds_only_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv('FULCRUM_DATA', str(tmp_path / 'fetched'))
    monkeypatch.setattr(source, 'INSTALLED', tmp_path / 'installed')
    asked = []
    monkeypatch.setattr(tfds, 'tfds', lambda **arguments: asked.append(arguments))
    source.fashion_mnist()
    assert asked == [{'dataset': 'fashion_mnist', 'data_dir': None}]
    for brightness, folder in ((1, tmp_path / 'installed'), (2, tmp_path / 'fetched/deb' / str(tmp_path)[1:] / 'installed')):
        write(folder, brightness)
        found = source.fashion_mnist().splits['train'][np.arange(3)]
        assert found['image'].shape == (3, 28, 28, 1)
        assert (found['image'] == brightness).all()  # what was fetched comes first
    assert len(asked) == 1


def write(folder, brightness, n=4):
    folder.mkdir(parents=True)
    for prefix in ('train', 't10k'):
        images = struct.pack('>HBB3I', 0, 8, 3, n, 28, 28) + bytes([brightness]) * (n * 28 * 28)
        labels = struct.pack('>HBBI', 0, 8, 1, n) + bytes(range(n))
        (folder / f'{prefix}-images-idx3-ubyte.gz').write_bytes(gzip.compress(images))
        (folder / f'{prefix}-labels-idx1-ubyte.gz').write_bytes(gzip.compress(labels))
