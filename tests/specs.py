"""What data look like to a task, for tests that need shapes or random batches and no data set.

spec = image((8, 8, 1), 10);  batch = random_batch(spec, 16)
"""

import numpy as np

from research.data.source import DataSpec

LABEL = {'label': ((), np.int32)}
SPECIAL = 7


class Letters:
    """A tokenizer as far as shapes and metrics depend on it."""

    def __init__(self, size):
        self.vocabulary_size, self.byte_lengths, self.fingerprint = size, np.ones(size, np.int32), 'letters'
        self.pad, self.bos, self.eos, self.unknown, self.mask, self.cls, self.sep = range(SPECIAL)

    def encode(self, texts):
        return [np.array([SPECIAL + ord(c) % 20 for c in text], np.int32) for text in texts]

    def decode(self, ids):
        return ' '.join(map(str, ids))


def spec(examples, classes=None, tokenizer=None, cardinalities=(), names=None):
    examples = {key: (shape, np.dtype(dtype)) for key, (shape, dtype) in examples.items()}
    names = names or (None if classes is None else tuple(map(str, range(classes))))
    return DataSpec(examples, names, classes and (100,) * classes, tokenizer, cardinalities)


def image(shape, classes, **more):
    return spec({'image': (shape, np.uint8), **LABEL, **more}, classes)


def windows(length, vocabulary):
    return spec({'tokens': ((length + 1,), np.int32)}, tokenizer=Letters(vocabulary))


def packed(length, vocabulary):
    keys = ('tokens', 'segment', 'position')
    return spec(dict.fromkeys(keys, ((length + 1,), np.int32)), tokenizer=Letters(vocabulary))


def padded(length, vocabulary, classes=None, **more):
    keys = dict.fromkeys(('tokens', 'segment'), ((length,), np.int32))
    return spec({**keys, **(LABEL if classes else {}), **more}, classes, Letters(vocabulary))


def pairs(source, target, vocabulary):
    lengths = {'source': source, 'source_segment': source, 'target': target + 1, 'target_segment': target + 1}
    return spec({key: ((length,), np.int32) for key, length in lengths.items()}, tokenizer=Letters(vocabulary))


def random_batch(data, size, seed=0):
    """A batch of such data: every row valid, half of each row of a segment, whole numbers below their limits."""
    generator = np.random.default_rng(seed)
    limits = {'label': len(data.class_names or ()), 'tag': len(data.class_names or ())}
    vocabulary = data.tokenizer.vocabulary_size if data.tokenizer else 0
    batch = {}
    for key, (shape, dtype) in data.examples.items():
        if dtype.kind == 'f':
            batch[key] = generator.standard_normal((size, *shape)).astype(dtype)
        elif key.endswith('segment') or key == 'position':
            places = np.arange(shape[0])
            rows = np.where(places < shape[0] // 2, 1, 2) if 'position' in data.examples else (places < shape[0] * 3 // 4) * 1
            rows = np.where(rows == 2, places - shape[0] // 2, places) if key == 'position' else rows
            batch[key] = np.broadcast_to(rows, (size, *shape)).astype(dtype)
        elif key == 'audio_length':
            batch[key] = generator.integers(data.examples['audio'][0][0] // 2, data.examples['audio'][0][0], size).astype(dtype)
        elif key == 'category':
            batch[key] = generator.integers(0, np.array(data.cardinalities), (size, *shape)).astype(dtype)
        elif key in ('tokens', 'source', 'target'):
            batch[key] = generator.integers(SPECIAL, vocabulary, (size, *shape)).astype(dtype)
        else:
            batch[key] = generator.integers(0, limits.get(key, 256), (size, *shape)).astype(dtype)
    ids = np.arange(size, dtype=np.int32)
    return {**batch, 'mask': np.ones(size, np.float32), 'id': ids, 'epoch': np.zeros(size, np.int32)}
