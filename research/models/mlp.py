"""A multilayer perceptron over anything that can be flattened.

Shape letters: B batch, F flattened features, K outputs. `MLP(hidden=(64,))` on (B, 8, 8, 1) with 10 outputs has
64 * 64 + 64 + 64 * 10 + 10 = 4,810 parameters.
"""

import jax
from flax import linen as nn

from research.models import layers


class MLP(nn.Module):
    """Dense layers with activation and dropout.

    Attributes:
      num_outputs: K, size of the last layer.
      hidden: widths of the hidden layers.
      activation: 'relu', 'gelu', 'silu' or 'tanh'.
      dropout: rate of dropout after each hidden layer.
    """

    num_outputs: int
    hidden: tuple[int, ...] = (64,)
    activation: str = 'relu'
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Maps inputs (B, ...) to outputs (B, K)."""
        x = inputs.reshape(inputs.shape[0], -1)  # (B, F)
        for width in self.hidden:
            x = layers.activation(self.activation)(nn.Dense(width)(x))
            x = layers.dropout(self.dropout, x, train)
        return nn.Dense(self.num_outputs)(x)
