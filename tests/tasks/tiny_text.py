"""A vocabulary, a model and batches for the tests of text tasks: small, and true to the contracts of their real kin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.data.source import DataSpec

V = 11  # ids 0..3 are pad, bos, eos, mask; 4..10 ordinary


class Letters:
    """Seven letters of 1, 2, 1, 2, ... bytes, and four special tokens."""

    vocabulary_size = V
    byte_lengths = np.int32([0, 0, 0, 0, 1, 2, 1, 2, 1, 2, 1])
    fingerprint = 'letters'
    pad, bos, eos, mask = 0, 1, 2, 3
    unknown = cls = sep = None

    def encode(self, texts):
        return [np.int32(['abcdefg'.index(letter) + 4 for letter in text]) for text in texts]

    def decode(self, ids):
        assert all(0 <= i < V for i in ids), ids  # as the library tokenizers, which take no other numbers
        return ''.join('abcdefg'[i - 4] for i in ids if i >= 4)

    def save(self, folder):
        raise NotImplementedError


LETTERS = Letters()


class Mixing(nn.Module):
    """A token sees the mean of the tokens of its segment: all of them, or those up to itself."""

    num_outputs: int
    vocabulary_size: int = V
    width: int = 16
    causal: bool = True
    dropout: float = 0.0

    def setup(self):
        self.embed = nn.Embed(self.vocabulary_size, self.width)
        self.mix = nn.Dense(self.width)
        self.drop = nn.Dropout(self.dropout)
        self.projection = nn.Dense(self.num_outputs, name='head')

    def features(self, inputs, train=False, *, segments=None, positions=None):
        segments = jnp.ones(inputs.shape, jnp.int32) if segments is None else segments
        seen = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
        seen = seen & jnp.tri(inputs.shape[1], dtype=bool) if self.causal else seen
        x = self.embed(inputs)
        if positions is not None:
            x = x + jnp.sin(positions)[..., None].astype(x.dtype)
        share = (seen / seen.sum(-1, keepdims=True)).astype(x.dtype)
        x = jnp.tanh(self.mix(x + share @ x))
        return self.drop(x, deterministic=not train)

    def head(self, features):
        return self.projection(features)

    def __call__(self, inputs, train=False, *, segments=None, positions=None):
        return self.head(self.features(inputs, train, segments=segments, positions=positions))


class Aligned(nn.Module):
    """An encoder and a decoder: place t of the target sees place t of the source and the mean of the target up to t."""

    num_outputs: int
    width: int = 16

    def setup(self):
        self.embed = nn.Embed(self.num_outputs, self.width)
        self.mix = nn.Dense(self.width)
        self.projection = nn.Dense(self.num_outputs, name='head')

    def features(self, inputs, train=False, *, targets, segments=None, target_segments=None):
        cache = self.encode(inputs, self.init_cache(*targets.shape, jnp.float32), segments=segments)
        real = jnp.ones(targets.shape) if target_segments is None else target_segments
        return self.read(targets, cache, real)[0]

    def head(self, features):
        return self.projection(features)

    def __call__(self, inputs, train=False, **more):
        return self.head(self.features(inputs, train, **more))

    @nn.nowrap
    def init_cache(self, batch, length, dtype=jnp.float32):
        return {'sum': jnp.zeros((batch, self.width), dtype), 'length': jnp.zeros(batch, jnp.int32)}

    def encode(self, inputs, cache, *, segments):
        return {**cache, 'memory': self.embed(inputs) * (segments[..., None] > 0)}

    def decode(self, tokens, cache):
        x, cache = self.read(tokens, cache, jnp.ones(tokens.shape))
        return self.head(x), cache

    def read(self, tokens, cache, real):
        """The features of tokens (B, n) and the cache behind them."""
        x = self.embed(tokens)  # (B, n, D)
        sums = cache['sum'][:, None] + jnp.cumsum(x * real[..., None].astype(x.dtype), 1)
        place = cache['length'][:, None] + jnp.arange(tokens.shape[1])  # (B, n)
        memory = cache['memory']
        there = (jnp.arange(memory.shape[1]) == place[..., None]).astype(x.dtype)  # (B, n, S)
        x = jnp.tanh(self.mix(jnp.concatenate([x, there @ memory, sums / (place + 1)[..., None].astype(x.dtype)], -1)))
        return x, {**cache, 'sum': sums[:, -1], 'length': cache['length'] + tokens.shape[1]}


def spec_of(*keys, tokenizer=LETTERS, length=8, **more):
    """What a task is told of rows of `length` under `keys`."""
    return DataSpec({key: ((length,), np.dtype(np.int32)) for key in keys}, tokenizer=tokenizer, **more)


def rows(seed=0, n=8, length=8, low=4, **more):
    """Random ordinary tokens under 'tokens', and what every batch holds."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(low, V, (n, length)).astype(np.int32)
    return {'tokens': tokens, **rest(n), **more}


def rest(n):
    """What every batch holds beside its examples."""
    return {'mask': np.ones(n, np.float32), 'id': np.arange(n, dtype=np.int32), 'epoch': np.zeros(n, np.int32)}


def packed(seed=0, n=8, length=9, documents=3):
    """Rows of up to `documents` random documents and padding, with 'segment' and 'position'."""
    generator = np.random.default_rng(seed)
    batch = rows(seed, n, length)
    cuts = np.sort(generator.integers(1, length + 1, (n, documents)), 1)  # where each document ends
    batch['segment'] = np.int32(
        [[next((k + 1 for k in range(documents) if t < row[k]), 0) for t in range(length)] for row in cuts]
    )
    first = np.int32([[np.flatnonzero(row == segment)[0] for segment in row] for row in batch['segment']])
    batch['position'] = np.arange(length, dtype=np.int32) - first
    batch['tokens'][batch['segment'] == 0] = 0
    return batch


def padded(batch, keys, extra, fill=0):
    """The batch with `extra` more places of padding at the end of the rows under `keys`; a dict gives the fill of a key."""
    fills = fill if isinstance(fill, dict) else dict.fromkeys(keys, fill)
    return {
        key: np.pad(value, ((0, 0), (0, extra)), constant_values=fills[key]) if key in keys else value
        for key, value in batch.items()
    }


@functools.partial(jax.jit, static_argnums=(0, 3))
def evaluated(task, variables, batch, train=False):
    """The terms of a batch."""
    return task.loss(variables, batch, {'dropout': jax.random.key(0)}, train)[0]


@functools.partial(jax.jit, static_argnums=0)
def gradient(task, variables, batch):
    """The gradient of the loss sum, and the terms."""

    def total(params):
        terms, _ = task.loss({**variables, 'params': params}, batch, {'dropout': jax.random.key(0)}, True)
        return terms['loss'][0], terms

    return jax.grad(total, has_aux=True)(variables['params'])


@functools.partial(jax.jit, static_argnums=0)
def states_of(task, variables, batch):
    """The states of the task's metrics, as the evaluator makes them."""
    outputs = task.predict(variables, batch)
    return {name: metric.batch(outputs, batch) for name, metric in task.metrics.items()}


def measured(task, variables, *batches):
    """The metrics of the task over `batches`."""
    states = [jax.device_get(states_of(task, variables, batch)) for batch in batches]
    results = {}
    for name, metric in task.metrics.items():
        results |= metric.compute(functools.reduce(metric.merge, (state[name] for state in states)))
    return results


def close(a, b, rtol=1e-6, atol=1e-6):
    """Asserts that two trees are equal up to rounding."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)
