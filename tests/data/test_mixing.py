import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_digits

from research.core.errors import UsageError
from research.data import mixing
from research.data.augment import chain

COUNT = 12
PARTNER = np.arange(COUNT) ^ 1


def digits_batch(**changes):
    digits = load_digits()
    return {
        'image': jnp.asarray((digits.images[:COUNT, :, :6, None] * 15).astype(np.uint8)),
        'label': jnp.asarray(digits.target[:COUNT].astype(np.int32)),
        'mask': jnp.ones(COUNT),
        **changes,
    }


def keys_of(count=COUNT, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def reference_mix(batch, chosen, shares):
    """One example at a time; `shares` (B, H, W) is the own share of each pixel."""
    images, labels, weights = [], [], []
    for i in range(COUNT):
        own, partner = (np.asarray(batch['image'][j], np.float64) for j in (i, i ^ 1))
        mixed = chosen[i] and batch['mask'][i ^ 1] > 0
        images.append(shares[i][..., None] * own + (1 - shares[i][..., None]) * partner if mixed else own)
        weights.append(shares[i].mean() if mixed else 1.0)
        labels.append(batch['label'][i ^ 1])
    return np.stack(images), np.array(labels), np.array(weights)


def assert_mixed(result, expected):
    images, labels, weights = expected
    assert result['image'].dtype == result['mix_weight'].dtype == jnp.float32
    np.testing.assert_allclose(result['image'], images, rtol=1e-6, atol=3e-5)  # two roundings at 255: 2 * 255 * 2**-24
    np.testing.assert_array_equal(result['mix_label'], labels)
    np.testing.assert_allclose(result['mix_weight'], weights, rtol=1e-6)


@pytest.mark.parametrize('regression', [False, True])
def test_mix_equals_numpy(regression):
    mask = jnp.ones(COUNT).at[jnp.array([0, 5])].set(0)
    batch = digits_batch(mask=mask)
    if regression:
        batch['label'] = batch['label'] * 0.37
    chosen = np.arange(COUNT) % 4 != 2
    shares = np.random.default_rng(0).uniform(size=COUNT).astype(np.float32)
    result = jax.jit(mixing._mix)(batch, jnp.asarray(chosen), jnp.asarray(shares)[:, None, None, None])
    assert result['mix_label'].dtype == batch['label'].dtype
    assert_mixed(result, reference_mix(batch, chosen, np.broadcast_to(shares[:, None, None], (COUNT, 8, 6))))


def test_mixup_uses_one_share_per_example():
    batch = digits_batch(image=jnp.asarray(np.repeat(np.arange(COUNT) % 2 * 255, 48).reshape(COUNT, 8, 6, 1).astype(np.uint8)))
    result = jax.jit(mixing.mixup(alpha=1.0))(keys_of(), batch)
    images, weights = np.asarray(result['image']), np.asarray(result['mix_weight'])
    own = images[:, 0, 0, 0] / 255
    np.testing.assert_allclose(images, np.broadcast_to(own[:, None, None, None] * 255, images.shape), rtol=1e-6)
    np.testing.assert_allclose(np.where(np.arange(COUNT) % 2, own, 1 - own), weights, atol=1e-6)
    assert len(np.unique(weights)) == COUNT  # partners draw their own


@pytest.mark.parametrize('alpha', [0.01, 0.2, 1.0, 3.0])
def test_shares_follow_the_beta_distribution(alpha):
    shares = np.asarray(mixing._draw_shares(keys_of(4000), alpha), np.float64)
    assert shares.min() >= 0 and shares.max() <= 1
    # Kolmogorov-Smirnov on a grid: float32 cannot tell the many shares near 0 and 1 of a small alpha apart
    grid = np.linspace(0.001, 0.999, 999)
    empirical = np.searchsorted(np.sort(shares), grid) / len(shares)
    assert np.abs(empirical - stats.beta(alpha, alpha).cdf(grid)).max() < 1.63 / np.sqrt(len(shares))  # 1 % level


def test_cutmix_pastes_one_box_and_weighs_the_rest():
    count, height, width = 300, 5, 13
    images = np.repeat(np.arange(count) % 2 * 255, height * width).reshape(count, height, width, 1).astype(np.uint8)
    batch = {'image': jnp.asarray(images), 'label': jnp.arange(count), 'mask': jnp.ones(count)}
    result = jax.jit(mixing.cutmix())(keys_of(count), batch)
    pasted = np.asarray(result['image'])[..., 0] != images[..., 0]
    np.testing.assert_array_equal(np.asarray(result['image']), np.where(pasted[..., None], 255.0 - images, images))
    for mask in pasted:
        assert mask.sum() == mask.any(1).sum() * mask.any(0).sum()  # a rectangle, or nothing
    kept = (height * width - pasted.sum((1, 2))) / (height * width)
    np.testing.assert_allclose(result['mix_weight'], kept, rtol=1e-6)
    assert kept.min() < 0.3 and kept.max() == 1


def test_box_sides_are_the_papers():
    shares = np.random.default_rng(1).uniform(size=500).astype(np.float32)
    shares[:2] = 0, 1
    sides = np.asarray(mixing._box_sides(jnp.asarray(shares), 24, 40))
    exact = np.sqrt(1 - shares.astype(np.float64))[:, None] * [24, 40]
    assert np.all(sides <= exact + 1e-4) and np.all(sides > exact - 1 - 1e-4)
    np.testing.assert_array_equal(sides[:2], [[24, 40], [0, 0]])


def test_cutmix_boxes_are_clipped_squares_around_uniform_centres():
    count, height, width = 2000, 6, 9
    # lambda 8 / 9 leaves sides of a third: 2 x 3, so every pixel inside is covered by 6 centres of 54
    outside_box = jax.jit(mixing._outside_box, static_argnums=(2, 3))
    outside = np.asarray(outside_box(keys_of(count), jnp.full(count, 8 / 9 - 1e-6), height, width))[..., 0]
    covered = 1 - outside.mean(0)
    interior = covered[1:-1, 1:-1]
    assert np.abs(interior - 6 / 54).max() < 5 * np.sqrt(6 / 54 * 48 / 54 / count)


@pytest.mark.parametrize('mix', [mixing.mixup, mixing.cutmix])
def test_probability(mix):
    batch = digits_batch()
    never = jax.jit(mix(probability=0.0))(keys_of(), batch)
    np.testing.assert_array_equal(never['image'], batch['image'].astype(jnp.float32))
    np.testing.assert_array_equal(never['mix_weight'], np.ones(COUNT))
    count = 1000
    many = {'image': jnp.zeros((count, 16, 16, 1)), 'label': jnp.zeros(count), 'mask': jnp.ones(count)}
    mixed = np.asarray(jax.jit(mix(alpha=8.0, probability=0.3))(keys_of(count), many)['mix_weight']) < 1
    assert abs(mixed.mean() - 0.3) <= 5 * np.sqrt(0.3 * 0.7 / count)


@pytest.mark.parametrize('mix', [mixing.mixup, mixing.cutmix])
def test_padding_reaches_no_real_example(mix):
    mask = jnp.asarray(np.arange(COUNT) < 7, jnp.float32)
    batch = digits_batch(mask=mask)
    padded = batch['image'].astype(jnp.float32).at[7:].set(jnp.nan)
    result = jax.jit(mix(alpha=8.0))(keys_of(), batch | {'image': padded})
    np.testing.assert_array_equal(result['image'][6], batch['image'][6])
    assert result['mix_weight'][6] == 1
    assert not np.isnan(np.asarray(result['image'][:7])).any()
    assert np.all(np.asarray(result['mix_weight'][:6]) < 1)


def test_chained_mixing_mixes_each_example_once_and_keeps_the_weights_true():
    count = 400
    images = jnp.asarray(np.arange(count) % 2 * 100.0 + 50, jnp.float32)[:, None, None, None] * jnp.ones((1, 16, 10, 1))
    batch = {'image': images, 'label': jnp.arange(count), 'mask': jnp.ones(count)}
    keys = keys_of(count)
    result = jax.jit(chain([mixing.mixup(alpha=4.0, probability=0.5), mixing.cutmix(alpha=4.0)]))(keys, batch)
    first = jax.jit(chain([mixing.mixup(alpha=4.0, probability=0.5)]))(keys, batch)
    done = np.asarray(first['mix_weight']) < 1
    assert 0.4 < done.mean() < 0.6
    one_rounding = 2.0**-23  # two programs may fuse, and so round, differently
    np.testing.assert_allclose(result['image'][done], first['image'][done], rtol=one_rounding)
    np.testing.assert_allclose(result['mix_weight'][done], first['mix_weight'][done], rtol=one_rounding)
    assert (np.asarray(result['mix_weight'])[~done] < 1).all()
    # Images of one level show what they are made of, also when the partner had been mixed before.
    own, weight = np.asarray(images)[:, 0, 0, 0], np.asarray(result['mix_weight'])
    made_of = weight * own + (1 - weight) * own[np.arange(count) ^ 1]
    np.testing.assert_allclose(np.asarray(result['image'], np.float64).mean((1, 2, 3)), made_of, rtol=2e-6)
    np.testing.assert_array_equal(result['mix_label'], np.arange(count) ^ 1)


@pytest.mark.parametrize('mix', [mixing.mixup, mixing.cutmix])
def test_an_odd_batch_is_refused_at_trace_time(mix):
    batch = jax.tree.map(lambda x: x[:5], digits_batch())
    with pytest.raises(UsageError, match='has 5 examples'):
        jax.eval_shape(mix(), keys_of(5), batch)
