"""Log-mel features: the logarithm of the power that a signal has in bands which widen with frequency, as hearing does.

Shape letters: B batch, N samples, T frames, W samples of one frame, M mels, R bins of the discrete Fourier transform.

    front_end = LogMel(sample_rate=8000)              # frames of 25 ms = 200 samples, one every 10 ms = 80 samples
    front_end(audio)                                  # (B, 16000) int16 -> (B, 198, 40) float32: 1 + (16000 - 200) // 80 = 198
    front_end.frame_lengths(jnp.array([16000, 100]))  # [198, 0]

A frame lies wholly inside the signal (nothing is mirrored or padded at its ends), so what follows a signal's true end changes
no frame before it. Each is multiplied by a periodic Hann window and zero-padded to the next power of two; the squared
magnitudes of its Fourier transform are weighed by triangles, and the natural logarithm is taken, of `floor` where there is less
power.

The triangles' corners are equally spaced in mels: HTK's 2595 log10(1 + f / 700) with triangles of height 1 (O'Shaughnessy 1987,
p. 150), or Slaney's scale, linear to 1000 Hz and logarithmic above, with triangles of equal area, 2 / width in Hz (Slaney
1998, "Auditory toolbox"; librosa's and Whisper's choice). 1000 Hz are 1000.0 mels of the first and 15 of the second.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import UsageError, nearest

SCALES = ('htk', 'slaney')
BREAK, HERTZ_PER_MEL, STEP = 1000.0, 200 / 3, np.log(6.4) / 27  # Slaney's scale: above the break 27 mels are a factor 6.4


@dataclasses.dataclass(frozen=True)
class LogMel:
    """The features of a signal, and how many of its frames are real.

    Attributes:
      sample_rate: samples in a second.
      mels: M.
      frame: length of a frame in seconds.
      hop: from the beginning of one frame to that of the next, in seconds.
      low: where the first triangle begins, in Hz.
      high: where the last ends, in Hz; None: half the sample rate.
      scale: 'htk' or 'slaney'.
      floor: the least power that is told apart; int16 and +-1.0 are full scale alike.

    Raises:
      UsageError: values that do not fit.
    """

    sample_rate: int = 16000
    mels: int = 40
    frame: float = 0.025
    hop: float = 0.01
    low: float = 20.0
    high: float | None = None
    scale: str = 'htk'
    floor: float = 1e-10

    def __post_init__(self):
        if self.scale not in SCALES:
            raise UsageError(f'scale is {self.scale!r}', nearest(self.scale, SCALES))
        if min(self.frame_samples, self.hop_samples) < 1:
            raise UsageError(
                f'frame={self.frame} and hop={self.hop} seconds are no sample at {self.sample_rate} Hz', 'give both in seconds'
            )
        if not 0 <= self.low < self.highest <= self.sample_rate / 2:
            raise UsageError(
                f'the band from low={self.low} to high={self.high} Hz is not inside 0 to {self.sample_rate / 2:g} Hz',
                'give low < high, at most half the sample rate',
            )
        if not self.floor > 0:
            raise UsageError(f'floor is {self.floor}', 'give a positive power, such as 1e-10')
        empty = np.flatnonzero(self.filters.sum(axis=0) == 0)
        if len(empty):
            raise UsageError(
                f'{len(empty)} of {self.mels} mels hold no bin of the Fourier transform, the first is mel {empty[0]}',
                'lower mels, or lengthen the frame',
            )

    @property
    def frame_samples(self) -> int:
        """W."""
        return round(self.frame * self.sample_rate)

    @property
    def hop_samples(self) -> int:
        """Samples from one frame to the next."""
        return round(self.hop * self.sample_rate)

    @property
    def transform_samples(self) -> int:
        """Length of the Fourier transform: W up to the next power of two. It has R = half of it + 1 bins."""
        return 1 << (self.frame_samples - 1).bit_length()

    @property
    def highest(self) -> float:
        """Where the last triangle ends, in Hz."""
        return self.sample_rate / 2 if self.high is None else self.high

    @functools.cached_property
    def filters(self) -> np.ndarray:
        """The weight of each bin in each mel, (R, M) float32."""
        bins = np.fft.rfftfreq(self.transform_samples, 1 / self.sample_rate)  # (R,) in Hz
        first, last = to_mel(np.array([self.low, self.highest]), self.scale)
        corners = from_mel(np.linspace(first, last, self.mels + 2), self.scale)  # (M + 2,) in Hz
        rising = (bins[:, None] - corners[:-2]) / np.diff(corners)[:-1]  # (R, M)
        falling = (corners[2:] - bins[:, None]) / np.diff(corners)[1:]
        heights = 2 / (corners[2:] - corners[:-2]) if self.scale == 'slaney' else 1.0
        return (np.maximum(0, np.minimum(rising, falling)) * heights).astype(np.float32)

    def frame_lengths(self, lengths: jax.Array) -> jax.Array:
        """How many frames lie inside the first `lengths` (B,) samples, (B,)."""
        return jnp.maximum(0, 1 + (lengths - self.frame_samples) // self.hop_samples)

    def __call__(self, audio: jax.Array) -> jax.Array:
        """Features (B, T, M) float32 of audio (B, N): int16, or floats within +-1."""
        if jnp.issubdtype(audio.dtype, jnp.integer):
            audio = audio.astype(jnp.float32) / -float(jnp.iinfo(audio.dtype).min)
        frames = self._frames(audio.astype(jnp.float32)) * _hann(self.frame_samples)  # (B, T, W)
        spectrum = jnp.fft.rfft(frames, self.transform_samples)  # (B, T, R)
        power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
        return jnp.log(jnp.maximum(power @ self.filters, self.floor))  # (B, T, M)

    def _frames(self, audio: jax.Array) -> jax.Array:
        """The frames (B, T, W) of audio (B, N)."""
        count = max(0, 1 + (audio.shape[1] - self.frame_samples) // self.hop_samples)
        if not count:
            raise UsageError(f'{audio.shape[1]} samples are less than a frame of {self.frame_samples}', 'give longer audio')
        starts = np.arange(count) * self.hop_samples
        return audio[:, starts[:, None] + np.arange(self.frame_samples)]  # (B, T, W)


def to_mel(hertz: np.ndarray, scale: str) -> np.ndarray:
    """Frequencies in mels."""
    if scale == 'htk':
        return 2595 * np.log10(1 + hertz / 700)
    above = BREAK / HERTZ_PER_MEL + np.log(np.maximum(hertz, BREAK) / BREAK) / STEP
    return np.where(hertz < BREAK, hertz / HERTZ_PER_MEL, above)


def from_mel(mels: np.ndarray, scale: str) -> np.ndarray:
    """Mels as frequencies in Hz."""
    if scale == 'htk':
        return 700 * (10 ** (mels / 2595) - 1)
    above = BREAK * np.exp(STEP * (mels - BREAK / HERTZ_PER_MEL))
    return np.where(mels < BREAK / HERTZ_PER_MEL, mels * HERTZ_PER_MEL, above)


def _hann(length: int) -> np.ndarray:
    """The periodic Hann window, (length,) float32."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)
