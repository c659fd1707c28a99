"""A GPT-2-like language model and its training loop in PyTorch, as nanoGPT's CPU recipe has them, to be measured against.

    python bench/peers/nano_gpt.py DATA.npz      # answers JSON lines: {"do": "steps", "count": 20} or {"do": "train", ...}

Written from the recipe: pre-norm blocks, fused query-key-value projection, exact gelu, tied embedding, no biases, AdamW with
decay of matrices only, clipping, warm-up and cosine. Eager mode (the recipe says --compile=False), one thread,
scaled_dot_product_attention. Imports neither jax nor Fulcrum.
"""

import json
import math
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

DEPTH, WIDTH, HEADS, CONTEXT, BATCH = 4, 128, 4, 64, 12


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a norm."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        """(B, T, D) -> (B, T, D)."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(WIDTH, dim=2)
        q, k, v = (part.view(batch, length, HEADS, WIDTH // HEADS).transpose(1, 2) for part in (q, k, v))
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(found.transpose(1, 2).contiguous().view(batch, length, WIDTH))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Tokens (B, T) -> logits (B, T, V)."""

    def __init__(self, vocabulary_size):
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary_size, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(DEPTH)), nn.LayerNorm(WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, vocabulary_size, bias=False)
        self.head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                scale = math.sqrt(2 * DEPTH) if name.endswith(('out.weight', 'down.weight')) else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)

    def forward(self, tokens):
        """See the class."""
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Trainer:
    """A model, its optimiser and its data: random windows of the training text."""

    def __init__(self, data, seed, steps):
        torch.manual_seed(seed)
        self.train, self.rows, self.steps, self.step = data['train'], data['validation'], steps, 0
        self.generator = np.random.default_rng(seed)
        self.model = Model(int(data['vocabulary_size']))
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{'params': matrices, 'weight_decay': 0.1}, {'params': vectors, 'weight_decay': 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))

    def rate(self):
        """The learning rate of this step: 100 steps up to 1e-3, then a cosine down to 1e-4."""
        if self.step < 100:
            return 1e-3 * (self.step + 1) / 101
        share = (self.step - 100) / max(self.steps - 100, 1)
        return 1e-4 + 0.5 * (1 + math.cos(math.pi * min(share, 1.0))) * 9e-4

    def take_step(self):
        """One step on a random batch."""
        starts = self.generator.integers(0, len(self.train) - CONTEXT - 1, BATCH)
        rows = torch.from_numpy(np.stack([self.train[s : s + CONTEXT + 1] for s in starts]).astype(np.int64))
        for group in self.optimizer.param_groups:
            group['lr'] = self.rate()
        logits = self.model(rows[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    @torch.no_grad()
    def evaluate(self):
        """The mean loss over all windows of the validation text."""
        total = 0.0
        for start in range(0, len(self.rows), 256):
            rows = torch.from_numpy(self.rows[start : start + 256].astype(np.int64))
            logits = self.model(rows[:, :-1])
            total += functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction='sum').item()
        return total / self.rows[:, 1:].size


def main(path):
    """Answers requests line by line."""
    replies, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    data = dict(np.load(path))
    trainer = Trainer(data, 0, 2000)
    for line in sys.stdin:
        request = json.loads(line)
        if request['do'] == 'train':
            trained = Trainer(data, request['seed'], request['steps'])
            for _ in range(request['steps']):
                trained.take_step()
            answer = {'loss': trained.evaluate(), 'parameters': sum(p.numel() for p in trained.model.parameters())}
        elif request['do'] == 'versions':
            answer = {'torch': torch.__version__, 'numpy': np.__version__}
        else:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(request['count']):
                trainer.take_step()
            answer = {'seconds': time.perf_counter() - wall, 'cpu': time.process_time() - cpu}
        replies.write(json.dumps(answer) + '\n')
        replies.flush()


if __name__ == '__main__':
    main(sys.argv[1])
