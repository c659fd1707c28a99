"""A multilayer perceptron over anything that can be flattened, and over the columns of a table.

Shape letters: B batch, F flattened features, G columns of categories, E width of an embedding, K outputs.
`MLP(hidden=(64,))` on (B, 8, 8, 1) with 10 outputs has 64 * 64 + 64 + 64 * 10 + 10 = 4,810 parameters; with `missing` it reads
every feature's indicator too, 64 * 64 more.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.models import layers
from research.models.columns import CategoryTokens, check_columns, filled

# Tensor parallelism over hidden units.
PARTITION_RULES = (('.*Dense_[0-9]+/kernel', (None, 'model')), ('.*Dense_[0-9]+/bias', ('model',)), ('.*', ()))


class MLP(nn.Module):
    """Dense layers with activation and dropout.

    Attributes:
      num_outputs: K, size of the last layer; 0: none, outputs are what it would read.
      hidden: widths of the hidden layers.
      activation: 'relu', 'gelu', 'silu' or 'tanh'.
      dropout: rate of dropout after each hidden layer.
      missing: whether features (B, F) may be NaN, for missing: they are read as 0 beside an indicator of each feature.
      cardinalities: for each column of categories how many codes there are.
      embedding: E, width of the embedding of a category.
    """

    num_outputs: int
    hidden: tuple[int, ...] = (64,)
    activation: str = 'relu'
    dropout: float = 0.0
    missing: bool = False
    cardinalities: tuple[int, ...] = ()
    embedding: int = 8

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False, *, categories: jax.Array | None = None) -> jax.Array:
        """Maps inputs (B, ...), and categories (B, G) int32 where there are any, to outputs (B, K)."""
        x = inputs.reshape(inputs.shape[0], -1)  # (B, F)
        if self.missing:
            x = filled(x)  # (B, 2F)
        if self.cardinalities or categories is not None:
            check_columns(inputs, categories, self.cardinalities)
        if categories is not None:
            embedded = CategoryTokens(self.cardinalities, self.embedding, name='category')(categories)  # (B, G, E)
            x = jnp.concatenate([x, embedded.reshape(x.shape[0], -1)], axis=1)  # (B, F + GE)
        for width in self.hidden:
            x = layers.activation(self.activation)(nn.Dense(width)(x))
            x = layers.dropout(self.dropout, x, train)
        return nn.Dense(self.num_outputs)(x) if self.num_outputs else x
