"""A folder of JPEG files decoded by Pillow in PyTorch's DataLoader, to be measured against.

    python bench/peers/input_jpeg.py FOLDER SIZE      # FOLDER/CLASS/*.jpg; answers JSON lines, see `input_peer.py`

An image's shorter side is scaled to SIZE and its centre cut out, as torchvision's Resize and CenterCrop do. Variants: so many
worker processes, none being the loader's own. Imports neither jax nor Fulcrum.
"""

import os
import pathlib
import sys

import numpy as np
import torch
from input_peer import Loading, serve
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

VARIANTS = ('workers=0', 'workers=1', 'workers=2')


class Folder(Dataset):
    """One decoded image (SIZE, SIZE, 3) uint8 and its class at a time."""

    def __init__(self, folder, size):
        self.paths, self.size = sorted(pathlib.Path(folder).glob('*/*.jpg')), size
        names = sorted({path.parent.name for path in self.paths})
        self.labels = [names.index(path.parent.name) for path in self.paths]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with Image.open(self.paths[index]) as opened:
            image = ImageOps.fit(opened.convert('RGB'), (self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)), self.labels[index]


def main(folder, size):
    """Answers requests line by line."""
    if os.environ.get('OMP_NUM_THREADS') == '1':
        torch.set_num_threads(1)
    data = Folder(folder, int(size))

    def loader_of(variant, batch):
        workers = int(variant.partition('=')[2])
        return DataLoader(data, batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)

    loading = Loading(loader_of)
    serve(VARIANTS, {'torch': torch.__version__}, loading, lambda: loading.processes)


if __name__ == '__main__':
    main(*sys.argv[1:])
