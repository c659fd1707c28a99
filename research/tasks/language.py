"""Language modelling: the next token of each place, by cross-entropy over true tokens.

Shape letters: B batch, T length.

    task = Language(model=Decoder, data=spec, dtype=jnp.bfloat16, chunk=128)
    batch: 'tokens' (B, T + 1), in packed rows with 'segment' and 'position' (B, T + 1); the model sees T, and T are predicted

A packed row with tokens a b c | d e | . (two documents and padding: segment 1 1 1 2 2 0) has three targets: b, c and e. Nothing
predicts d from c, or anything into padding.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research.core.errors import UsageError
from research.tasks.base import EXTRAS, Batch
from research.tasks.states import Metric
from research.tasks.tokens import TokenTask, true_places


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Language(TokenTask):
    """Predicts each token from those before it in its document.

    A target counts if it is in the same document (segment) as the token before it; without segments every target counts. The
    first token of a document is predicted by none.

    Attributes:
      inputs: the key of the batch that holds the rows of T + 1 tokens.
      metrics: names of metrics: 'perplexity', 'bits_per_byte', 'accuracy'.

    Raises:
      UsageError: the model says by `is_causal` that it sees later tokens; of a model without that property nothing is known.
    """

    inputs: str = 'tokens'
    metrics: tuple[str, ...] | dict[str, Metric] = ('perplexity', 'bits_per_byte')

    def __post_init__(self):
        super().__post_init__()
        if not getattr(self.module, 'is_causal', True):
            raise UsageError(
                f'model {type(self.module).__name__} as configured sees the tokens that task language has it predict',
                "take a causal model: 'decoder', or 'rnn' with bidirectional=False; for both sides task 'masked'",
            )

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """The first T tokens of each row, their segments and their positions."""
        extras = {EXTRAS[key]: batch[key][:, :-1] for key in ('segment', 'position') if key in batch}
        return self.ready({'inputs': batch[self.inputs][:, :-1], **extras}, batch)

    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The last T tokens of each row, and the weight of each."""
        tokens = jnp.asarray(batch[self.inputs])[:, 1:]
        if 'segment' not in batch:
            return tokens, true_places(None, batch['mask'], tokens)
        segments = jnp.asarray(batch['segment'])
        continues = jnp.where(segments[:, 1:] == segments[:, :-1], segments[:, 1:], 0)
        return tokens, true_places(continues, batch['mask'], tokens)
