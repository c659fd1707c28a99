"""Sequence to sequence: a target text from a source text, by an encoder and a decoder.

Shape letters: B batch, S source length, T target length, L most generated tokens, V vocabulary.

    task = Seq2Seq(model=EncoderDecoder, data=spec, metrics=('perplexity', 'accuracy', 'bleu'))
    batch: 'source' and 'source_segment' (B, S), 'target' and 'target_segment' (B, T + 1): bos, tokens, eos, padding

Training is teacher forced: for the target `bos c a t eos` the decoder reads `bos c a t` and predicts `c a t eos`, four targets.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.core.errors import UsageError
from research.data.token_table import ending
from research.tasks.base import Batch, Variables
from research.tasks.bleu import BROKEN, NOTHING, Bleu
from research.tasks.chunked import Scores
from research.tasks.decoding import beam_search
from research.tasks.states import Metric
from research.tasks.tokens import TokenTask, true_places


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Seq2Seq(TokenTask):
    """Predicts the target's tokens; with the metric 'bleu' every evaluation also generates texts by beam search.

    Attributes:
      inputs: the key of the batch that holds the source (B, S); its padding is under the same key with '_segment'.
      target: the key that holds the target (B, T + 1), likewise.
      label_smoothing: see `TokenTask`; 0.1 in Vaswani et al. 2017, section 5.4.
      beams: hypotheses that the beam search keeps, >= 1; 1 is greedy (4 in Vaswani et al. 2017, section 6.1).
      length_penalty: see `decoding.beam_search` (0.6 there).
      max_length: L, the most tokens to generate; None: T of the longest targets.
      bleu_words: how sacrebleu splits text into words, see `bleu.Bleu`; 'zh' for Chinese.
      metrics: names of metrics: 'perplexity', 'accuracy', 'bits_per_byte', 'bleu'.

    Raises:
      UsageError: what 'bleu' needs is missing: an ending token, or a model that generates.
    """

    inputs: str = 'source'
    target: str = 'target'
    label_smoothing: float = 0.1
    beams: int = 4
    length_penalty: float = 0.6
    max_length: int | None = None
    bleu_words: str = '13a'
    metrics: tuple[str, ...] | dict[str, Metric] = ('perplexity', 'accuracy')

    def __post_init__(self):
        super().__post_init__()
        if self.beams < 1:
            raise UsageError(f'beams is {self.beams}, below 1', 'try beams=4, or 1 for greedy')
        if self.max_length is not None and self.max_length < 1:
            raise UsageError(f'max_length is {self.max_length}, below 1', 'leave it out: as long as the targets')
        if self.generates:
            self._check_generation()

    @property
    def keys(self) -> tuple[str, ...]:
        """Source and target, and where they are no padding."""
        return (self.inputs, f'{self.inputs}_segment', self.target, f'{self.target}_segment')

    @property
    def generates(self) -> bool:
        """Whether a metric needs generated texts."""
        return isinstance(self.metrics, dict) and any(isinstance(metric, Bleu) for metric in self.metrics.values())

    def metric_table(self) -> dict[str, Callable[[int, str], Metric]]:
        """As `TokenTask.metric_table`, and 'bleu'."""
        return {**super().metric_table(), 'bleu': lambda v, inputs: Bleu(self.tokenizer, self.bleu_words)}

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """The source and the first T tokens of the target, each with its padding."""
        arguments = {
            'inputs': batch[self.inputs],
            'segments': batch[f'{self.inputs}_segment'],
            'targets': batch[self.target][:, :-1],
            'target_segments': batch[f'{self.target}_segment'][:, :-1],
        }
        return self.ready(arguments, batch)

    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The last T tokens of each target, and the weight of each."""
        tokens = jnp.asarray(batch[self.target])[:, 1:]
        return tokens, true_places(batch[f'{self.target}_segment'][:, 1:], batch['mask'], tokens)

    def predict(self, variables: Variables, batch: Batch) -> Scores:
        """As `TokenTask.predict`; for 'bleu' also 'hypothesis' (B, L), `NOTHING` behind the last token."""
        outputs = super().predict(variables, batch)
        if not self.generates:
            return outputs
        broken = jnp.any(jnp.isnan(outputs['nats']) & (outputs['weight'] > 0), axis=1, keepdims=True)  # (B, 1)
        return {**outputs, 'hypothesis': jnp.where(broken, BROKEN, self.generate(variables, batch))}

    def generate(self, variables: Variables, batch: Batch) -> jax.Array:
        """The best hypothesis for each source, (B, L) int32, without its ending token; `NOTHING` behind the last token."""
        arguments, ready = self.arguments(batch), self.ready_variables(variables)
        first = arguments['targets'][:, 0]
        # Not the batch's own length: in padding buckets it would tell how long the reference is.
        length = self.data.examples[self.target][0][0] - 1 if self.max_length is None else self.max_length
        (end,) = ending(self.tokenizer)
        module: Any = self.module
        cache = module.init_cache(len(first), length, self.dtype)
        cache = module.apply(ready, arguments['inputs'], cache, segments=arguments['segments'], method='encode')
        hypotheses, _ = beam_search(
            lambda tokens, cache: module.apply(ready, tokens, cache, method='decode'),
            first,
            cache,
            beams=self.beams,
            length=length,
            eos=end,
            length_penalty=self.length_penalty,
        )
        best = hypotheses[:, 0]  # (B, L)
        return jnp.where(jnp.cumsum(best == end, axis=1) > 0, NOTHING, best)

    def _check_generation(self) -> None:
        """Refuses a tokenizer or a model that cannot generate."""
        if not ending(self.tokenizer):
            raise UsageError("metric 'bleu' needs a token that ends a text", 'take a tokenizer with eos or sep')
        lacking = [name for name in ('init_cache', 'encode', 'decode') if not hasattr(self.module, name)]
        if lacking:
            raise UsageError(
                f"metric 'bleu' needs a model that generates, and {type(self.module).__name__} has no {', '.join(lacking)}",
                "take model='encoder_decoder', or leave 'bleu' out of task.metrics",
            )
