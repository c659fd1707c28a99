"""Text classification is the task `classify` on rows of tokens: real text, from docstrings to a class."""

import ast
import functools
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.data import build, splits
from research.data.sequences import pad
from research.data.source import ArraySource, DataSet
from research.data.tokenizers import Bytes
from research.models.rnn import RNN
from research.models.transformer import Encoder
from research.tasks.classify import Classify
from tests.tasks.tiny_text import close, evaluated, gradient, padded, rest

MODULES = ('_pydecimal', 'mailbox')  # what a docstring is about: arithmetic or mail
ENCODER = functools.partial(Encoder, depth=1, width=16, heads=2, pooling='mean')
GRU = functools.partial(RNN, cell='gru', hidden=(16,))


def docstrings(module):
    """The beginnings of all docstrings of a module of the standard library."""
    path = pathlib.Path(sysconfig.get_path('stdlib')) / f'{module}.py'
    nodes = ast.walk(ast.parse(path.read_text(encoding='utf-8')))
    found = [ast.get_docstring(n) for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return sorted({text for text in found if text and len(text) > 20})


@functools.cache
def data():
    """Splits of rows of 48 bytes, and their description."""
    texts = [docstrings(module) for module in MODULES]
    columns = {
        'text': np.array([text for found in texts for text in found], object),
        'label': np.repeat(np.arange(len(MODULES), dtype=np.int32), [len(found) for found in texts]),
    }
    raw = DataSet('docstrings', {'all': ArraySource(columns)}, MODULES)
    parts = splits.split(raw, 0.1, 0.3)
    rows = pad(length=48)(DataSet(raw.name, parts, MODULES, Bytes()))
    return rows.splits, build.describe(rows)


def batch_of(split, indices=None):
    source = data()[0][split]
    indices = np.arange(len(source)) if indices is None else indices
    return {**source[indices], **rest(len(indices))}


@functools.cache
def classify(model):
    return Classify(model=model, data=data()[1], dtype=jnp.float32, inputs='tokens')


def test_the_data_are_real_and_balanced_enough():
    counts = data()[1].class_counts
    assert min(counts) > 40 and max(counts) / sum(counts) < 0.7
    assert set(data()[1].examples) == {'tokens', 'segment', 'label'}


@pytest.mark.parametrize('model', [ENCODER, GRU], ids=['encoder', 'gru'])
def test_padding_does_not_change_the_class(model):
    task, batch = classify(model), batch_of('test', np.arange(8))
    batch['segment'] = batch['segment'] * (np.arange(48) < 20 + 4 * np.arange(8)[:, None])  # shorter texts, padding behind
    batch['segment'] = batch['segment'].astype(np.int32)
    variables = jax.jit(task.init)(jax.random.key(0), batch)
    short = padded(batch, ('tokens', 'segment'), 9)
    predict = jax.jit(task.predict)
    close(predict(variables, short), predict(variables, batch), rtol=1e-5, atol=1e-5)


def test_an_encoder_learns_what_docstrings_are_about():
    task = classify(ENCODER)
    variables = jax.jit(task.init)(jax.random.key(0), batch_of('train', np.arange(32)))
    optimizer = optax.adam(0.01)

    @jax.jit
    def descend(params, state, batch):
        grads, terms = gradient(task, {'params': params}, batch)
        updates, state = optimizer.update(jax.tree.map(lambda g: g / terms['loss'][1], grads), state)
        return optax.apply_updates(params, updates), state

    params, state = variables['params'], optimizer.init(variables['params'])
    order = np.random.default_rng(0)
    for _ in range(60):
        params, state = descend(params, state, batch_of('train', order.integers(0, len(data()[0]['train']), 32)))
    test = batch_of('test')
    correct, count = evaluated(task, {'params': params}, test)['accuracy']
    majority = np.bincount(test['label']).max() / len(test['label'])
    assert float(correct / count) > majority + 0.1
