"""Shuffled, augmented batches of images in memory by Grain, to be measured against.

    python bench/peers/input_grain.py DATA.npz      # answers JSON lines, see `input_peer.py`

Variants: 'record' augments one example at a time in NumPy and batches then, read without threads; 'threads' the same with two
threads that read few batches ahead (Grain's default, 500 batches, would be filled before the clock starts); 'batched' batches
and augments whole batches. Imports neither jax nor Fulcrum.
"""

import sys

import grain
import numpy as np
from input_peer import PADDING, serve_arrays

VARIANTS = ('record', 'threads', 'batched')


class Records:
    """Random access to single examples."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


class AugmentOne(grain.transforms.RandomMap):
    """One padded image (H + 8, W + 8, C) -> (H, W, C)."""

    def random_map(self, element, rng):
        """See the class."""
        image, label = element
        top, left, mirrored = rng.integers((2 * PADDING + 1, 2 * PADDING + 1, 2)).tolist()
        image = image[top : top + image.shape[0] - 2 * PADDING, left : left + image.shape[1] - 2 * PADDING]
        return (image[:, ::-1] if mirrored else image), label


class AugmentMany(grain.transforms.RandomMap):
    """Padded images (B, H + 8, W + 8, C) -> (B, H, W, C), by one gather of pixels."""

    def random_map(self, element, rng):
        """See the class."""
        images, labels = element
        count, height, width = len(images), images.shape[1] - 2 * PADDING, images.shape[2] - 2 * PADDING
        corners = rng.integers(2 * PADDING + 1, size=(2, count, 1))
        columns = np.where(rng.random((count, 1)) < 0.5, np.arange(width)[::-1], np.arange(width)) + corners[1]  # (B, W)
        rows = np.arange(height) + corners[0]  # (B, H)
        return images[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]], labels


def pipeline(variant, images, labels, size):
    """The endless iterator of batches."""
    found = grain.MapDataset.source(Records(images, labels)).seed(0).shuffle().repeat()
    if variant == 'batched':
        found = found.batch(size).random_map(AugmentMany())
    else:
        found = found.random_map(AugmentOne()).batch(size)
    threads = 2 if variant == 'threads' else 0
    return iter(found.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


if __name__ == '__main__':
    serve_arrays(sys.argv[1], VARIANTS, {'grain': grain.__version__}, pipeline)
