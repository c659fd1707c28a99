"""Acted Dutch speech with transcripts: the dialogues of two fish in the puzzle game Fish Fillets, 1,526 utterances, 1.5 hours.

From Debian's packages fillets-ng-data (transcripts) and fillets-ng-data-nl (Ogg Vorbis, 22,050 Hz stereo), GPL-2+, 103 MB,
which `python -m bench.data fetch speech_nl` unpacks without installing them. Reading needs the Python package soundfile.

Shape letters: n utterances, N samples of the longest.

    speech_nl(max_seconds=5.0).splits['all'][np.array([0])]
    # {'audio': int16 (1, 40000), 'audio_length': int32 [15520], 'text': ['wat is dit voor raar schip']}

Channels are averaged, and the rate is changed by a polyphase filter that removes what the new rate cannot hold. A second of
silence ends most recordings and is cut; what is left lasts 1.1 h, half of the utterances 1.8 to 3.2 s, the longest 12.6 s, at
17 characters a second. 1,448 utterances, 0.99 h, are no longer than 5 s. Transcripts are plain words as in speech
recognition: lower case, and no punctuation but apostrophes. The hash of an utterance is that of its transcript, so the same
sentence spoken twice (1,501 are different) stays in one split.
"""

import concurrent.futures
import functools
import importlib
import math
import pathlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.core.errors import UsageError
from research.core.files import data_folder
from research.data.bad_records import DAMAGE, reading, reason_of
from research.data.source import Block, DataSet, key_of

GAME = pathlib.Path('usr/share/games/fillets-ng')
SPEAKERS = {'m': 'small fish', 'v': 'big fish'}  # by the second part of a file's name
TARGETS = ('text', 'speaker')
QUOTED = r'"((?:[^"\\]|\\.)*)"'
LINE = re.compile(rf'dialogId\({QUOTED},\s*"[^"]*",\s*{QUOTED}\)\s*dialogStr\({QUOTED}\)')  # id, English, Dutch


def speech_nl(
    *,
    dir: str | None = None,  # noqa: A002  the config's word
    sample_rate: int = 8000,
    max_seconds: float = 5.0,
    trim: bool = True,
    target: str = 'text',
) -> DataSet:
    """The utterances in one split 'all': 'audio' int16 (N,) padded with zeros, 'audio_length' int32, and what is asked for.

    Args:
      dir: where the two packages are unpacked ('/' if they are installed); None: where `bench.data` puts them.
      sample_rate: of the audio, in Hz.
      max_seconds: longer utterances are left out; N is this long.
      trim: cut the silence behind an utterance, see `without_last_silence`.
      target: 'text' for the transcript, a str, or 'speaker' for 'label' int32, one of the two fish; the few utterances of
        others are then left out.

    Raises:
      UsageError: the packages are not there, soundfile is not installed, or an argument is out of range.
    """
    if target not in TARGETS:
        raise UsageError(f'speech_nl(target={target!r}) is unknown', f'choose one of {", ".join(TARGETS)}')
    if sample_rate < 1000 or not max_seconds > 0:
        raise UsageError(f'speech_nl(sample_rate={sample_rate}, max_seconds={max_seconds})', 'give Hz and seconds')
    root = (data_folder() / 'deb' if dir is None else pathlib.Path(dir).expanduser()) / GAME
    spoken = [(file, text) for file, text in find_spoken(root) if target == 'text' or speaker_of(file) in SPEAKERS]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # the decoder runs outside Python's lock
        audio = list(pool.map(functools.partial(read_audio, sample_rate=sample_rate), [file for file, _ in spoken]))
    audio = [without_last_silence(samples, sample_rate) for samples in audio] if trim else audio
    limit = round(max_seconds * sample_rate)
    kept = [index for index, samples in enumerate(audio) if 0 < len(samples) <= limit]
    if not kept:
        raise UsageError(f'no utterance is as short as max_seconds={max_seconds}', 'half of them have 1.8 to 3.2 s')
    text, label, names = np.array([spoken[i][1] for i in kept], object), None, list(SPEAKERS)
    if target == 'speaker':
        label = np.array([names.index(speaker_of(spoken[i][0])) for i in kept], np.int32)
    source = Utterances([audio[i] for i in kept], limit, text, label)
    return DataSet('speech_nl', {'all': source}, None if label is None else tuple(SPEAKERS.values()))


