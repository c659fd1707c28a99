"""Masked language modelling: some tokens of a text are hidden, and predicted from the rest on both sides.

Shape letters: B batch, T length, M places that may be chosen in a row, D features, V vocabulary.

    task = Masked(model=BertBase, data=spec, dtype=jnp.bfloat16)
    batch: 'tokens' (B, T) and 'segment' (B, T), 0 for padding

Of a row with 100 ordinary tokens, 15 are chosen (Devlin et al. 2019, "BERT", section 3.1): each is shown as the mask token with
probability 0.8, as a random ordinary token with 0.1, and as it is with 0.1. The head and the loss see the M = round(0.15 T)
places alone: with T = 512 and V = 30,522 that is 77 rows of logits instead of 512.

What is chosen is a function of the example's id and epoch: of neither its place in the batch, nor the length that its row is
padded to, nor the device. Evaluation, which is always epoch 0, hides the same tokens every time.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core import rng
from research.core.errors import UsageError
from research.core.threefry import straight
from research.tasks.base import EXTRAS, Batch, Keys, Variables
from research.tasks.chunked import Scores
from research.tasks.states import Metric
from research.tasks.tokens import TokenTask, true_places

SPECIAL = ('pad', 'bos', 'eos', 'cls', 'sep', 'mask')  # neither hidden nor shown in place of another token


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Masked(TokenTask):
    """Predicts hidden tokens; the model needs `features` and `head`, since the head reads the hidden places alone.

    Attributes:
      inputs: the key of the batch that holds the rows of T tokens.
      rate: share of a row's ordinary tokens that is chosen, in (0, 1]; at least one token of a row that has any.
      mask_share: probability that a chosen token is shown as the mask token.
      random_share: probability that it is shown as another ordinary token, drawn evenly; otherwise it is shown as it is.
      metrics: names of metrics over the chosen tokens: 'perplexity', 'accuracy', 'bits_per_byte'.

    Raises:
      UsageError: the tokenizer has no mask token, or a value is out of range.
    """

    inputs: str = 'tokens'
    rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    metrics: tuple[str, ...] | dict[str, Metric] = ('accuracy', 'perplexity')

    def __post_init__(self):
        super().__post_init__()
        if self.tokenizer.mask is None:
            raise UsageError('task masked needs a mask token, and the tokenizer has none', "take tokenizer='wordpiece'")
        if not 0 < self.rate <= 1:
            raise UsageError(f'rate is {self.rate}, outside (0, 1]', 'try rate=0.15')
        shares = (self.mask_share, self.random_share, 1 - self.mask_share - self.random_share)
        if min(shares) < -1e-9:
            raise UsageError(
                f'mask_share={self.mask_share} and random_share={self.random_share} are no shares of one whole',
                'try mask_share=0.8, random_share=0.1',
            )

    @functools.cached_property
    def ordinary(self) -> np.ndarray:
        """Whether each token is an ordinary one, (V,) bool."""
        ordinary = np.ones(self.num_outputs, bool)
        ordinary[[i for i in (getattr(self.tokenizer, name) for name in SPECIAL) if i is not None]] = False
        return ordinary

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """The rows with their chosen tokens hidden, their segments and positions."""
        extras = {EXTRAS[key]: batch[key] for key in ('segment', 'position') if key in batch}
        return self.ready({'inputs': self.hide(batch)['masked_tokens'], **extras}, batch)

    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The tokens that were chosen, (B, M), and the weight of each."""
        hidden = self.hide(batch)
        return jnp.take_along_axis(jnp.asarray(batch[self.inputs]), hidden['masked_places'], 1), hidden['masked_weights']

    def scores(self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool) -> tuple[Scores, dict[str, Any]]:
        """As `TokenTask.scores`, (B, M) each."""
        return super().scores(variables, self.hide(batch), rngs, train)

    def apply(
        self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool, method: str | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As `ModuleTask.apply`, at the chosen places: features (B, M, D) or logits (B, M, V)."""
        batch = self.hide(batch)
        features, state = super().apply(variables, batch, rngs, train, 'features')  # (B, T, D)
        chosen = jnp.take_along_axis(features, batch['masked_places'][..., None], 1)  # (B, M, D)
        return (chosen if method == 'features' else self.head(variables, chosen)), state

    def hide(self, batch: Batch) -> Batch:
        """The batch with 'masked_tokens' (B, T), what the model sees, 'masked_places' and their 'masked_weights' (B, M)."""
        if 'masked_tokens' in batch:
            return batch
        tokens = jnp.asarray(batch[self.inputs])
        real = true_places(batch.get('segment'), batch['mask'], tokens)
        candidates = (real > 0) & jnp.asarray(self.ordinary)[tokens]
        keys = rng.example_keys(rng.key(0, 'mask'), batch['id'], batch['epoch'])  # (B,)
        return {**batch, **jax.vmap(self._hide_one)(keys, tokens, real, candidates)}

    def _hide_one(self, key: jax.Array, tokens: jax.Array, weights: jax.Array, candidates: jax.Array) -> dict[str, jax.Array]:
        """`hide` for one row of tokens (T,) of which `candidates` (T,) may be chosen."""
        length, mask = len(tokens), self.tokenizer.mask
        assert mask is not None
        quota = np.maximum(1, np.round(self.rate * np.arange(length + 1))).astype(int)  # by number of candidates
        quota[0] = 0
        bits = jax.random.bits(straight(key), (length, 3))  # a place's bits do not depend on the length
        uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24  # [0, 1)
        order = jnp.where(candidates, uniform[:, 0], 2.0)
        place = jnp.argsort(order)[: quota[-1]]  # (M,): candidates in random order, then the others
        chosen = jnp.arange(quota[-1]) < jnp.asarray(quota)[candidates.sum()]
        words = np.flatnonzero(self.ordinary)
        word = jnp.asarray(words, tokens.dtype)[bits[place, 2] % len(words)]
        kind = uniform[place, 1]
        shown = jnp.where(kind < self.mask_share + self.random_share, word, tokens[place])
        shown = jnp.where(kind < self.mask_share, mask, shown)
        shown = tokens.at[place].set(jnp.where(chosen, shown, tokens[place]).astype(tokens.dtype))
        return {'masked_tokens': shown, 'masked_places': place, 'masked_weights': weights[place] * chosen}
