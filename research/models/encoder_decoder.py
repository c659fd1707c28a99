"""The Transformer with an encoder and a decoder (Vaswani et al., 2017), for sequence pairs.

Shape letters: B batch, S source length, T target length, n new tokens, C cache length, D model, P positions, V vocabulary,
L depth, G key and value heads, K head size.

    EncoderDecoder(num_outputs=256, depth=2, width=64, heads=4)
        on source (2, 12) and targets (2, 7)  ->  logits (2, 7, 256) of the token after each target

Source and target share one vocabulary and one embedding, `embed/embedding` (V, D); the blocks are `encoder/...` and
`decoder/...` with the leaves of stack.py; learned positions are `position/embedding` and `target_position/embedding` (P, D).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core.errors import UsageError
from research.models.stack import empty_cache
from research.models.transformer_base import PARTITION_RULES as PARTITION_RULES
from research.models.transformer_base import Transformer, embedded


class EncoderDecoder(Transformer):
    """Source (B, S) and target (B, T) tokens -> logits (B, T, V) of the next target token.

    To generate: `init_cache`, then `encode` the source once, then `decode` token by token.

    Attributes:
      depth: L of the encoder.
      decoder_depth: L of the decoder; None: as the encoder.
    """

    decoder_depth: int | None = None

    def setup(self):
        """Embedding, positions, blocks and head."""
        self.embed = self.make_embed(self.num_outputs)
        if self.positions == 'learned':
            self.position, self.target_position = self.make_embed(self.max_length), self.make_embed(self.max_length)
        self.drop = nn.Dropout(self.dropout)
        self.encoder = self.make_stack(self.depth)
        self.decoder = self.make_stack(self.depth_of_decoder, causal=True, cross=True)
        if not self.tied:
            init = nn.initializers.normal(self.init_std)
            self.projection = nn.Dense(self.num_outputs, use_bias=False, kernel_init=init, name='head')

    def __call__(
        self,
        inputs: jax.Array,
        train: bool = False,
        *,
        targets: jax.Array | None = None,
        segments: jax.Array | None = None,
        target_segments: jax.Array | None = None,
    ) -> jax.Array:
        """Logits (B, T, V).

        Args:
          inputs: (B, S) int32, the source.
          train: whether dropout is active.
          targets: (B, T) int32, the target shifted by one: it begins with a token that begins every target.
          segments: (B, S) int32 in {0, 1}, 0 for padding of the source.
          target_segments: (B, T) int32 in {0, 1}, likewise of the target.
        """
        return self.head(self.features(inputs, train, targets=targets, segments=segments, target_segments=target_segments))

    def features(
        self,
        inputs: jax.Array,
        train: bool = False,
        *,
        targets: jax.Array | None = None,
        segments: jax.Array | None = None,
        target_segments: jax.Array | None = None,
    ) -> jax.Array:
        """What `head` reads, (B, T, D); the arguments of `__call__`."""
        if targets is None:
            raise UsageError('an encoder-decoder needs targets', "use a task on sequence pairs, task.name='seq2seq'")
        memory = self._encoded(inputs, segments, train)  # (B, S, D)
        x = self.drop(embedded(self, targets, table='target_position'), deterministic=not train)  # (B, T, D)
        return self.decoder(x, train, segments=target_segments, memory=memory, memory_segments=segments)

    def head(self, features: jax.Array) -> jax.Array:
        """Logits (..., V) of features (..., D)."""
        return self.embed.attend(features) if self.tied else self.projection(features)

    @property
    def depth_of_decoder(self) -> int:
        """L of the decoder."""
        return self.depth if self.decoder_depth is None else self.decoder_depth

    @nn.nowrap
    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> dict[str, Any]:
        """A cache for targets of up to `length` C tokens, as that of `Decoder.init_cache`; `encode` is next."""
        self.check_length(length)
        empty = empty_cache(self.layer_options(causal=True, cross=True), self.depth_of_decoder, batch, length, dtype)
        return {'layers': empty, 'length': jnp.zeros(batch, jnp.int32)}

    def encode(self, inputs: jax.Array, cache: dict[str, Any], *, segments: jax.Array | None = None) -> dict[str, Any]:
        """The cache with what the decoder needs of the source `inputs` (B, S): its keys and values in every layer.

        They are 'memory_key' and 'memory_value' (L, B, S, G, K) in 'layers', and 'memory_segments' (B, S).
        """
        segments = jnp.ones(inputs.shape, jnp.int32) if segments is None else segments
        remembered = self.decoder.remember(self._encoded(inputs, segments, False), cache['layers'])
        return {'layers': remembered, 'length': cache['length'], 'memory_segments': segments}

    def decode(
        self, tokens: jax.Array, cache: dict[str, Any], lengths: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Reads n more target tokens (B, n) of each row; see `Decoder.decode`. The cache has been through `encode`."""
        if 'memory_segments' not in cache:
            raise UsageError('the cache holds no source', 'call encode(inputs, cache) before decode')
        slots = cache['length'][:, None] + jnp.arange(tokens.shape[1])  # (B, n)
        x = embedded(self, tokens, slots, 'target_position')  # (B, n, D)
        x, layer_cache = self.decoder.decode(x, cache['layers'], slots, cache['memory_segments'])
        grown = cache['length'] + (tokens.shape[1] if lengths is None else lengths)
        return self.head(x), {**cache, 'layers': layer_cache, 'length': grown}

    def _encoded(self, inputs: jax.Array, segments: jax.Array | None, train: bool) -> jax.Array:
        """The memory (B, S, D)."""
        return self.encoder(self.drop(embedded(self, inputs), deterministic=not train), train, segments=segments)
