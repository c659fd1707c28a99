"""Dutch speech from a folder laid out as the two packages are, made here; and the real one where it has been fetched."""

import sys

import numpy as np
import pytest

from research.core import files
from research.core.errors import UsageError
from research.data import splits
from research.data.sources.speech_nl import GAME, plain_words, read_audio, speech_nl, without_last_silence

soundfile = pytest.importorskip('soundfile')
RATE = 22050

SCRIPT = """
dialogId("let-m-divna", "font_small", "What kind of \\"strange\\" ship is that?")
dialogStr("Wat is dit voor \\"raar\\" schip?")


dialogId("let-v-vrak", "font_big", "This is the wreck.")
dialogStr("Dat is het wrak...")

dialogId("let-m-oko", "font_small", "Wreck!")
dialogStr("Dat is het wrak!")
dialogId("hoofd", "font_big", "A head.")
dialogStr("'t Is 'n hoofd.")
dialogId("let-v-leeg", "font_big", "...")
dialogStr("...")
"""


def tone(hertz, seconds, rate=RATE):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


@pytest.fixture
def folder(tmp_path):
    """Six recordings; one has no transcript, one an empty one."""
    game = tmp_path / GAME
    (game / 'script' / 'wrak').mkdir(parents=True)
    (game / 'script' / 'wrak' / 'dialogs_nl.lua').write_text(SCRIPT, encoding='utf-8')
    (game / 'sound' / 'wrak' / 'nl').mkdir(parents=True)
    lengths = {'let-m-divna': 0.5, 'let-v-vrak': 0.8, 'let-m-oko': 1.2, 'hoofd': 0.6, 'let-v-leeg': 0.4, 'let-m-zonder': 0.4}
    for index, (name, seconds) in enumerate(lengths.items()):
        sound = np.concatenate([tone(300 + 100 * index, seconds), np.zeros(RATE // 2)])
        soundfile.write(game / 'sound' / 'wrak' / 'nl' / f'{name}.ogg', np.stack([sound, 0 * sound], 1), RATE)
    return str(tmp_path)


def everything(source):
    return source[np.arange(len(source))]


def test_utterances_with_their_words(folder):
    data = speech_nl(dir=folder, max_seconds=2.0)
    block = everything(data.splits['all'])
    assert (data.name, data.class_names) == ('speech_nl', None)
    assert block['text'].tolist() == ['t is n hoofd', 'wat is dit voor raar schip', 'dat is het wrak', 'dat is het wrak']
    assert (block['audio'].dtype, block['audio'].shape) == (np.int16, (4, 16000))
    np.testing.assert_allclose(block['audio_length'], np.array([0.7, 0.6, 1.3, 0.9]) * 8000, atol=160)  # 0.1 s behind the sound
    for audio, length, hertz in zip(block['audio'], block['audio_length'], (600, 300, 500, 400), strict=True):
        assert not audio[length:].any()
        heard = audio[:4000].astype(float)
        assert np.abs(np.fft.rfft(heard)).argmax() * 2 == hertz  # half a second: bins of 2 Hz
        np.testing.assert_allclose(heard[400:3600].std(), 32768 * 0.25 / np.sqrt(2), rtol=0.05)  # one of two channels


def test_blocks_are_read_in_any_order(folder):
    source = speech_nl(dir=folder).splits['all']
    whole, part = everything(source), source[np.array([2, 0])]
    for name, column in part.items():
        np.testing.assert_array_equal(column, whole[name][[2, 0]])


def test_longer_utterances_are_left_out_and_silence_can_stay(folder):
    assert len(speech_nl(dir=folder, max_seconds=1.0).splits['all']) == 3
    with_silence = speech_nl(dir=folder, trim=False, max_seconds=2.0).splits['all']
    np.testing.assert_allclose(everything(with_silence)['audio_length'], np.array([1.1, 1.0, 1.7, 1.3]) * 8000, atol=2)


def test_the_same_words_stay_in_one_split(folder):
    data = speech_nl(dir=folder)
    keys = data.splits['all'].keys()
    assert keys[2] == keys[3]
    assert len(set(keys.tolist())) == 3
    assert len(set(splits.uniform(keys, 1).tolist())) == 3


def test_speakers_as_classes(folder):
    data = speech_nl(dir=folder, target='speaker')
    block = everything(data.splits['all'])
    assert data.class_names == ('small fish', 'big fish')
    assert block['label'].tolist() == data.splits['all'].labels().tolist() == [0, 0, 1]  # the head is neither
    assert 'text' not in block


def test_a_lower_rate_loses_what_it_cannot_hold(tmp_path):
    for hertz, is_heard in ((1000, True), (5500, False)):
        soundfile.write(tmp_path / 'a.wav', tone(hertz, 0.5), RATE)
        assert (read_audio(tmp_path / 'a.wav', 8000)[400:-400].std() > 1000) == is_heard
    soundfile.write(tmp_path / 'a.wav', tone(1000, 0.5), RATE)
    np.testing.assert_allclose(read_audio(tmp_path / 'a.wav', RATE) / 32768, tone(1000, 0.5), atol=1e-4)


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('Wat is dit voor raar schip?', 'wat is dit voor raar schip'),
        ("'t Is zo'n  lelijk\tding!", "t is zo'n lelijk ding"),
        ('De LC-10... Eén “Ding”', 'de lc 10 eén ding'),
        ('e\u0301e\u0301n foto’s_map', "één foto's map"),
        ('...', ''),
    ],
)
def test_plain_words(text, words):
    assert plain_words(text) == words


def test_silence_is_cut_behind_but_not_inside():
    sound = np.concatenate([np.ones(80), np.zeros(800), np.ones(80), np.zeros(4000)]).astype(np.int16) * 9000
    assert len(without_last_silence(sound, 8000)) == 960 + 800  # 0.1 s stay
    faint = np.where(np.arange(4960) < 960, sound, 200).astype(np.int16)  # 33 dB lower
    assert len(without_last_silence(faint, 8000)) == 4960
    assert len(without_last_silence(np.zeros(0, np.int16), 8000)) == 0


def test_mistakes(folder, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r'there is no Dutch speech in .*\n.*python -m bench.data fetch speech_nl'):
        speech_nl(dir=str(tmp_path / 'none'))
    with pytest.raises(UsageError, match=r"speech_nl\(target='words'\) is unknown"):
        speech_nl(dir=folder, target='words')
    with pytest.raises(UsageError, match=r'speech_nl\(sample_rate=8000, max_seconds=0.0\)'):
        speech_nl(dir=folder, max_seconds=0.0)
    with pytest.raises(UsageError, match=r'no utterance is as short as max_seconds=0\.2'):
        speech_nl(dir=folder, max_seconds=0.2)
    broken = next((tmp_path / GAME).glob('sound/*/nl/hoofd.ogg'))
    broken.write_bytes(b'OggS and no more')
    with pytest.raises(UsageError, match=r'hoofd.ogg cannot be read: .*\n.*fetch it again'):
        speech_nl(dir=folder)
    monkeypatch.setitem(sys.modules, 'soundfile', None)
    with pytest.raises(UsageError, match=r'needs the package soundfile\n.*pip install soundfile'):
        speech_nl(dir=folder)


@pytest.mark.slow  # decodes an hour and a half of speech: about ten seconds on two cores
def test_the_real_recordings():
    if not (files.data_folder() / 'deb' / GAME / 'sound').is_dir():
        pytest.skip('python -m bench.data fetch speech_nl')
    data = speech_nl()
    block = everything(data.splits['all'])
    assert abs(len(block['text']) - 1448) <= 3
    assert abs(block['audio_length'].sum() / 8000 / 3600 - 0.987) < 0.01
    assert block['text'][0] == 'wat is dit voor raar schip'
    assert max(map(len, block['text'])) <= 112
    parts = splits.split(data, 0.1, 0.2)
    words = {name: set(everything(part)['text'].tolist()) for name, part in parts.items()}
    assert not words['train'] & (words['test'] | words['validation'])
