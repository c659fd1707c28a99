"""Log-mel features against scipy, SpecAugment's masks, and the encoder of audio."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from research.core import leaves
from research.core.errors import UsageError
from research.models.audio import PARTITION_RULES, AudioEncoder, normalise
from research.models.log_mel import LogMel, from_mel, to_mel
from research.models.spec_augment import SpecAugment, draw_bands
from research.parallel.rules import shardings

KEY = jax.random.key(0)
RATE = 8000


def sound(seconds=0.5, batch=2, seed=0):
    """Noise under a tone whose pitch rises, within +-0.3."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    tone = np.sin(2 * np.pi * (300 + 800 * time) * time)
    return (0.1 * tone + 0.03 * rng.normal(size=(batch, len(time)))).astype(np.float32)


# Log-mel features


def mel_of(hertz, scale):
    """The scales as their authors write them, one frequency at a time."""
    if scale == 'htk':
        return 1127.01048 * np.log(1 + hertz / 700)  # the natural logarithm's form
    return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)


def reference_filters(bins, rate, mels, low, high, scale):
    """(R, M): each weight from the mel scale by bisection of the corners, triangle by triangle."""
    corners = []
    for target in np.linspace(mel_of(low, scale), mel_of(high, scale), mels + 2):
        below, above = low, high
        for _ in range(60):
            middle = (below + above) / 2
            below, above = (middle, above) if mel_of(middle, scale) < target else (below, middle)
        corners.append(below)
    weights = np.zeros((bins, mels))
    for m in range(mels):
        left, centre, right = corners[m : m + 3]
        for r in range(bins):
            hertz = r * rate / (2 * (bins - 1))
            if left < hertz < right:
                height = (hertz - left) / (centre - left) if hertz <= centre else (right - hertz) / (right - centre)
                weights[r, m] = height * (2 / (right - left) if scale == 'slaney' else 1)
    return weights


@pytest.mark.parametrize(('scale', 'rate', 'mels'), [('htk', 8000, 40), ('slaney', 16000, 80), ('htk', 11025, 24)])
def test_features_against_scipy(scale, rate, mels):
    front_end = LogMel(sample_rate=rate, mels=mels, scale=scale, low=50.0)
    audio = sound(0.5)
    width, hop, size = front_end.frame_samples, front_end.hop_samples, front_end.transform_samples
    window = scipy.signal.get_window('hann', width)  # periodic
    transform = scipy.signal.ShortTimeFFT(window, hop, rate, mfft=size, fft_mode='onesided', phase_shift=None)
    first = width // 2  # the sample at the centre of the first whole frame
    count = (audio.shape[1] - width) // hop + 1
    power = np.abs(transform.stft(audio, p0=0, p1=count, k_offset=first)).swapaxes(1, 2) ** 2  # (B, T, R)
    filters = reference_filters(size // 2 + 1, rate, mels, 50.0, rate / 2, scale)
    expected = np.log(np.maximum(power @ filters, 1e-10))
    found = jax.jit(front_end)(audio)
    assert found.shape == expected.shape == (2, front_end.frame_lengths(audio.shape[1]), mels)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_a_tone_is_loudest_in_the_mel_that_it_lies_in():
    front_end = LogMel(sample_rate=RATE)
    tone = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)[None]
    corners = from_mel(np.linspace(to_mel(20.0, 'htk'), to_mel(4000.0, 'htk'), 42), 'htk')
    nearest = np.argmin(np.abs(corners[1:-1] - 1000))
    assert (np.asarray(jax.jit(front_end)(tone)).argmax(-1) == nearest).all()


@pytest.mark.parametrize('scale', ['htk', 'slaney'])
def test_scales_are_inverse_to_each_other_and_1000_hertz_are_known(scale):
    hertz = np.linspace(0, 8000, 321)
    np.testing.assert_allclose(from_mel(to_mel(hertz, scale), scale), hertz, rtol=1e-9, atol=1e-9)
    assert to_mel(np.array(1000.0), scale) == pytest.approx(1000.0 if scale == 'htk' else 15.0, abs=0.05)


def test_integers_are_fractions_of_full_scale_and_silence_is_the_floor():
    front_end = jax.jit(LogMel(sample_rate=RATE))
    audio = np.round(sound() * 32768).astype(np.int16)
    np.testing.assert_allclose(front_end(audio), front_end((audio / 32768).astype(np.float32)), atol=1e-6)
    np.testing.assert_allclose(front_end(np.zeros_like(audio)), np.log(1e-10), rtol=1e-6)


