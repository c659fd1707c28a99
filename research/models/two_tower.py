"""Two towers, one for images and one for texts, whose vectors can be compared: CLIP and SigLIP.

Shape letters: B images, M texts, H height, W width, C channels, T tokens, D features of a tower, E common dimensions.

    TwoTower(num_outputs=64, vocabulary_size=264)  on images (B, 64, 64, 3) and texts (B, 24) of bytes
      image 'vit(patch=8, width=128, depth=4, heads=4)': features (B, 128), times a matrix (128, 64), over their length: (B, 64)
      text 'encoder(pooling="mean", width=128, depth=2, heads=4)': the same
    -> {'image': (B, 64), 'text': (B, 64), 'scale': 14.29, 'bias': 0.0};  1,404,545 parameters

    preset   scale at first     bias at first   source
    clip     1 / 0.07 = 14.29   none            Radford et al. 2021 (arXiv:2103.00020), sections 2.4 and 2.5: at most 100
    siglip   10                 -10             Zhai et al. 2023 (arXiv:2303.15343), section 3.1

A tower is any model of `config.model` that gives its features (B, D) when it is asked for no outputs (num_outputs=0).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core import registry
from research.core.errors import UsageError
from research.models.resnet import PARTITION_RULES as IMAGE_RULES
from research.models.transformer_base import PARTITION_RULES as TEXT_RULES

PARTITION_RULES = (('.*(image|text)_projection/kernel', ()), *TEXT_RULES[:-1], *IMAGE_RULES)
MAX_SCALE = 100.0


class TwoTower(nn.Module):
    """An image tower and a text tower, each followed by a projection to E dimensions and a division by the length.

    Attributes:
      num_outputs: E.
      vocabulary_size: V, size of the input vocabulary.
      image: the image tower, as config.model spells a model.
      text: the text tower.
      initial_scale: what the cosine of two vectors is multiplied by at first; it is learned, and held at 100 where it grows
        beyond.
      initial_bias: what is added to that product at first, learned too; None: nothing is added.
    """

    num_outputs: int
    vocabulary_size: int = 0
    image: str = 'vit(patch=8, width=128, depth=4, heads=4)'
    text: str = 'encoder(pooling="mean", width=128, depth=2, heads=4)'
    initial_scale: float = 1 / 0.07
    initial_bias: float | None = None

    def setup(self):
        """Both towers with their projections, the scale's logarithm, and the bias if there is one."""
        self.image_tower = self._tower('image')
        self.text_tower = self._tower('text')
        self.image_projection = nn.Dense(self.num_outputs, use_bias=False)
        self.text_projection = nn.Dense(self.num_outputs, use_bias=False)
        self.log_scale = self.param('log_scale', lambda _: jnp.log(jnp.float32(self.initial_scale)))
        if self.initial_bias is not None:
            self.bias = self.param('bias', lambda _: jnp.float32(self.initial_bias))

    def __call__(
        self, inputs: jax.Array, train: bool = False, *, texts: jax.Array, segments: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Compares images (B, H, W, C) with texts (M, T) int32 whose segments (M, T) are 0 at padding.

        Returns:
          'image' (B, E) and 'text' (M, E) of length 1, 'scale' () and 'bias' (): scale * image . text + bias are the logits.
        """
        image, text = self.encode_image(inputs, train), self.encode_text(texts, train, segments=segments)
        bias = jnp.zeros(()) if self.initial_bias is None else self.bias
        return {'image': image, 'text': text, 'scale': at_most(jnp.exp(self.log_scale), MAX_SCALE), 'bias': bias}

    def encode_image(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Images (B, H, W, C) as vectors of length 1, (B, E) float32."""
        return unit(self.image_projection(self._features('image', functools.partial(self.image_tower, inputs, train=train))))

    def encode_text(self, texts: jax.Array, train: bool = False, *, segments: jax.Array | None = None) -> jax.Array:
        """Texts (M, T) int32 as vectors of length 1, (M, E) float32."""
        tower = functools.partial(self.text_tower, texts, train=train, segments=segments)
        return unit(self.text_projection(self._features('text', tower)))

    @nn.nowrap
    def _tower(self, which: str) -> nn.Module:
        tower = registry.component('model', getattr(self, which), f'config.model.{which}')
        return registry.call(tower.bound(), num_outputs=0, vocabulary_size=self.vocabulary_size)

    @nn.nowrap
    def _features(self, which: str, tower: Callable[[], jax.Array]) -> jax.Array:
        """What the tower gives, if it is one vector for each example."""
        try:
            features = tower()
        except ZeroDivisionError:  # flax, of a dense layer with no outputs
            features = jnp.zeros((1, 0))
        if features.ndim != 2 or not features.shape[1]:
            raise UsageError(
                f'config.model.{which}={getattr(self, which)!r} gives {features.shape}, not features (batch, D)',
                "take a model that gives its features for num_outputs=0, such as vit, or an encoder with pooling='mean'",
            )
        return features


class CLIP(TwoTower):
    """Two towers for the task contrastive(loss='clip')."""


class SigLIP(TwoTower):
    """Two towers for the task contrastive(loss='siglip')."""

    initial_scale: float = 10.0
    initial_bias: float | None = -10.0


def unit(x: jax.Array) -> jax.Array:
    """x (B, E) over its length, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


@jax.custom_vjp
def at_most(x: jax.Array, limit: float) -> jax.Array:
    """min(x, limit), with a gradient also beyond the limit where following it would bring x back."""
    return jnp.minimum(x, limit)


def _at_most_forward(x: jax.Array, limit: float) -> tuple[jax.Array, Any]:
    return jnp.minimum(x, limit), x >= limit


def _at_most_backward(beyond: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    return jnp.where(beyond & (gradient < 0), 0.0, gradient), None


at_most.defvjp(_at_most_forward, _at_most_backward)
