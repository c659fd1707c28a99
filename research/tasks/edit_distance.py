"""Error rates of transcripts: the edits between what was said and what was recognised, by words (WER) or characters (CER).

Shape letters: B batch, n examples, U tokens of a transcript.

    edit_distance('de vis zwemt'.split(), 'de vissen'.split())        # 2: one word replaced, one deleted

The rate of a set is its edits over its reference's words: 2 edits in 3 words and none in 5 are 2 / 8 = 0.25, not the mean of
0.667 and 0. Insertions count, so it can exceed 1. A batch's state is the token ids themselves; they are decoded and compared on
the host at the end, so the rate is that of the texts, whatever the tokenizer.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.data.source import Tokenizer
from research.tasks.states import Result, State, ratio

NOTHING = -1  # fills a row behind its last token
BROKEN = -2  # fills the row of an example whose outputs are not numbers
UNITS = {'wer': str.split, 'cer': list}


def edit_distance(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> int:
    """The fewest insertions, deletions and substitutions between two sequences (Levenshtein 1966).

    Row by row of the table of Wagner and Fischer 1974; within a row, place j costs min over k <= j of its cost without
    insertions at k, plus j - k: a running minimum.
    """
    numbers = {item: number for number, item in enumerate({*reference, *hypothesis})}
    row = np.arange(len(hypothesis) + 1)
    others, places = np.array([numbers[item] for item in hypothesis], np.int64), row.copy()
    for count, item in enumerate(reference, start=1):
        replaced = row[:-1] + (others != numbers[item])
        row = np.concatenate([[count], np.minimum(row[1:] + 1, replaced)])
        row = np.minimum.accumulate(row - places) + places
    return int(row[-1])


@dataclasses.dataclass(frozen=True)
class ErrorRate:
    """The edit distance between recognised and true transcripts, over the length of the true ones.

    Attributes:
      name: 'wer' compares words, 'cer' characters (spaces too).
      tokenizer: decodes both.
      labels: the key of the batch that holds the true tokens (B, U).
      segments: the key that tells which of them are no padding, (B, U), > 0.
    """

    name: str
    tokenizer: Tokenizer
    labels: str = 'tokens'
    segments: str = 'segment'

    def batch(self, outputs: jax.Array, batch: Mapping[str, Any]) -> State:
        """The tokens of both, and the mask; `outputs` are recognised tokens (B, T) int32, `NOTHING` behind the last."""
        reference = jnp.where(batch[self.segments] > 0, batch[self.labels], NOTHING)  # (B, U)
        return {'hypothesis': outputs, 'reference': reference, 'mask': batch['mask']}

    def merge(self, a: State, b: State) -> State:
        """All examples of both, (n, ...)."""
        return {name: _stacked(np.asarray(a[name]), np.asarray(b[name])) for name in a}

    def compute(self, state: State) -> Result:
        """{name: edits / length}; NaN without any reference, or if any outputs are not numbers."""
        counts = np.asarray(state['mask']) > 0
        hypotheses, references = (np.asarray(state[name])[counts] for name in ('hypothesis', 'reference'))
        if (hypotheses == BROKEN).any():
            return {self.name: float('nan')}
        edits = length = 0
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            true = self._units(reference)
            edits += edit_distance(true, self._units(hypothesis))
            length += len(true)
        return {self.name: float(ratio(edits, length, empty=np.nan))}

    def _units(self, tokens: np.ndarray) -> list[str]:
        """The words or characters of a row of tokens (U,)."""
        return UNITS[self.name](self.tokenizer.decode(tokens[tokens >= 0]))


def _stacked(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rows of a (n, U) and b (m, U'), the narrower ones filled up with `NOTHING`."""
    if a.ndim == 1:
        return np.concatenate([a, b])
    width = max(a.shape[1], b.shape[1])
    return np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=NOTHING) for x in (a, b)])