def test_frame_lengths_count_the_frames_that_lie_inside():
    front_end = LogMel(sample_rate=RATE)
    lengths = np.arange(0, 700, 13)
    starts = [len(range(0, length - 200 + 1, 80)) if length >= 200 else 0 for length in lengths]
    np.testing.assert_array_equal(front_end.frame_lengths(jnp.asarray(lengths)), starts)
    np.testing.assert_array_equal(front_end.frame_lengths(jnp.array([16000, 100])), [198, 0])  # of the docstring
    assert jax.eval_shape(front_end, sound(0.03)).shape[1] == front_end.frame_lengths(240)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'scale': 'mel'}, "scale is 'mel'"),
        ({'frame': 0.0}, 'are no sample at 16000 Hz'),
        ({'low': 500.0, 'high': 400.0}, 'the band from low=500.0 to high=400.0 Hz'),
        ({'high': 9000.0}, 'not inside 0 to 8000 Hz'),
        ({'floor': 0.0}, 'floor is 0.0'),
        ({'mels': 200}, r'of 200 mels hold no bin .*, the first is mel \d+'),
    ],
)
def test_mistakes_of_the_front_end(fields, message):
    with pytest.raises(UsageError, match=message):
        LogMel(**fields)


def test_audio_that_is_too_short():
    with pytest.raises(UsageError, match='100 samples are less than a frame of 200'):
        LogMel(sample_rate=RATE)(np.zeros((1, 100)))


# SpecAugment