class Utterances:
    """Audio of different lengths in memory, padded when it is read; with a transcript or a class."""

    def __init__(self, audio: Sequence[np.ndarray], limit: int, text: np.ndarray, label: np.ndarray | None):
        self.audio, self.limit = list(audio), limit
        self._text, self._label = text, label

    def __len__(self) -> int:
        return len(self.audio)

    def __getitem__(self, indices: np.ndarray) -> Block:
        indices = np.asarray(indices)
        padded = np.zeros((len(indices), self.limit), np.int16)  # (B, N)
        for row, index in zip(padded, indices, strict=True):
            row[: len(self.audio[index])] = self.audio[index]
        lengths = np.array([len(self.audio[index]) for index in indices], np.int32)
        target = {'text': self._text[indices]} if self._label is None else {'label': self._label[indices]}
        return {'audio': padded, 'audio_length': lengths, **target}

    def keys(self) -> np.ndarray:
        """A hash of each transcript, (n,) uint64."""
        return np.array([key_of(text) for text in self._text], np.uint64)

    def labels(self) -> np.ndarray | None:
        """The speakers, (n,); None where the target is the text."""
        return self._label


def find_spoken(root: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """The recordings that have a transcript, with it, in the order of their names.

    Raises:
      UsageError: there are no recordings.
    """
    files = sorted(root.glob('sound/*/nl/*.ogg'))
    if not files:
        raise UsageError(f'there is no Dutch speech in {root}', 'python -m bench.data fetch speech_nl')
    transcripts = read_transcripts(root)
    spoken = [(file, transcripts.get((file.parts[-3], file.stem), '')) for file in files]
    return [(file, text) for file, text in spoken if text]


def read_transcripts(root: pathlib.Path) -> dict[tuple[str, str], str]:
    """The Dutch words of each (level, name of the utterance)."""
    found = {}
    for file in root.glob('script/*/dialogs_nl.lua'):
        with reading(file, 'python -m bench.data fetch speech_nl'):
            script = file.read_text(encoding='utf-8')
        for name, _, dutch in LINE.findall(script):
            found[file.parts[-2], name] = plain_words(re.sub(r'\\(.)', r'\1', dutch))
    return found


def plain_words(text: str) -> str:
    """Text in lower case with single spaces, and of punctuation only apostrophes inside words."""
    text = unicodedata.normalize('NFC', text).lower().replace('’', "'")
    text = re.sub(r"[^\w']|_", ' ', text)
    return ' '.join(word for word in (word.strip("'") for word in text.split()) if word)


def speaker_of(file: pathlib.Path) -> str:
    """Who speaks: 'm' or 'v' for the two fish, else ''."""
    parts = file.stem.split('-')
    return parts[1] if len(parts) > 2 and parts[1] in SPEAKERS else ''


def read_audio(file: pathlib.Path, sample_rate: int) -> np.ndarray:
    """The samples of a sound file, its channels averaged, at `sample_rate`: (N,) int16.

    Raises:
      UsageError: soundfile is not installed, or cannot read the file.
    """
    soundfile = _import_soundfile()
    from scipy.signal import resample_poly

    try:
        samples, rate = soundfile.read(file, dtype='float32', always_2d=True)  # (N, channels)
    except DAMAGE as error:  # among them soundfile's own
        raise UsageError(
            f'{file} cannot be read: {reason_of(error)}', 'fetch it again: python -m bench.data fetch speech_nl'
        ) from error
    common = math.gcd(rate, sample_rate)
    mono = samples.mean(axis=1)  # (N,)
    changed = mono if rate == sample_rate or not len(mono) else resample_poly(mono, sample_rate // common, rate // common)
    return np.clip(np.rint(changed * 32768), -32768, 32767).astype(np.int16)


def without_last_silence(samples: np.ndarray, sample_rate: int, decibels: float = 35.0, margin: float = 0.1) -> np.ndarray:
    """The samples (N,) up to `margin` seconds behind the last 10 ms that are within `decibels` of the loudest 10 ms."""
    size = sample_rate // 100
    blocks = samples[: len(samples) // size * size].reshape(-1, size).astype(np.float64)  # (blocks, size)
    if not len(blocks):
        return samples
    power = np.square(blocks).mean(axis=1)
    last = np.flatnonzero(power >= power.max() * 10 ** (-decibels / 10))[-1]
    return samples[: (last + 1) * size + round(margin * sample_rate)]


def _import_soundfile() -> Any:
    try:
        return importlib.import_module('soundfile')
    except ImportError as error:
        raise UsageError('reading speech needs the package soundfile', 'pip install soundfile') from error
