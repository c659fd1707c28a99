"""BLEU of generated texts, by sacrebleu (Papineni et al. 2002; Post 2018, "A call for clarity in reporting BLEU scores").

Shape letters: B batch, n examples, T length of a row.

    Bleu(tokenizer).compute(state)                  # {'bleu': 27.3}, in percent, of the whole corpus at once

It is what `sacrebleu reference.txt < output.txt` prints, signature `nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp` with the
version of sacrebleu that is installed: no mean of sentences, and not a tokenizer of ours, but sacrebleu's own on plain text.
'the cat sat on the mat' for 'the cat sat on a mat' has precisions 5/6, 3/5, 2/4 and 1/3: BLEU is 100 (1/12)^(1/4) = 53.73.

A reference is the batch's own target, decoded: if a transform has cut it, or a tokenizer that normalises has changed it, so is
the reference. To compare with published numbers take a tokenizer that loses nothing and rows that are long enough.
"""

import dataclasses
import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.core.errors import UsageError, nearest
from research.data.source import Tokenizer
from research.tasks.base import Batch
from research.tasks.states import Result, State

NOTHING = -1  # fills a row behind its last token
BROKEN = -2  # fills the row of an example whose outputs are not numbers
WORDS = ('13a', 'intl', 'char', 'zh', 'none')  # sacrebleu's tokenizers that download nothing


@dataclasses.dataclass(frozen=True, eq=False)
class Bleu:
    """Corpus BLEU of generated tokens against the target.

    Attributes:
      tokenizer: decodes both.
      words: how sacrebleu splits text into words: '13a' (WMT's), 'intl', 'zh', 'char' or 'none' (white space alone).

    Raises:
      UsageError: there is no such way to split.
    """

    tokenizer: Tokenizer
    words: str = '13a'

    def __post_init__(self):
        if self.words not in WORDS:
            raise UsageError(f'bleu_words {self.words!r} does not exist', nearest(self.words, WORDS))

    def batch(self, outputs: Any, batch: Batch) -> State:
        """'hypothesis' and 'reference', tokens (B, T) each with `NOTHING` behind the last, and 'mask' (B,)."""
        reference = jnp.where(outputs['weight'] > 0, outputs['target'], NOTHING)
        return {'hypothesis': outputs['hypothesis'], 'reference': reference, 'mask': batch['mask']}

    def merge(self, a: State, b: State) -> State:
        """All examples of both, (n, ...)."""
        return {name: stacked(np.asarray(a[name]), np.asarray(b[name])) for name in a}

    def compute(self, state: State) -> Result:
        """{'bleu': 0 to 100}; NaN without any example, or if any outputs are not numbers.

        Raises:
          UsageError: sacrebleu is not installed.
        """
        corpus_bleu = sacrebleu().corpus_bleu  # before anything else: a run fails at its start, not at its first evaluation
        counts = np.asarray(state['mask']) > 0
        hypotheses, references = (np.asarray(state[name])[counts] for name in ('hypothesis', 'reference'))
        if not counts.any() or (hypotheses == BROKEN).any():
            return {'bleu': float('nan')}
        texts, truth = ([self.tokenizer.decode(row[row >= 0]) for row in rows] for rows in (hypotheses, references))
        return {'bleu': float(corpus_bleu(texts, [truth], tokenize=self.words).score)}


def stacked(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rows of a (n, T) and b (m, T'), the narrower ones filled up with `NOTHING`; or values (n,) and (m,)."""
    if a.ndim == 1:
        return np.concatenate([a, b])
    width = max(a.shape[1], b.shape[1])
    return np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=NOTHING) for x in (a, b)])


def sacrebleu() -> Any:
    """The module sacrebleu.

    Raises:
      UsageError: it is not installed.
    """
    try:
        return importlib.import_module('sacrebleu')
    except ImportError as error:
        raise UsageError("metric 'bleu' needs sacrebleu", 'pip install -r requirements/extras.txt') from error
