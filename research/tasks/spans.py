"""Spans of tags, such as named entities, and their F1 by the rules of CoNLL's script conlleval and of seqeval's default.

Shape letters: B batch, T length, K classes (tags), E types of span.

    B-PER I-PER O B-LOC        two spans: PER at 0-1 and LOC at 3
    O     I-PER O B-LOC        two spans, PER at 1 and LOC at 3: an I that nothing precedes begins a span

For the first as truth and the second as found, one of two spans is right: precision, recall and F1 are 0.5. A span is right if
type, beginning and end are. The rules hold for the schemes IOB1, IOB2 and IOBES: a token goes on with the span before it if it
is I or E, the token before is B or I, and their types are equal; every other token that is not O begins a span.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import UsageError
from research.tasks.base import Batch
from research.tasks.losses import in_range
from research.tasks.states import Additive, Result, State, as_float64, ratio

PREFIXES = 'OBIES'  # a prefix is a number, its place here


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What the K tags mean.

    Attributes:
      prefix: (K,) int, place in `PREFIXES`.
      type: (K,) int, place in `types`; 0 for O.
      types: the types of span, sorted.
    """

    prefix: np.ndarray
    type: np.ndarray
    types: tuple[str, ...]


def read_scheme(class_names: tuple[str, ...]) -> Scheme:
    """The meaning of tags such as 'O', 'B-PER' and 'I-PER'.

    Raises:
      UsageError: a tag is neither 'O' nor one of B, I, E and S with '-' and a type.
    """
    parts = [name.partition('-') for name in class_names]
    sound = [
        name == 'O' or (prefix in set('BIES') and kind) for name, (prefix, _, kind) in zip(class_names, parts, strict=True)
    ]
    wrong = [name for name, is_sound in zip(class_names, sound, strict=True) if not is_sound]
    if wrong or set(class_names) == {'O'}:
        raise UsageError(
            f"metric 'span_f1' reads tags such as 'B-PER', 'I-PER' and 'O', not {', '.join(map(repr, wrong[:3] or ['O']))}",
            "leave it out of task.metrics, e.g. ('accuracy',) for parts of speech",
        )
    types = tuple(sorted({kind for _, _, kind in parts if kind}))
    numbers = [types.index(kind) if kind else 0 for _, _, kind in parts]
    return Scheme(np.array([PREFIXES.index(prefix) for prefix, _, _ in parts]), np.array(numbers), types)


@dataclasses.dataclass(frozen=True, eq=False)
class SpanF1(Additive):
    """Micro-averaged precision, recall and F1 of spans, and the F1 of each type.

    Only labelled tokens are seen, as if the others (word pieces behind the first) were not there. Without any span that was
    found precision is 0, without any that is true recall, as seqeval's `zero_division=0`; without any token all is NaN.

    Attributes:
      scheme: what the tags mean.
      labels: the key of the batch that holds the true tags (B, T), -1 where there is none.
    """

    scheme: Scheme
    labels: str

    def batch(self, outputs: jax.Array, batch: Batch) -> State:
        """Counts of spans by type, (E,) each, and of tokens; `outputs` are logits (B, T, K)."""
        labels = jnp.asarray(batch[self.labels])
        labelled = (labels >= 0) & (jnp.asarray(batch['mask'])[:, None] > 0)
        sound = in_range(labels, outputs.shape[-1]) & ~jnp.isnan(outputs).any(-1)
        tokens = jnp.sum(jnp.where(labelled & ~sound, jnp.nan, labelled))
        counts = span_counts(self.scheme, jnp.where(sound, labels, 0), jnp.argmax(outputs, -1), labelled)
        return {**{name: jnp.where(jnp.isnan(tokens), jnp.nan, count) for name, count in counts.items()}, 'tokens': tokens}

    def compute(self, state: State) -> Result:
        """{'span_f1', 'span_precision', 'span_recall': in [0, 1], 'span_f1_per_type': [E numbers]}."""
        state = as_float64(state)
        empty = 0.0 if state['tokens'] else np.nan
        right, found, true = (state[name] for name in ('correct', 'predicted', 'actual'))
        return {
            'span_f1': float(ratio(2 * right.sum(), found.sum() + true.sum(), empty)),
            'span_precision': float(ratio(right.sum(), found.sum(), empty)),
            'span_recall': float(ratio(right.sum(), true.sum(), empty)),
            'span_f1_per_type': ratio(2 * right, found + true, empty).tolist(),
        }


def span_counts(scheme: Scheme, true: jax.Array, found: jax.Array, labelled: jax.Array) -> dict[str, jax.Array]:
    """'correct', 'predicted' and 'actual' spans by type, (E,) float32 each.

    Args:
      scheme: what the tags mean.
      true: (B, T) int, the true tags.
      found: (B, T) int, the predicted tags.
      labelled: (B, T) bool, which tokens are looked at.
    """
    order = jnp.argsort(~labelled, axis=1, stable=True)  # the labelled tokens first, in their order
    there = jnp.take_along_axis(labelled, order, 1)
    (begins, ends, types), (begins_too, ends_too, types_too) = (
        boundaries(scheme, jnp.take_along_axis(tags, order, 1), there) for tags in (true, found)
    )
    right = begins & begins_too & (ends == ends_too) & (types == types_too)
    each = jnp.arange(len(scheme.types))
    counted = {'correct': (right, types), 'predicted': (begins_too, types_too), 'actual': (begins, types)}
    return {
        name: jnp.sum(which[..., None] & (kind[..., None] == each), axis=(0, 1), dtype=jnp.float32)
        for name, (which, kind) in counted.items()
    }


def boundaries(scheme: Scheme, tags: jax.Array, there: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether a span begins at each token, the place of the next end of one, and the type of each token: (B, T) each.

    Args:
      scheme: what the tags mean.
      tags: (B, T) int.
      there: (B, T) bool; the others count as O.
    """
    prefix: Any = jnp.where(there, jnp.asarray(scheme.prefix)[tags], 0)
    types = jnp.asarray(scheme.type)[tags]
    o, b, i, e, _ = range(len(PREFIXES))
    before, type_before = (jnp.pad(x, ((0, 0), (1, 0)))[:, :-1] for x in (prefix, types))
    goes_on = ((before == b) | (before == i)) & ((prefix == i) | (prefix == e)) & (types == type_before)
    inside = prefix != o
    last = inside & ~jnp.pad(goes_on, ((0, 0), (0, 1)))[:, 1:]
    places = jnp.where(last, jnp.arange(tags.shape[1]), tags.shape[1])
    return inside & ~goes_on, jax.lax.cummin(places, axis=1, reverse=True), types
