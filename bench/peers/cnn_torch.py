"""The network of TensorFlow's CIFAR-10 tutorial in PyTorch, channels-last, to be measured against.

    python bench/peers/cnn_torch.py DATA.npz

    {"do": "steps", "batch": 32, "count": 40}    {"do": "accuracy", "batch": 32, "seed": 0, "every": 100, ...}

A plain loop as a careful user writes it: float images in memory in channels-last layout, batches by indexing a permutation (no
DataLoader, which is slower), Adam in its fused form, the loss read every 50 steps. Initialised as Keras does. Imports neither
jax nor Fulcrum.
"""

import json
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def make_model():
    """The network; inputs (B, 3, 32, 32)."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model.to(memory_format=torch.channels_last)


class Trainer:
    """A model, its optimiser and the order of its examples."""

    def __init__(self, images, labels, batch, seed):
        torch.manual_seed(seed)
        self.images, self.labels, self.batch, self.step, self.told = images, labels, batch, 0, 0.0
        self.order, self.at = torch.randperm(len(images)), 0
        self.model = make_model()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, eps=1e-7, fused=True)

    def take_step(self):
        """One step."""
        if self.at + self.batch > len(self.order):
            self.order, self.at = torch.randperm(len(self.images)), 0
        rows = self.order[self.at : self.at + self.batch]
        self.at, self.step = self.at + self.batch, self.step + 1
        loss = functional.cross_entropy(self.model(self.images[rows]), self.labels[rows])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.step % 50 == 0:
            self.told = loss.item()

    @torch.no_grad()
    def accuracy(self, images, labels):
        """The share of right answers."""
        right = [(self.model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(500), labels.split(500), strict=True)]
        return sum(right) / len(labels)


def as_tensor(images):
    """uint8 (n, H, W, C) as float (n, C, H, W) in channels-last layout."""
    return (torch.from_numpy(images).float() / 255).permute(0, 3, 1, 2)


def until(trainer, request, test):
    """Steps until the target is reached; the clock stands while it is evaluated."""
    seconds, cpu, reached = 0.0, 0.0, False
    while not reached and trainer.step < request['most']:
        wall, cpu_from = time.perf_counter(), time.process_time()
        for _ in range(request['every']):
            trainer.take_step()
        seconds, cpu = seconds + time.perf_counter() - wall, cpu + time.process_time() - cpu_from
        reached = trainer.accuracy(*test) >= request['target']
    return {'seconds': seconds, 'cpu': cpu, 'steps': trainer.step, 'reached': reached}


def main(path):
    """Answers requests line by line."""
    replies, sys.stdout = sys.stdout, sys.stderr
    data = dict(np.load(path))
    train, test = ((as_tensor(data[f'x_{s}']), torch.from_numpy(data[f'y_{s}']).long()) for s in ('train', 'test'))
    trainers = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request['do'] == 'versions':
            answer = {'torch': torch.__version__}
        elif request['do'] == 'steps':
            if request['batch'] not in trainers:
                trainers[request['batch']] = Trainer(*train, request['batch'], 0)
            trainer = trainers[request['batch']]
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(request['count']):
                trainer.take_step()
            answer = {'seconds': time.perf_counter() - wall, 'cpu': time.process_time() - cpu}
        else:
            answer = until(Trainer(*train, request['batch'], request['seed']), request, test)
        replies.write(json.dumps(answer) + '\n')
        replies.flush()


if __name__ == '__main__':
    main(sys.argv[1])
