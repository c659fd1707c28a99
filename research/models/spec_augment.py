"""SpecAugment (Park et al. 2019, section 2): bands of frequency and stretches of time are hidden from the network.

Shape letters: B batch, T frames, M mels.

    augment = SpecAugment(frequency_masks=2, frequency_width=10, time_masks=2, time_width=40, time_share=0.2)
    augment(key, features, lengths)                       # (B, T, M): what is hidden is 0, the mean of normalised features

The width of each mask is uniform over 0 ... its greatest width, and its place uniform where it fits. A stretch of time is at
most `time_share` of its utterance long (section 2: p tau) and lies inside the utterance's true length. The paper's time warp,
which it found to matter least, is left out.

It stands inside the model, between the features and the first layer, because there the features exist: batches carry raw audio,
and the log-mel front end runs on the device. So its randomness is that of dropout: f(seed, step), and with it the place of an
example in its batch, not the example's id as for augmentations of images.
"""

import dataclasses

import jax
import jax.numpy as jnp

from research.core.errors import UsageError


@dataclasses.dataclass(frozen=True)
class SpecAugment:
    """Masks over normalised features.

    Attributes:
      frequency_masks: how many bands are hidden.
      frequency_width: the greatest width of a band, F, in mels.
      time_masks: how many stretches of time are hidden.
      time_width: the greatest length of a stretch, T, in frames.
      time_share: the greatest share of an utterance that one stretch covers, p.

    Raises:
      UsageError: a value out of range.
    """

    frequency_masks: int = 2
    frequency_width: int = 10
    time_masks: int = 2
    time_width: int = 40
    time_share: float = 0.2

    def __post_init__(self):
        counts = (self.frequency_masks, self.frequency_width, self.time_masks, self.time_width)
        if min(counts) < 0 or not 0 <= self.time_share <= 1:
            raise UsageError(f'{self} has a negative number, or a share outside [0, 1]', 'give counts and widths >= 0')

    def __call__(self, key: jax.Array, features: jax.Array, lengths: jax.Array) -> jax.Array:
        """Features (B, T, M) with masks of 0, drawn for each of the B rows; `lengths` (B,) frames are real."""
        batch, time, mels = features.shape
        along_time, along_mels = jax.random.split(key)
        limits = jnp.minimum(self.time_width, jnp.floor(self.time_share * lengths).astype(jnp.int32))  # (B,)
        hidden = draw_bands(along_time, self.time_masks, time, limits, lengths)[:, :, None]  # (B, T, 1)
        width = jnp.full(batch, min(self.frequency_width, mels))
        hidden |= draw_bands(along_mels, self.frequency_masks, mels, width, jnp.full(batch, mels))[:, None]  # (B, T, M)
        return jnp.where(hidden, 0, features)


def draw_bands(key: jax.Array, count: int, size: int, widths: jax.Array, ends: jax.Array) -> jax.Array:
    """Where one of `count` random bands lies on an axis of `size`, (B, size) bool.

    Args:
      key: one random key.
      count: bands of each row.
      size: length of the axis.
      widths: (B,) int, the greatest width of a band of each row.
      ends: (B,) int, how much of the axis is real.
    """
    draws = jax.random.uniform(key, (2, len(widths), count))
    width = jnp.floor(draws[0] * (widths[:, None] + 1))  # (B, count): uniform over 0 ... the greatest
    start = jnp.floor(draws[1] * (ends[:, None] - width + 1))
    places = jnp.arange(size)
    inside = (places >= start[..., None]) & (places < (start + width)[..., None])  # (B, count, size)
    return inside.any(axis=1)
