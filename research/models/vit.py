"""Vision Transformer: an image as a row of patches, read by the Transformer's blocks.

Shape letters: B batch, H height, W width, C channels, P positions, D model, K outputs.

    preset         patch   D     layers   heads   parameters (head='token', positions='learned')
    vit_ti16       16      192   12       3        5,717,416   (K = 1000, 224 x 224)
    vit_s16        16      384   12       6       22,050,664   (K = 1000, 224 x 224)
    vit_b16        16      768   12       12      86,567,656   (K = 1000, 224 x 224)
    vit_tiny_28     7       96    6       4          678,730   (K = 10, 28 x 28 x 1)

Dosovitskiy et al. 2021 (arXiv:2010.11929), table 1 (B); Steiner et al. 2021 (arXiv:2106.10270), table 2 (Ti, S). With
positions='sincos2d', head='gap' this is the simplified ViT of Beyer et al. 2022 (arXiv:2205.01580).

ViTS16() on (B, 224, 224, 3): patches (B, 196, 384), with the class token (B, 197, 384), blocks and norm (B, 197, 384), its
first place (B, 384), head (B, K).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.core.errors import UsageError
from research.models import layers, transformer
from research.models.stack import LayerOptions, Stack

# The head is split over its inputs, as the number of classes is seldom a multiple of the devices.
PARTITION_RULES = (('.*head/kernel', ('model', None)), ('.*head/bias', ()), *transformer.PARTITION_RULES)

Grid = tuple[int, int]  # patches in a column, patches in a row


class ViT(nn.Module):
    """Patches with positions, pre-norm blocks, then the class token or the mean, and a dense layer that starts at zero.

    Attributes:
      num_outputs: K, size of the last layer; 0: none, outputs are what it would read, (B, D).
      patch: side of a patch, in pixels.
      width: D.
      depth: blocks.
      heads: heads of attention.
      hidden: units of the feed-forward layers; None: 4 D.
      positions: 'learned' (for one image size, see `resize_positions`) or 'sincos2d', which fit any size.
      head: what the last layer reads: 'token' (a learned class token before the patches) or 'gap' (the mean over patches).
      activation: see `LayerOptions`; the original's is 'gelu'.
      norm_eps: epsilon of the normalisations.
      dropout: rate after the positions and in every block.
      init_std: standard deviation of fresh kernels; None: D^-1/2, that of Glorot & Bengio 2010 for a square kernel. (The 0.02
        of language models is much less where D is small, and such a model learns slowly.)
      scan: compile one block and loop over it.
      remat: what the backward pass computes again, see `Stack`.
      attention: implementation of attention, see `attention.choose`.
    """

    num_outputs: int
    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    hidden: int | None = None
    positions: str = 'learned'
    head: str = 'token'
    activation: str = 'gelu'
    norm_eps: float = 1e-6
    dropout: float = 0.0
    init_std: float | None = None
    scan: bool = False
    remat: str = 'none'
    attention: str = 'auto'

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (B, H, W, C) to outputs (B, K)."""
        layers.check_images(inputs, 'vit')
        layers.check_choice('positions', self.positions, ('learned', 'sincos2d'))
        layers.check_choice('head', self.head, ('token', 'gap'))
        x = layers.patches(inputs, self.patch, self.width)  # (B, H / patch, W / patch, D)
        x = layers.dropout(self.dropout, self._positioned(x), train)  # (B, P, D)
        x = Stack(self._options(), self.depth, self.scan, self.remat, name='stack')(x, train)
        x = x[:, 0] if self.head == 'token' else jnp.mean(x, axis=1)  # (B, D)
        head = nn.Dense(self.num_outputs, kernel_init=nn.initializers.zeros, name='head')
        return head(x) if self.num_outputs else x  # (B, K)

    def _positioned(self, x: jax.Array) -> jax.Array:
        """Patches (B, h, w, D) as a row with positions, behind the class token if there is one, (B, P, D)."""
        batch, height, width, channels = x.shape
        x = x.reshape(batch, -1, channels)  # (B, h * w, D)
        if self.positions == 'sincos2d':
            x = x + sincos2d((height, width), channels).astype(x.dtype)
        if self.head == 'token':
            token = self.param('class_token', nn.initializers.zeros, (1, 1, channels))
            x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, channels)).astype(x.dtype), x], axis=1)
        if self.positions == 'learned':
            init = nn.initializers.normal(channels**-0.5)
            x = x + nn.Embed(x.shape[1], channels, embedding_init=init, name='position')(jnp.arange(x.shape[1]))
        return x

    @nn.nowrap
    def _options(self) -> LayerOptions:
        """The options of one block."""
        return LayerOptions(
            width=self.width,
            heads=self.heads,
            hidden=self.hidden,
            activation=self.activation,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            init_std=self.width**-0.5 if self.init_std is None else self.init_std,
            attention=self.attention,
        )


def sincos2d(grid: Grid, width: int) -> jax.Array:
    """Fixed positions of a grid (h, w) of patches, (h * w, D) float32, D a multiple of 4.

    A quarter of the channels each: sin(f x), cos(f x), sin(f y), cos(f y) with column x, row y and D / 4 frequencies f from 1
    down to 1 / 10000 in a geometric series (Chen et al. 2021, arXiv:2104.02057; MoCo v3).

    Raises:
      UsageError: D is no multiple of 4, or less than 8.
    """
    if width % 4 or width < 8:
        raise UsageError(f"positions='sincos2d' need a width that is a multiple of 4, not {width}", 'try width=64')
    frequencies = np.geomspace(1, 1e-4, width // 4)
    rows, columns = (places.reshape(-1, 1) * frequencies for places in np.indices(grid))  # (h * w, D / 4) each
    table = np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], axis=1)  # (h * w, D)
    return jnp.asarray(table, jnp.float32)


def resize_positions(embedding: jax.Array, old_grid: Grid, new_grid: Grid) -> jax.Array:
    """Learned positions for images of another size, by bilinear interpolation, smoothed where the grid shrinks.

    From 224 x 224 to 384 x 384 with patches of 16: `resize_positions(embedding, (14, 14), (24, 24))`, (197, D) -> (577, D).

    Args:
      embedding: (P, D) or (1, P, D); the patches row by row, behind the class token if there is one, which stays as it is.
      old_grid: patches in a column and in a row of the images that it was learned from.
      new_grid: likewise of the new images.

    Raises:
      UsageError: the embedding does not hold `old_grid` and at most one class token.
    """
    *leading, places, width = embedding.shape
    tokens = places - math.prod(old_grid)
    if tokens not in (0, 1):
        raise UsageError(
            f'{places} positions are no grid of {old_grid[0]} x {old_grid[1]} patches with or without a class token',
            'give the grid that they were learned for: image size / patch size',
        )
    if old_grid == new_grid:
        return embedding
    patches = embedding[..., tokens:, :].reshape(*leading, *old_grid, width)
    resized = jax.image.resize(patches, (*leading, *new_grid, width), 'bilinear')
    return jnp.concatenate([embedding[..., :tokens, :], resized.reshape(*leading, -1, width)], axis=-2)  # (..., P, D)


class ViTTi16(ViT):
    """ViT-Ti/16."""

    width: int = 192
    heads: int = 3


class ViTS16(ViT):
    """ViT-S/16."""


class ViTB16(ViT):
    """ViT-B/16."""

    width: int = 768
    heads: int = 12


class ViTTiny28(ViT):
    """For images of 28 x 28: 16 patches of 7 x 7."""

    patch: int = 7
    width: int = 96
    depth: int = 6
    heads: int = 4
