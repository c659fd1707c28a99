"""Speech recognition by connectionist temporal classification (CTC): Graves et al. 2006.

Shape letters: B batch, N samples, T steps of the network, U tokens of a transcript, V vocabulary.

    task = CTC(model=AudioEncoder, data=spec, metrics=('wer', 'cer'))
    batch: 'audio' (B, N), 'audio_length' (B,), and from the transform `pad`: 'tokens' and 'segment' (B, U)

The network has V + 1 outputs at each step: the tokens with their own ids, and the blank, whose id is V (so no tokenizer needs
to know of it). A path of tokens and blanks stands for the transcript that is left when repetitions are merged and blanks
dropped, `a a _ a b b` for `a a b`; the loss is -log of the summed probability of all paths that stand for the true one.

A transcript needs a step for each token and one more between equal neighbours. Where an utterance has fewer steps no path
exists: it is left out of the loss, and the term 'alignable' tells the share of utterances that are not. It is not left out
of the error rates.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.core.errors import UsageError
from research.core.terms import Terms, weighted
from research.data.source import Tokenizer
from research.tasks.base import Batch, Keys, ModuleTask, Variables, check_keys
from research.tasks.edit_distance import BROKEN, NOTHING, UNITS, ErrorRate
from research.tasks.losses import unmasked
from research.tasks.metrics import make
from research.tasks.states import Metric
from research.tasks.tokens import check_rows, tokenizer_of


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CTC(ModuleTask):
    """Transcribes audio. The loss is in nats per true token: the weight of an utterance is its number of tokens.

    The module gives logits (B, T, V + 1), and `output_lengths(lengths)` tells how many of the T steps are true.

    Attributes:
      inputs: the key of the batch that holds the audio (B, N); its lengths (B,) are under the same key with '_length'.
      labels: the key that holds the transcripts' tokens (B, U), padded on the right where 'segment' (B, U) is 0.
      metrics: names of metrics: 'wer' and 'cer', of the most probable path.

    Raises:
      UsageError: the data have no tokenizer or not these keys, or the model does not tell its output lengths.
    """

    inputs: str = 'audio'
    labels: str = 'tokens'
    metrics: tuple[str, ...] | dict[str, Metric] = ('wer', 'cer')

    def __post_init__(self):
        table = {name: lambda k, labels, name=name: ErrorRate(name, self.tokenizer, labels) for name in UNITS}
        check_keys(self.data, (self.inputs, f'{self.inputs}_length', self.labels, 'segment'))
        check_rows(self.data, (self.labels,))
        if not hasattr(self.module, 'output_lengths'):
            raise UsageError(
                f'task ctc needs a model with output_lengths(), and {type(self.module).__name__} has none',
                "take an encoder of audio, config.model='audio_encoder'",
            )
        object.__setattr__(self, 'metrics', make(self.metrics, table, self.num_outputs, self.labels))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data."""
        return tokenizer_of(self.data, 'ctc')

    @property
    def blank(self) -> int:
        """The id of the blank, V."""
        return self.tokenizer.vocabulary_size

    @property
    def num_outputs(self) -> int:
        """V + 1: tokens and blank."""
        return self.blank + 1

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """The audio, in its own type whatever the module computes in (bfloat16 would be heard), and its lengths."""
        lengths = unmasked(batch[f'{self.inputs}_length'], batch['mask'])
        return {'inputs': unmasked(batch[self.inputs], batch['mask']), 'lengths': lengths}

    def loss(self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool) -> tuple[Terms, dict[str, Any]]:
        """'loss' in nats per true token and 'alignable', the share of utterances with a path; and the new model state."""
        logits, state = self.logits(variables, batch, rngs, train)
        steps, mask = self.steps(batch), batch['mask']
        tokens, true = unmasked(batch[self.labels], mask), unmasked(batch['segment'], mask) > 0  # (B, U)
        beyond = jnp.arange(logits.shape[1]) >= steps[:, None]  # (B, T)
        cost = optax.ctc_loss(logits, beyond.astype(jnp.float32), tokens, (~true).astype(jnp.float32), blank_id=self.blank)
        alignable = steps_needed(tokens, true) <= steps  # (B,)
        weight = mask * alignable
        loss = weighted(cost, weight)[0], weighted(true.sum(axis=1), weight)[0]
        return {'loss': loss, 'alignable': weighted(alignable, mask)}, state

    def predict(self, variables: Variables, batch: Batch) -> jax.Array:
        """The recognised tokens (B, T) int32 of each utterance, `NOTHING` behind the last."""
        logits, _ = self.logits(variables, batch, None, train=False)
        return best_path(logits, self.steps(batch), self.blank)

    def logits(self, variables: Variables, batch: Batch, rngs: Keys | None, train: bool) -> tuple[jax.Array, dict[str, Any]]:
        """Float32 logits (B, T, V + 1), zero in masked rows, and the new model state."""
        logits, state = self.apply(variables, batch, rngs, train)
        if logits.ndim != 3 or logits.shape[-1] != self.num_outputs:
            raise UsageError(
                f'the model gives outputs of shape {logits.shape}, not (batch, time, {self.num_outputs})',
                "set model.pooling='none', and let its last layer have num_outputs units",
            )
        return unmasked(logits, batch['mask']), state

    def steps(self, batch: Batch) -> jax.Array:
        """How many steps of the module belong to each utterance, (B,) int32."""
        return self.module.output_lengths(self.arguments(batch)['lengths'])


def steps_needed(tokens: jax.Array, true: jax.Array) -> jax.Array:
    """The fewest steps (B,) of a path for `tokens` (B, U): one for each `true` (B, U) one, and between equal neighbours."""
    repeated = (tokens[:, 1:] == tokens[:, :-1]) & true[:, 1:]
    return true.sum(axis=1) + repeated.sum(axis=1)


def best_path(logits: jax.Array, steps: jax.Array, blank: int) -> jax.Array:
    """What the most probable path stands for: tokens (B, T) int32, `NOTHING` behind the last (Graves et al. 2006, section 3.2).

    Args:
      logits: (B, T, V + 1). A NaN at a true step makes the whole row `BROKEN`.
      steps: (B,) int, how many of the T steps are true.
      blank: its id.
    """
    batch, time, _ = logits.shape
    best = jnp.argmax(logits, axis=-1)  # (B, T)
    inside = jnp.arange(time) < steps[:, None]
    before = jnp.pad(best, ((0, 0), (1, 0)), constant_values=blank)[:, :-1]
    keep = (best != blank) & (best != before) & inside
    places = jnp.where(keep, jnp.cumsum(keep, axis=1) - 1, time)  # (B, T): one that is not kept goes beyond the end
    rows = jnp.arange(batch)[:, None]
    tokens = jnp.full((batch, time), NOTHING, jnp.int32).at[rows, places].set(best.astype(jnp.int32), mode='drop')
    broken = (jnp.isnan(logits).any(axis=-1) & inside).any(axis=1)  # (B,)
    return jnp.where(broken[:, None], BROKEN, tokens)
