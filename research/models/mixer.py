"""MLP-Mixer: dense layers over patches in turn with dense layers over channels, without attention or convolutions.

Shape letters: B batch, H height, W width, C channels, T patches, D model, F hidden, K outputs.

    preset       layers   D     hidden over T   hidden over D   parameters (K = 1000, 224 x 224)
    mixer_s16     8       512   256             2048            18,528,264
    mixer_b16    12       768   384             3072            59,880,472

Tolstikhin et al. 2021 (arXiv:2105.01601), table 1. Its parameters fit one image size only. MixerS16() on (B, 224, 224, 3):
patches (B, 196, 512), eight times x + over_patches(x), x + over_channels(x), mean (B, 512), head (B, K).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.models import layers

PARTITION_RULES = (
    ('.*up/kernel', (None, 'model')),
    ('.*up/bias', ('model',)),
    ('.*(down|head)/kernel', ('model', None)),
    ('.*', ()),
)


class Mixer(nn.Module):
    """Patches, mixing layers, normalisation, mean over the patches, dense layer that starts at zero.

    Attributes:
      num_outputs: K, size of the last layer.
      patch: side of a patch, in pixels.
      width: D, channels of every patch.
      depth: mixing layers.
      patch_hidden: hidden units of the dense layers over patches.
      channel_hidden: hidden units of those over channels.
      dropout: rate after every pair of dense layers.
    """

    num_outputs: int
    patch: int = 4
    width: int = 64
    depth: int = 4
    patch_hidden: int = 64
    channel_hidden: int = 256
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (B, H, W, C) to outputs (B, K)."""
        layers.check_images(inputs, 'mixer')
        x = layers.patches(inputs, self.patch, self.width)
        x = x.reshape(x.shape[0], -1, self.width)  # (B, T, D)
        for index in range(self.depth):
            x = MixerLayer(self.patch_hidden, self.channel_hidden, self.dropout, name=f'layers_{index}')(x, train)
        x = nn.LayerNorm(name='final_norm')(x)
        head = nn.Dense(self.num_outputs, kernel_init=nn.initializers.zeros, name='head')
        return head(jnp.mean(x, axis=1))  # (B, K)


class MixerLayer(nn.Module):
    """Mixes the patches of each channel, then the channels of each patch, each after normalisation and beside a shortcut."""

    patch_hidden: int
    channel_hidden: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (B, T, D) to (B, T, D)."""
        y = nn.LayerNorm(name='patch_norm')(x).swapaxes(1, 2)  # (B, D, T)
        y = TwoLayers(self.patch_hidden, name='over_patches')(y).swapaxes(1, 2)  # (B, T, D)
        x = x + layers.dropout(self.dropout, y, train)
        y = TwoLayers(self.channel_hidden, name='over_channels')(nn.LayerNorm(name='channel_norm')(x))
        return x + layers.dropout(self.dropout, y, train)


class TwoLayers(nn.Module):
    """Dense layer, GELU, dense layer back to the size of the input."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., D) to (..., D)."""
        return nn.Dense(x.shape[-1], name='down')(nn.gelu(nn.Dense(self.hidden, name='up')(x)))


class MixerS16(Mixer):
    """Mixer-S/16."""

    patch: int = 16
    width: int = 512
    depth: int = 8
    patch_hidden: int = 256
    channel_hidden: int = 2048


class MixerB16(MixerS16):
    """Mixer-B/16."""

    width: int = 768
    depth: int = 12
    patch_hidden: int = 384
    channel_hidden: int = 3072
