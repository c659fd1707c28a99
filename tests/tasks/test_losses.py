"""Losses against optax, scipy, scikit-learn, numpy formulae and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from sklearn.metrics import log_loss

from research.tasks.losses import absolute_error, cross_entropy, huber, squared_error, unmasked


def draw(seed=0, n=40, k=5, spread=3.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, k)).astype(np.float32) * spread, rng.integers(0, k, n).astype(np.int32)


def formula(logits, labels, smoothing, gamma):
    """sum_k q_k (1 - p_k)^gamma (-log p_k) in float64."""
    p = scipy.special.softmax(logits.astype(np.float64), -1)
    k = logits.shape[1]
    q = (1 - smoothing) * np.eye(k)[labels] + smoothing / k
    return np.sum(q * (1 - p) ** gamma * -np.log(p), -1)


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.9])
@pytest.mark.parametrize('gamma', [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize('k', [2, 5])
def test_cross_entropy_is_its_formula(smoothing, gamma, k):
    logits, labels = draw(k=k)
    got = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing, gamma)
    assert got.shape == labels.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, formula(logits, labels, smoothing, gamma), rtol=5e-6, atol=5e-7)


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_cross_entropy_agrees_with_optax_and_scikit_learn(smoothing):
    logits, labels = draw(1)
    got = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 5), smoothing)
    np.testing.assert_allclose(got, optax.softmax_cross_entropy(logits, targets), rtol=1e-6, atol=1e-6)
    if not smoothing:
        probabilities = scipy.special.softmax(logits.astype(np.float64), -1)
        assert float(got.mean()) == pytest.approx(log_loss(labels, probabilities, labels=range(5)), rel=1e-6)


def test_focal_loss_agrees_with_optax_on_two_classes():
    rng = np.random.default_rng(0)
    score, labels = rng.normal(size=30).astype(np.float32), rng.integers(0, 2, 30)
    logits = jnp.stack([jnp.zeros(30), score], -1)
    want = jax.jit(lambda x, y: optax.losses.sigmoid_focal_loss(x, y, gamma=2.0))(score, labels.astype(np.float32))
    np.testing.assert_allclose(cross_entropy(logits, jnp.asarray(labels), focal_gamma=2.0), want, rtol=2e-6)


def test_focal_loss_with_gamma_zero_is_cross_entropy():
    logits, labels = draw(2)
    np.testing.assert_array_equal(cross_entropy(logits, labels, 0.1, 0.0), cross_entropy(logits, labels, 0.1))


@pytest.mark.parametrize(('smoothing', 'gamma'), [(0.0, 0.0), (0.1, 0.0), (0.0, 2.0), (0.1, 0.5)])
def test_gradient_is_the_finite_difference(smoothing, gamma):
    logits, labels = draw(3, n=6, k=4)
    got = jax.jit(jax.grad(lambda x: cross_entropy(x, labels, smoothing, gamma).sum()))(logits)
    wide, step, want = logits.astype(np.float64), 1e-5, np.zeros(logits.shape)
    for i in np.ndindex(*logits.shape):
        shift = np.zeros(logits.shape)
        shift[i] = step
        want[i] = np.sum(formula(wide + shift, labels, smoothing, gamma) - formula(wide - shift, labels, smoothing, gamma))
    np.testing.assert_allclose(got, want / (2 * step), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize('gamma', [0.01, 0.5, 1.0, 2.0])
def test_focal_loss_is_finite_where_the_model_is_certain(gamma):
    logits, labels = jnp.array([[1000.0, 0.0, 0.0], [20.0, 0.0, 0.0], [0.0, 1000.0, 0.0]]), jnp.array([0, 0, 0])
    values, gradient = jax.jit(jax.value_and_grad(lambda x: cross_entropy(x, labels, 0.1, gamma).sum()))(logits)
    assert np.isfinite(values) and np.isfinite(gradient).all()


@pytest.mark.parametrize('label', [-1, 5, 1000])
def test_a_label_that_is_no_class_gives_nan_and_leaves_others_alone(label):
    logits, labels = draw(4)
    wrong = labels.copy()
    wrong[3] = label
    values, gradient = jax.jit(jax.vmap(jax.value_and_grad(lambda x, y: cross_entropy(x[None], y[None])[0])))(logits, wrong)
    right = np.arange(len(labels)) != 3
    assert np.isnan(values[3]) and np.isnan(gradient[3]).all()
    np.testing.assert_allclose(values[right], formula(logits, labels, 0, 0)[right], rtol=5e-6, atol=5e-7)
    assert np.isfinite(gradient[right]).all()


@pytest.mark.parametrize('delta', [0.5, 1.0, 3.0])
def test_regression_losses(delta):
    rng = np.random.default_rng(0)
    outputs, targets = rng.normal(size=(2, 20, 3)).astype(np.float32) * 3
    error = outputs - targets
    np.testing.assert_allclose(squared_error(outputs, targets), error**2, rtol=1e-6)
    np.testing.assert_allclose(absolute_error(outputs, targets), np.abs(error), rtol=1e-6)
    np.testing.assert_allclose(huber(outputs, targets, delta), scipy.special.huber(delta, error), rtol=1e-6)


def test_unmasked_clears_rows_of_any_rank_and_type():
    mask = np.float32([1, 0, 1])
    for values in (np.ones((3, 2, 2), np.float32) * np.nan, np.full((3, 4), 7, np.uint8), np.array([5, -9, 5])):
        got = unmasked(values, mask)
        assert got.dtype == jnp.asarray(values).dtype and not got[1].any()
        np.testing.assert_array_equal(got[::2], values[::2])
