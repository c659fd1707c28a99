"""An encoder of audio: log-mel features, strided convolutions, and a Transformer or a bidirectional recurrent network.

Shape letters: B batch, N samples, T frames (one every 10 ms), U steps (with strides (2, 2) one every 40 ms), M mels,
C channels, D width, K outputs.

    AudioEncoder(30)                                         on 16 kHz audio        1,920,030 parameters
    AudioEncoder(30, body='rnn', width=256, depth=3)         on 16 kHz audio        1,123,870 parameters

The way of two seconds at 16 kHz: (B, 32000) -> features (B, 198, 40) -> convolutions (B, 99, C) -> (B, 50, C) -> body
(B, 50, D) -> outputs (B, 50, K), or (B, K) with `pooling='mean'`. Each mel is normalised to mean 0 and variance 1 over the true
frames of its utterance; frames beyond an utterance's length are zero before every convolution and unseen by the body, and no
layer mixes utterances, so padding never influences. Convolutions pad k // 2 frames on either side whatever the length, so with
a stride of 2 output t always stands for the frames around 2 t.

A step must be short against what it is to tell apart: CTC on characters spoken at 17 a second needs 20 ms, strides (2, 1).

With `pooling='none'` and one output for each token and blank this is a network for CTC (task `ctc`): it needs
`output_lengths`, the true steps of each utterance. The Transformer's positions are rotary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core.errors import UsageError
from research.models import layers, rnn, transformer_base
from research.models.log_mel import LogMel
from research.models.recurrent import CELLS, RecurrentStack
from research.models.spec_augment import SpecAugment
from research.models.stack import LayerOptions, Stack

BODIES = ('transformer', 'rnn')
POOLINGS = ('none', 'mean')
PARTITION_RULES = (*rnn.PARTITION_RULES[:-1], *transformer_base.PARTITION_RULES)


class AudioEncoder(nn.Module):
    """Maps audio to outputs for each step or for each utterance.

    Attributes:
      num_outputs: K; 0: no head, the outputs are the features.
      sample_rate: of the audio, in Hz.
      mels: M, bands of the features.
      scale: 'htk' or 'slaney', see `log_mel`.
      body: 'transformer' or 'rnn' (bidirectional, each direction D / 2 wide).
      width: D.
      depth: layers of the body.
      heads: of a Transformer.
      cell: 'gru' or 'lstm', of a recurrent body.
      channels: C, of the convolutions; None: D. A Transformer needs C = D.
      strides: of the convolutions, of which there are as many.
      kernel: frames that a convolution sees; odd.
      dropout: rate before the body and inside it: variational dropout on the outputs of recurrent layers.
      recurrent_dropout: rate of variational dropout inside recurrent layers.
      frequency_masks, frequency_width, time_masks, time_width, time_share: SpecAugment in training, see `spec_augment`.
      pooling: 'none' for outputs (B, U, K), 'mean' over true steps for (B, K).
    """

    num_outputs: int
    sample_rate: int = 16000
    mels: int = 40
    scale: str = 'htk'
    body: str = 'transformer'
    width: int = 192
    depth: int = 4
    heads: int = 4
    cell: str = 'gru'
    channels: int | None = None
    strides: tuple[int, ...] = (2, 2)
    kernel: int = 3
    dropout: float = 0.1
    recurrent_dropout: float = 0.0
    frequency_masks: int = 2
    frequency_width: int = 10
    time_masks: int = 2
    time_width: int = 40
    time_share: float = 0.2
    pooling: str = 'none'

    def __call__(self, inputs: jax.Array, train: bool = False, *, lengths: jax.Array | None = None) -> jax.Array:
        """Maps audio to outputs (B, U, K), or (B, K) if pooled; see `features`."""
        return self.head(self.features(inputs, train, lengths=lengths))

    def features(self, inputs: jax.Array, train: bool = False, *, lengths: jax.Array | None = None) -> jax.Array:
        """What `head` reads, (B, U, D), or (B, D) if pooled.

        Args:
          inputs: audio (B, N), int16, or floats within +-1.
          train: whether to mask and to drop out.
          lengths: (B,) int32, how many samples of each row are audio; None: all.
        """
        if inputs.ndim != 2:
            raise UsageError(f"model 'audio_encoder' reads audio (B, N), not {inputs.shape}", 'give one channel')
        lengths = jnp.full(inputs.shape[:1], inputs.shape[1]) if lengths is None else lengths
        x = self.convolve(self.listen(inputs, lengths, train), self.front_end.frame_lengths(lengths))  # (B, U, C)
        segments = (jnp.arange(x.shape[1]) < self.output_lengths(lengths)[:, None]).astype(jnp.int32)  # (B, U)
        x = self.contextualise(x, segments, train)
        return layers.masked_mean(x, segments) if self.pooling == 'mean' else x  # (B, D) or (B, U, D)

    def setup(self):
        """Convolutions and body."""
        self._check()
        channels, half = self.channels or self.width, self.kernel // 2
        as_kernel: Any = _as_kernel
        self.convolutions = [
            layers.conv(channels, (self.kernel,), strides=stride, padding=[(half, half)], promote_dtype=as_kernel)
            for stride in self.strides
        ]
        self.norm = layers.make_norm('layer', 1e-5)
        self.drop = nn.Dropout(self.dropout)
        if self.body == 'transformer':
            options = LayerOptions(width=self.width, heads=self.heads, rotary=True, dropout=self.dropout)
            self.stack: Any = Stack(options, self.depth)
        else:
            self.stack = RecurrentStack(
                cell=self.cell,
                hidden=(self.width // 2,) * self.depth,
                bidirectional=True,
                recurrent_dropout=self.recurrent_dropout,
                output_dropout=self.dropout,
            )

    @property
    def front_end(self) -> LogMel:
        """The features."""
        return LogMel(sample_rate=self.sample_rate, mels=self.mels, scale=self.scale)

    @nn.nowrap
    def output_lengths(self, lengths: jax.Array) -> jax.Array:
        """The true steps (B,) of audio with `lengths` (B,) true samples."""
        return functools.reduce(_strided, self.strides, self.front_end.frame_lengths(lengths))

    @nn.nowrap
    def listen(self, audio: jax.Array, lengths: jax.Array, train: bool) -> jax.Array:
        """Normalised features (B, T, M) float32, masked in training, zero beyond the true frames."""
        frames = self.front_end.frame_lengths(lengths)  # (B,)
        x = normalise(self.front_end(audio), frames)
        if train and (self.frequency_masks or self.time_masks):
            augment = SpecAugment(self.frequency_masks, self.frequency_width, self.time_masks, self.time_width, self.time_share)
            x = augment(self.make_rng('dropout'), x, frames)
        return x

    @nn.nowrap
    def convolve(self, x: jax.Array, frames: jax.Array) -> jax.Array:
        """Maps features (B, T, M) with `frames` (B,) true ones to (B, U, C)."""
        for convolution, stride in zip(self.convolutions, self.strides, strict=True):
            x = nn.relu(convolution(_within(x, frames)))
            frames = _strided(frames, stride)
        return self.norm(x)

    @nn.nowrap
    def contextualise(self, x: jax.Array, segments: jax.Array, train: bool) -> jax.Array:
        """Maps x (B, U, C) to (B, U, D) that know their surroundings; `segments` (B, U) is 0 beyond the true steps, else 1."""
        x = self.drop(x, deterministic=not train)
        if self.body == 'rnn':
            return self.stack(x, train, segments)[0]
        return self.stack(x, train, segments=segments)

    @nn.compact
    def head(self, features: jax.Array) -> jax.Array:
        """Maps features (..., D) to outputs (..., K)."""
        return nn.Dense(self.num_outputs, name='head')(features) if self.num_outputs else features

    @nn.nowrap
    def _check(self) -> None:
        """Refuses fields that do not fit."""
        for field, known in (('body', BODIES), ('pooling', POOLINGS), ('cell', CELLS)):
            layers.check_choice(f'model.{field}', getattr(self, field), known)
        if self.kernel % 2 == 0 or self.width % 2:
            raise UsageError(f'model.kernel={self.kernel}, model.width={self.width}', 'the kernel must be odd, the width even')
        if min(self.strides, default=0) < 1:
            raise UsageError(f'model.strides={self.strides}', 'give the stride of each convolution, e.g. (2, 2)')
        if self.body == 'transformer' and self.channels not in (None, self.width):
            raise UsageError(
                f'model.channels={self.channels} is not model.width={self.width}', "leave it out, or set model.body='rnn'"
            )


def normalise(features: jax.Array, frames: jax.Array) -> jax.Array:
    """Features (B, T, M) with mean 0 and variance 1 for each mel over the `frames` (B,) true ones; 0 beyond them."""
    inside = (jnp.arange(features.shape[1]) < frames[:, None])[..., None]  # (B, T, 1)
    count = jnp.maximum(frames, 1)[:, None, None]
    mean = jnp.sum(features, axis=1, where=inside, keepdims=True) / count  # (B, 1, M)
    centred = jnp.where(inside, features - mean, 0)
    variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / count
    return centred * jax.lax.rsqrt(variance + 1e-5)


def _as_kernel(inputs: jax.Array, kernel: jax.Array, bias: jax.Array, **_: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes in the type of the parameters: features are float32 whatever that is."""
    return inputs.astype(kernel.dtype), kernel, bias


def _strided(lengths: jax.Array, stride: int) -> jax.Array:
    """The lengths behind a convolution of this stride."""
    return -(-lengths // stride)


def _within(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """x (B, T, D) with zeros beyond `lengths` (B,)."""
    return jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[..., None], x, 0)
