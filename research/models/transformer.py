"""The Transformer (Vaswani et al., 2017) over tokens: decoder and encoder; both together are in encoder_decoder.py.

Shape letters: B batch, T length, n new tokens, S cache length, D model, P positions, V vocabulary, K outputs, L depth,
G key and value heads, K head size.

    Decoder(num_outputs=256, depth=2, width=64, heads=4)  on tokens (2, 10) int32  ->  logits (2, 10, 256)
    Encoder(num_outputs=3, vocabulary_size=256, pooling='mean')  on tokens (2, 10) ->  outputs (2, 3)

Named sizes are in presets.py. The layers are those of stack.py, and so are the names of their leaves; around them stand
`embed/embedding` (V, D), `position/embedding` (P, D) if positions are learned, and `head/kernel` (D, V) if it is not tied.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core.errors import UsageError
from research.models import layers, lowering
from research.models.stack import empty_cache
from research.models.transformer_base import PARTITION_RULES as PARTITION_RULES
from research.models.transformer_base import Transformer, embedded


class Decoder(Transformer):
    """A causal language model: tokens (B, T) int32 -> logits of the next token (B, T, V).

    `init_cache` and `decode` read a text token by token: `decode` with all n tokens of the prompt, then with n = 1.
    """

    def setup(self):
        """Embedding, positions, blocks and head."""
        self.embed = self.make_embed(self.num_outputs)
        if self.positions == 'learned':
            self.position = self.make_embed(self.max_length)
        self.drop = nn.Dropout(self.dropout)
        self.stack = self.make_stack(self.depth, causal=True)
        if not self.tied:
            init = nn.initializers.normal(self.init_std)
            self.projection = nn.Dense(self.num_outputs, use_bias=False, kernel_init=init, name='head')

    def __call__(
        self,
        inputs: jax.Array,
        train: bool = False,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Logits (B, T, V) of tokens `inputs` (B, T).

        Args:
          inputs: token ids.
          train: whether dropout is active.
          segments: (B, T) int32, number of the document in a packed row, 0 for padding; documents do not see each other.
          positions: (B, T) int32, position in the document; None: 0..T-1.
        """
        return self.head(self.features(inputs, train, segments=segments, positions=positions))

    def features(
        self,
        inputs: jax.Array,
        train: bool = False,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """What `head` reads, (B, T, D); the arguments of `__call__`."""
        x = self.drop(embedded(self, inputs, positions), deterministic=not train)
        return self.stack(x, train, segments=segments, positions=positions)

    def head(self, features: jax.Array) -> jax.Array:
        """Logits (..., V) of features (..., D)."""
        return lowering.materialised(self.embed.attend(features) if self.tied else self.projection(features))

    @nn.nowrap
    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> dict[str, Any]:
        """An empty cache for texts of up to S tokens: 'layers', of 'key' and 'value' (L, B, S, G, K), and 'length' (B,)."""
        self.check_length(length)
        empty = empty_cache(self.layer_options(causal=True), self.depth, batch, length, dtype)
        return {'layers': empty, 'length': jnp.zeros(batch, jnp.int32)}

    def decode(
        self, tokens: jax.Array, cache: dict[str, Any], lengths: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Reads n more tokens of each text: logits (B, n, V), and the cache with them.

        Args:
          tokens: (B, n) int32; rows that are shorter are padded on the right.
          cache: from `init_cache` or an earlier call. Its length must suffice: tokens beyond it are lost.
          lengths: (B,) int32, how many of the n tokens are real; None: all.
        """
        slots = cache['length'][:, None] + jnp.arange(tokens.shape[1])  # (B, n)
        x, layer_cache = self.stack.decode(embedded(self, tokens, slots), cache['layers'], slots)
        grown = cache['length'] + (tokens.shape[1] if lengths is None else lengths)
        return self.head(x), {'layers': layer_cache, 'length': grown}


class MaskedHead(nn.Module):
    """Logits (..., V) of features (..., D) as in BERT (Devlin et al., 2019): dense, activation, norm, embedding, bias."""

    num_outputs: int
    activation: str
    norm: str
    norm_eps: float
    init_std: float

    @nn.compact
    def __call__(self, features: jax.Array, embedding: jax.Array | None) -> jax.Array:
        """`embedding` (V, D) if the output is tied to it, else None."""
        width, init = features.shape[-1], nn.initializers.normal(self.init_std)
        x = layers.activation(self.activation)(nn.Dense(width, kernel_init=init, name='transform')(features))
        x = layers.make_norm(self.norm, self.norm_eps, name='norm')(x)
        kernel = self.param('kernel', init, (width, self.num_outputs)) if embedding is None else embedding.T  # (D, V)
        return x @ kernel + self.param('bias', nn.initializers.zeros, (self.num_outputs,))


class Encoder(Transformer):
    """A bidirectional Transformer: tokens (B, T) int32 -> outputs (B, K), or (B, T, K) for each token.

    Attributes:
      num_outputs: K; 0: no head, the pooled features are the outputs.
      vocabulary_size: V, size of the input vocabulary.
      pooling: 'none', 'first' (the first token through a dense layer and tanh, as BERT) or 'mean' (over the tokens).
      segment_types: how many kinds of text a token can belong to (BERT's sentences A and B); 0: they are not told apart.
      embed_norm: whether the embedding is normalised.
      mask_head: whether the head is BERT's for masked tokens, see `MaskedHead`; `tied` has a meaning only for it.
    """

    vocabulary_size: int = 0
    pooling: str = 'none'
    segment_types: int = 0
    embed_norm: bool = False
    mask_head: bool = False

    @property
    def is_causal(self) -> bool:
        """A token sees those behind it."""
        return False

    def setup(self):
        """Embedding, positions, blocks, pooler and head."""
        self._check()
        init = nn.initializers.normal(self.init_std)
        self.embed = self.make_embed(self.vocabulary_size)
        if self.positions == 'learned':
            self.position = self.make_embed(self.max_length)
        if self.segment_types:
            self.segment_type = self.make_embed(self.segment_types)
        if self.embed_norm:
            self.embedding_norm = layers.make_norm(self.norm, self.norm_eps, 'embed_norm', self.bias)
        self.drop = nn.Dropout(self.dropout)
        self.stack = self.make_stack(self.depth)
        if self.pooling == 'first':
            self.pooler = nn.Dense(self.width, kernel_init=init)
        if self.mask_head:
            self.masked = MaskedHead(self.num_outputs, self.activation, self.norm, self.norm_eps, self.init_std, name='head')
        elif self.num_outputs:
            self.projection = nn.Dense(self.num_outputs, kernel_init=init, name='head')

    def __call__(
        self,
        inputs: jax.Array,
        train: bool = False,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        types: jax.Array | None = None,
    ) -> jax.Array:
        """Outputs (B, K), or (B, T, K) without pooling, of tokens `inputs` (B, T).

        Args:
          inputs: token ids.
          train: whether dropout is active.
          segments: (B, T) int32, 0 for padding; tokens of different segments do not see each other.
          positions: (B, T) int32; None: 0..T-1.
          types: (B, T) int32, which of the `segment_types` a token belongs to; None: all to 0.
        """
        features = self.features(inputs, train, segments=segments, positions=positions, types=types)
        return self.head(self.drop(self.pool(features, segments), deterministic=not train))

    def features(
        self,
        inputs: jax.Array,
        train: bool = False,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        types: jax.Array | None = None,
    ) -> jax.Array:
        """One vector for each token, (B, T, D); the arguments of `__call__`."""
        x = embedded(self, inputs, positions)  # (B, T, D)
        if self.segment_types:
            x = x + self.segment_type(jnp.zeros_like(inputs) if types is None else types)
        x = self.embedding_norm(x) if self.embed_norm else x
        return self.stack(self.drop(x, deterministic=not train), train, segments=segments, positions=positions)

    def pool(self, features: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """One vector (B, D) for each row of features (B, T, D) with segments (B, T); without pooling, the features."""
        if self.pooling == 'first':
            return jnp.tanh(self.pooler(features[:, 0]))  # (B, D)
        if self.pooling == 'mean':
            return layers.masked_mean(features, segments)  # (B, D)
        return features

    def head(self, features: jax.Array) -> jax.Array:
        """Outputs (..., K) of features (..., D)."""
        if self.mask_head:
            return self.masked(features, self.embed.embedding if self.tied else None)
        return self.projection(features) if self.num_outputs else features

    def _check(self) -> None:
        layers.check_choice('pooling', self.pooling, ('none', 'first', 'mean'))
        if self.vocabulary_size < 1:
            raise UsageError(f'an encoder has vocabulary_size={self.vocabulary_size}', 'give data with a tokenizer')
        if self.mask_head and self.tied and self.num_outputs != self.vocabulary_size:
            raise UsageError(
                f'a tied head cannot give {self.num_outputs} outputs for a vocabulary of {self.vocabulary_size}',
                'set model.mask_head=False, or model.tied=False',
            )