def runs(row):
    """(start, end) of each run of True in a row of booleans."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_masks_have_the_widths_and_the_places_of_the_paper():
    augment = SpecAugment(frequency_masks=1, frequency_width=5, time_masks=1, time_width=12, time_share=0.5)
    lengths = jnp.asarray(np.tile([30, 16, 4, 0], 500))
    hidden = np.asarray(jax.jit(augment)(KEY, jnp.ones((2000, 30, 20)), lengths)) == 0
    bands, stretches = hidden.all(1), hidden.all(2)  # (B, M), (B, T)
    assert (hidden == (bands[:, None] | stretches[:, :, None])).all()
    for mask, widest, ends in (
        (bands, np.full(2000, 5), np.full(2000, 20)),
        (stretches, np.tile([12, 8, 2, 0], 500), np.asarray(lengths)),
    ):
        found = [runs(row) for row in mask]
        assert max(len(r) for r in found) == 1
        spans = np.array([r[0] if r else (0, 0) for r in found])
        widths = spans[:, 1] - spans[:, 0]
        assert (widths <= widest).all()
        assert (spans[:, 1] <= ends).all()
        whole = widest == widest.max()
        counts = np.bincount(widths[whole], minlength=widest.max() + 1) / whole.sum()
        np.testing.assert_allclose(counts, 1 / (widest.max() + 1), atol=0.06)  # uniform over 0 ... the greatest
        assert spans[whole & (widths > 0), 0].min() == 0
        assert spans[whole, 1].max() == ends.max()


def test_several_masks_and_none():
    several = np.asarray(jax.jit(lambda: draw_bands(KEY, 3, 200, jnp.full(300, 10), jnp.full(300, 200)))())
    counts = np.array([len(runs(row)) for row in several])
    assert counts.max() == 3
    nothing = SpecAugment(time_masks=0, frequency_masks=0)
    np.testing.assert_array_equal(jax.jit(nothing)(KEY, jnp.ones((2, 9, 4)), jnp.array([9, 9])), 1)


def test_a_share_beyond_the_whole_is_refused():
    with pytest.raises(UsageError, match=r'time_share=1.5\) has a negative number, or a share outside'):
        SpecAugment(time_share=1.5)


# The encoder


def start(module, seed=0):
    """Variables of normal numbers, as wide as a network of this size has them."""
    flat, structure = jax.tree.flatten(jax.eval_shape(module.init, KEY, jnp.zeros((1, 1000), jnp.int16)))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [rng.normal(0, 0.25, leaf.shape).astype(np.float32) for leaf in flat])


def encoder(**fields):
    tiny = {'sample_rate': RATE, 'mels': 12, 'width': 16, 'depth': 1, 'heads': 2, 'dropout': 0.0}
    return AudioEncoder(5, **{**tiny, **fields})


@pytest.fixture(params=['transformer', 'rnn'])
def body(request):
    return request.param


def test_normalised_features_have_mean_0_and_variance_1_over_true_frames():
    features = np.random.default_rng(0).normal(3, 2, (2, 9, 4)).astype(np.float32)
    run = jax.jit(normalise)
    found = np.asarray(run(features, jnp.array([9, 5])))
    for row, frames in enumerate((9, 5)):
        np.testing.assert_allclose(found[row, :frames].mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(found[row, :frames].std(0), 1, atol=1e-4)
        np.testing.assert_array_equal(found[row, frames:], 0)
    assert np.isfinite(run(features, jnp.array([1, 0]))).all()


def test_padding_never_influences(body):
    module = encoder(body=body)
    audio, lengths = sound(0.4), np.array([2900, 1700])
    variables = start(module)
    noise = np.where(np.arange(audio.shape[1]) < lengths[:, None], audio, 0.9 * sound(0.4, seed=1))

    def run(module):
        return jax.jit(lambda: module.apply(variables, noise, lengths=lengths))()

    found, pooled = run(module), run(module.clone(pooling='mean'))
    alone = jax.jit(lambda: module.apply(variables, audio[1:, :1700]))()[0]  # without lengths all is audio
    assert found.shape == (2, module.output_lengths(jnp.array([3200]))[0], 5)
    assert len(alone) == module.output_lengths(jnp.array([1700]))[0] == 5
    np.testing.assert_allclose(found[1, :5], alone, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(pooled[1], alone.mean(0), rtol=1e-4, atol=2e-5)  # the head is linear


def test_steps_of_the_docstring():
    module = AudioEncoder(30)
    np.testing.assert_array_equal(module.output_lengths(jnp.array([32000, 400, 399, 0])), [50, 1, 0, 0])
    assert jax.eval_shape(lambda: module.init_with_output(KEY, jnp.zeros((1, 32000), jnp.int16)))[0].shape == (1, 50, 30)


def test_masks_and_dropout_act_in_training_alone():
    module = encoder(body='rnn', dropout=0.2)
    audio = sound(0.3)
    variables = start(module)
    run = jax.jit(lambda train, key: module.apply(variables, audio, train, rngs={'dropout': key}), static_argnums=0)
    np.testing.assert_array_equal(run(False, KEY), run(False, jax.random.key(1)))
    np.testing.assert_array_equal(run(True, KEY), run(True, KEY))
    assert np.abs(run(True, KEY) - run(True, jax.random.key(1))).max() > 1e-3
    plain = module.clone(dropout=0.0, time_masks=0, frequency_masks=0)
    np.testing.assert_allclose(jax.jit(lambda: plain.apply(variables, audio, True))(), run(False, KEY), rtol=1e-5, atol=1e-6)


def test_it_computes_in_the_type_of_its_parameters():
    module = encoder()
    audio = np.round(sound() * 32768).astype(np.int16)
    variables = start(module)
    exact = jax.jit(module.apply)(variables, audio)
    rounded = jax.jit(module.apply)(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables), audio)
    assert (exact.dtype, rounded.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=0.15)


def test_an_utterance_without_a_frame_has_finite_gradients():
    module = encoder(pooling='mean')
    audio = sound(0.1)
    variables = start(module)

    def loss(variables):
        return module.apply(variables, audio, lengths=jnp.array([0, 100])).sum()

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(variables)))


def shapes_of(module):
    return jax.eval_shape(module.init, KEY, jnp.zeros((1, 16000), jnp.int16))['params']


def test_the_size_table_is_true():
    for module, size in (
        (AudioEncoder(30), 1_920_030),
        (AudioEncoder(30, body='rnn', width=256, depth=3), 1_123_870),
    ):
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes_of(module))) == size


SPLIT = {  # the axis of each kind of leaf that is split
    'transformer': {
        **{f'{name}/{leaf}': axis for name in ('query', 'key', 'value', 'up') for leaf, axis in (('kernel', 1), ('bias', 0))},
        'out/kernel': 0,
        'down/kernel': 0,
        'head/kernel': 1,
        'head/bias': 0,
    },
    'rnn': {
        'input/kernel': 2,
        'input/bias': 1,
        'layers_0_forward/recurrent_kernel': 2,
        'layers_0_backward/recurrent_kernel': 2,
        'layers_0_forward/recurrent_bias': 0,
        'layers_0_backward/recurrent_bias': 0,
        'head/kernel': 1,
        'head/bias': 0,
    },
}


def test_partition_rules_split_heads_and_units(body):
    abstract = {'params': shapes_of(AudioEncoder(30, body=body, depth=1))}
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ('data', 'model'))
    numbered = [(pattern, number) for number, (pattern, _) in enumerate(PARTITION_RULES)]
    used = sorted(set(jax.tree.leaves(leaves.match(numbered, abstract, allow_unused=True))))
    placed = shardings(mesh, [PARTITION_RULES[number] for number in used], abstract)
    split = set()
    for name, leaf, sharding in zip(leaves.names(abstract), *map(jax.tree.leaves, (abstract, placed)), strict=True):
        kind = '/'.join(name.split('/')[-2:])
        axis = SPLIT[body].get(kind)
        split |= {kind} if axis is not None else set()
        assert sharding.shard_shape(leaf.shape) == tuple(n // 2 if i == axis else n for i, n in enumerate(leaf.shape)), name
    assert split == set(SPLIT[body])


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'body': 'cnn'}, "model.body 'cnn' does not exist"),
        ({'pooling': 'max'}, "model.pooling 'max' does not exist"),
        ({'cell': 'rnn'}, "model.cell 'rnn' does not exist"),
        ({'kernel': 4}, 'model.kernel=4, model.width=16\n.*odd'),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(encoder(**fields).init, KEY, sound())


def test_two_channels_are_refused():
    with pytest.raises(UsageError, match=r'reads audio \(B, N\), not \(2, 9, 2\)'):
        jax.eval_shape(encoder().init, KEY, jnp.zeros((2, 9, 2)))
