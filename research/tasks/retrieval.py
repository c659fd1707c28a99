"""Metrics of vectors of images and texts: recall among all examples of a split, and classes told apart by their names.

Shape letters: B batch, n examples, E dimensions, T tokens, K classes.

Three images with their captions, of which the second image is most similar to the third caption and next to its own:
image_to_text_recall_at_1 is 2/3 and image_to_text_recall_at_5 is 1. By chance recall at k is about k / n.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.tasks.bleu import stacked
from research.tasks.losses import unmasked
from research.tasks.metrics import Accuracy, Factory
from research.tasks.states import Additive, Result, State

DEPTHS = (1, 5, 10)
ROWS = 1024  # that are compared with all others at once


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Recall at 1, 5 and 10: the share of images for which one of the k most similar texts is a caption of theirs, and of texts
    for which one of the k most similar images is.

    Candidates are all examples of the split. Examples with equal captions belong together, so any of them counts; of equal
    similarities the wrong ones come first. A state holds the vectors of all examples, so it grows with the split.
    """

    texts: str = 'tokens'

    def batch(self, outputs: Any, batch: Mapping[str, Any]) -> State:
        """'image' and 'text' (B, E), 'tokens' (B, T), -1 at padding, and 'mask' (B,)."""
        mask, tokens = jnp.asarray(batch['mask'], jnp.float32), jnp.asarray(batch[self.texts])
        if 'segment' in batch:
            tokens = jnp.where(batch['segment'] > 0, tokens, -1)
        vectors = {name: unmasked(outputs[name], mask) for name in ('image', 'text')}
        return {**vectors, 'tokens': tokens, 'mask': mask}

    def merge(self, a: State, b: State) -> State:
        """All examples of both."""
        tokens = stacked(np.asarray(a['tokens']), np.asarray(b['tokens']))  # those of padding buckets have other widths
        return {name: tokens if name == 'tokens' else np.concatenate([a[name], b[name]]) for name in a}

    def compute(self, state: State) -> Result:
        """{'image_to_text_recall_at_1': in [0, 1], ...}; NaN without examples, or if a vector is not finite."""
        keep = np.asarray(state['mask']) > 0
        image, text = (np.asarray(state[name], np.float64)[keep] for name in ('image', 'text'))  # (n, E)
        captions = np.unique(np.asarray(state['tokens'])[keep], axis=0, return_inverse=True)[1].reshape(-1)  # (n,)
        found = {}
        for name, queries, candidates in (('image_to_text', image, text), ('text_to_image', text, image)):
            ranks = best_ranks(queries, candidates, captions)
            shares = {k: float(np.mean(ranks < k)) if len(ranks) else float('nan') for k in DEPTHS}
            sound = np.isfinite(queries).all() and np.isfinite(candidates).all()
            found |= {f'{name}_recall_at_{k}': share if sound else float('nan') for k, share in shares.items()}
        return found


@dataclasses.dataclass(frozen=True)
class ZeroShot(Additive):
    """The share of images whose most similar class, by its prompt's vector, is theirs (Radford et al. 2021, section 3.1.2)."""

    labels: str

    def batch(self, outputs: Any, batch: Mapping[str, Any]) -> State:
        """(sum, weight); `outputs` hold 'image' (B, E) and 'classes' (K, E)."""
        return Accuracy(self.labels).batch(outputs['image'] @ outputs['classes'].T, batch)

    def compute(self, state: State) -> Result:
        """{'zero_shot': in [0, 1]}."""
        return {'zero_shot': Accuracy(self.labels).compute(state)['accuracy']}


def retrieval_metrics(texts: str) -> dict[str, Factory]:
    """The metrics of images and the texts under the key `texts`, as `metrics.CLASS_METRICS`."""
    return {'retrieval': lambda k, labels: Retrieval(texts), 'zero_shot': lambda k, labels: ZeroShot(labels)}


def best_ranks(queries: np.ndarray, candidates: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """How many wrong candidates (n, E) are at least as similar to each query (n, E) as its best right one, (n,) int.

    Candidate j is right for query i if captions[i] == captions[j], (n,) int.
    """
    ranks = np.zeros(len(queries), np.int64)
    for start in range(0, len(queries), ROWS):
        rows = slice(start, start + ROWS)
        similar = queries[rows] @ candidates.T  # (rows, n)
        right = captions[rows, None] == captions
        best = np.max(np.where(right, similar, -np.inf), axis=1, keepdims=True)  # (rows, 1)
        ranks[rows] = np.sum(~right & (similar >= best), axis=1)
    return ranks
