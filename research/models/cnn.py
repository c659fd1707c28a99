"""A plain convolutional network: convolutions with pooling, then dense layers.

Shape letters: B batch, H height, W width, C channels, K outputs.

    size                                        parameters
    CNN() on 32x32x3, 10 outputs                122,570       the CNN of TensorFlow's CIFAR-10 tutorial
    CNN(padding='SAME', hidden=(128,)) on 28x28x1, 10 outputs     458,570

The default on (B, 32, 32, 3): conv 32 -> (B, 30, 30, 32), pool -> (B, 15, 15, 32), conv 64 -> (B, 13, 13, 64), pool ->
(B, 6, 6, 64), conv 64 -> (B, 4, 4, 64), flatten -> (B, 1024), dense 64 -> (B, 64), dense -> (B, 10).
"""

import jax
from flax import linen as nn

from research.core.errors import UsageError
from research.models import layers

# Tensor parallelism over output channels and hidden units.
PARTITION_RULES = (
    ('.*Conv_[0-9]+/kernel', (None, None, None, 'model')),
    ('.*Dense_[0-9]+/kernel', (None, 'model')),
    ('.*(Conv|Dense)_[0-9]+/bias', ('model',)),
    ('.*', ()),
)


class CNN(nn.Module):
    """Convolutions with max pooling, normalisation and activation, in this order, then dense layers with dropout.

    Pooled first there is less to normalise and to activate. Without normalisation an activation that never falls gives the same
    as before the pooling.

    Attributes:
      num_outputs: K, size of the last layer.
      features: channels of each convolution.
      kernel: side of every convolution kernel, in pixels.
      pool: side of the max pooling after each convolution; 1: none.
      padding: 'VALID' or 'SAME', of all convolutions or one for each.
      hidden: widths of the dense layers before the last.
      norm: 'none', or by 'batch', 'group' or 'rms', after each pooling (`layers.norm`).
      activation: 'relu', 'gelu', 'silu' or 'tanh'.
      dropout: rate of dropout before every dense layer.
    """

    num_outputs: int
    features: tuple[int, ...] = (32, 64, 64)
    kernel: int = 3
    pool: tuple[int, ...] = (2, 2, 1)
    padding: str | tuple[str, ...] = 'VALID'
    hidden: tuple[int, ...] = (64,)
    norm: str = 'none'
    activation: str = 'relu'
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (B, H, W, C) to outputs (B, K)."""
        if len(self.features) != len(self.pool):
            raise UsageError(
                f'model.features={self.features} and model.pool={self.pool} differ in length', 'give one pool size a layer'
            )
        if inputs.ndim != 4:
            raise UsageError(f"model 'cnn' reads images (B, H, W, C), not {inputs.shape}", 'use model=mlp for tables')
        act, x = layers.activation(self.activation), inputs
        paddings = (self.padding,) * len(self.features) if isinstance(self.padding, str) else self.padding
        if len(self.features) != len(paddings):
            raise UsageError(
                f'model.features={self.features} and model.padding={paddings} differ in length',
                'give one padding a layer, or one',
            )
        for features, pool, padding in zip(self.features, self.pool, paddings, strict=True):
            layers.check_choice('padding', padding, ('VALID', 'SAME'))
            if padding == 'VALID':
                if min(x.shape[1:3]) < self.kernel:
                    raise UsageError(
                        f'an image of {x.shape[1]} x {x.shape[2]} is too small for a convolution', "set model.padding='SAME'"
                    )
                x = layers.cropped(x, self.kernel, pool)
            has_own_bias = self.norm in ('batch', 'group')
            x = layers.conv(features, (self.kernel, self.kernel), padding=padding, use_bias=not has_own_bias)(x)
            x = act(layers.norm(self.norm, layers.max_pool(x, pool), train))
        x = x.reshape(x.shape[0], -1)  # (B, H*W*C)
        for width in self.hidden:
            x = act(nn.Dense(width)(layers.dropout(self.dropout, x, train)))
        x = layers.dropout(self.dropout, x, train)
        return nn.Dense(self.num_outputs)(x)
