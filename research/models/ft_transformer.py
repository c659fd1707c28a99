"""FT-Transformer: a Transformer over the columns of a table.

Shape letters: B batch, F columns of numbers, G columns of categories, D model, K outputs.

    FTTransformer(num_outputs=2, cardinalities=(3, 5)) on numbers (B, 9) and categories (B, 2): tokens (B, 1 + 9 + 2, 192),
    3 blocks, the class token (B, 192), outputs (B, 2).

    size                                  layers   D     heads   hidden   parameters (F = 9, no categories, K = 2)
    FTTransformer(), the paper's default  3        192   8       256      897,602
    FTTransformer(width=32, hidden=64)    3        32    8       64       32,994

Gorishniy et al. 2021, "Revisiting deep learning models for tabular data" (arXiv:2106.11959), section 3.3, sizes from its table
of default configurations. What differs: a missing number has a learned vector of its own for each column; dropout and fresh
kernels are those of `Stack` (dropout after attention and feed-forward, not on attention weights and hidden units; standard
deviation 0.02); the gate is GELU's (`activation='reglu'` is the paper's); and the first block has a norm.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.models import layers
from research.models.columns import CategoryTokens, NumericTokens, check_columns, spread
from research.models.stack import LayerOptions, Stack

PARTITION_RULES = (
    ('.*(query|key|value)/kernel', (None, 'model', None)),
    ('.*(query|key|value)/bias', ('model', None)),
    ('.*out/kernel', ('model', None, None)),
    ('.*(up|gate)/kernel', (None, 'model')),
    ('.*(up|gate)/bias', ('model',)),
    ('.*down/kernel', ('model', None)),
    ('.*', ()),
)


class FTTransformer(nn.Module):
    """Columns as tokens, a class token, pre-norm blocks, and a head on the class token.

    Attributes:
      num_outputs: K, size of the last layer; 0: none, outputs are what it would read, (B, D).
      cardinalities: for each column of categories how many codes there are.
      depth: number of blocks.
      width: D.
      heads: attention heads.
      hidden: width of the feed-forward layers.
      activation: as in `LayerOptions`; the paper's is 'reglu'.
      dropout: rate after attention and feed-forward.
      attention: see `attention.choose`.
    """

    num_outputs: int
    cardinalities: tuple[int, ...] = ()
    depth: int = 3
    width: int = 192
    heads: int = 8
    hidden: int = 256
    activation: str = 'geglu'
    dropout: float = 0.1
    attention: str = 'auto'

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False, *, categories: jax.Array | None = None) -> jax.Array:
        """Outputs (B, K) of numbers `inputs` (B, F) and `categories` (B, G) int32; NaN is a missing number, 0 a category."""
        check_columns(inputs, categories, self.cardinalities)
        start = self.param('class_token', spread(self.width), (1, 1, self.width))
        tokens = [jnp.broadcast_to(start, (inputs.shape[0], 1, self.width))]
        if inputs.shape[1]:
            tokens.append(NumericTokens(self.width, name='numeric')(inputs))
        if categories is not None:
            tokens.append(CategoryTokens(self.cardinalities, self.width, name='category')(categories))
        x = jnp.concatenate(tokens, axis=1)  # (B, 1 + F + G, D)
        x = Stack(self._options(), self.depth, name='stack')(x, train)[:, 0]  # (B, D)
        x = layers.activation('relu')(x)
        return nn.Dense(self.num_outputs, name='head')(x) if self.num_outputs else x

    @nn.nowrap
    def _options(self) -> LayerOptions:
        same = ('width', 'heads', 'hidden', 'activation', 'dropout', 'attention')
        return LayerOptions(**{name: getattr(self, name) for name in same})
