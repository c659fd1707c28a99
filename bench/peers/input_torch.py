"""Shuffled, augmented batches of images in memory by PyTorch's DataLoader, to be measured against.

    python bench/peers/input_torch.py DATA.npz      # answers JSON lines, see `input_peer.py`

Variants: 'record' is a data set that augments one example, in the loader's own process; 'workers' the same in two processes;
'blocks' is what a loader can do at best: a data set asked for whole batches, which gathers and augments them at once. Imports
neither jax nor Fulcrum.
"""

import os
import sys

import torch
from input_peer import PADDING, Loading, serve_arrays
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

VARIANTS = ('record', 'workers', 'blocks')
WORKERS = 2


RANGES = torch.tensor([2 * PADDING + 1, 2 * PADDING + 1, 2])


class Examples(Dataset):
    """One augmented example at a time: (H, W, C) and a label."""

    def __init__(self, images, labels):
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
        self.height, self.width = images.shape[1] - 2 * PADDING, images.shape[2] - 2 * PADDING

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        top, left, mirrored = (torch.rand(3) * RANGES).int().tolist()
        image = self.images[index, top : top + self.height, left : left + self.width]
        return (image.flip(1) if mirrored else image), self.labels[index]


class Blocks(Examples):
    """A whole augmented batch at a time, (B, H, W, C) and (B,), by one gather of pixels."""

    def __getitem__(self, index):
        at = torch.as_tensor(index)
        rows = torch.arange(self.height) + torch.randint(2 * PADDING + 1, (len(at), 1))  # (B, H)
        columns = torch.arange(self.width)
        columns = torch.where(torch.rand(len(at), 1) < 0.5, columns.flip(0), columns)
        columns = columns + torch.randint(2 * PADDING + 1, (len(at), 1))  # (B, W)
        return self.images[at[:, None, None], rows[:, :, None], columns[:, None, :]], self.labels[at]


def loader_of(variant, images, labels, size):
    """The loader of a variant."""
    if variant == 'blocks':
        data = Blocks(images, labels)
        return DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), size, drop_last=True))
    workers = WORKERS if variant == 'workers' else 0
    data = Examples(images, labels)
    return DataLoader(data, size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)


def main(path):
    """Answers requests line by line."""
    if os.environ.get('OMP_NUM_THREADS') == '1':
        torch.set_num_threads(1)
    loading = Loading(loader_of)
    serve_arrays(path, VARIANTS, {'torch': torch.__version__}, loading, lambda: loading.processes)


if __name__ == '__main__':
    main(sys.argv[1])
