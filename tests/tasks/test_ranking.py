"""Recall at a precision against scikit-learn's curve; the areas are tested in test_metrics.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve

from research.tasks.metrics import CLASS_METRICS
from research.tasks.ranking import RecallAtPrecision

PERCENTS = (90, 95, 99)


def best_recall(positive, scores, percent):
    precision, recall, _ = precision_recall_curve(positive, scores)
    return recall[precision >= percent / 100].max()


@functools.cache
def jitted(percent, num_classes):
    metric = CLASS_METRICS[f'recall_at_precision_{percent}'](num_classes, 'label')
    return metric, jax.jit(metric.batch)


def evaluate(percent, logits, labels, mask=None):
    """The results over two halves."""
    metric, batch_state = jitted(percent, logits.shape[1])
    mask = np.ones(len(labels), np.float32) if mask is None else mask
    states = []
    for half in (slice(len(labels) // 2), slice(len(labels) // 2, None)):
        states.append(batch_state(logits[half], {'label': labels[half], 'mask': mask[half]}))
    return metric.compute(metric.merge(*states))


def draw(seed, n=600, rare=0.1, step=64, spread=1.0):
    """Binary logits whose log-odds are multiples of 1 / step, so that ties abound for small steps."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < rare).astype(np.int32)
    scores = np.round((rng.normal(size=n) * spread + 4 * labels - 2) * step) / step
    return np.stack([np.zeros(n), scores], 1).astype(np.float32), labels, scores


@pytest.mark.parametrize('percent', PERCENTS)
@pytest.mark.parametrize('step', [64, 4, 1])
def test_recall_agrees_with_scikit_learn(percent, step):
    for seed in range(4):
        logits, labels, scores = draw(seed, step=step)
        got = evaluate(percent, logits, labels)
        assert got[f'recall_at_precision_{percent}'] == best_recall(labels, scores, percent)
        assert got[f'recall_at_precision_{percent}_per_class'] == [
            best_recall(1 - labels, -scores, percent),
            best_recall(labels, scores, percent),
        ]


def test_a_precision_that_is_just_met_counts():
    """Nine of ten alarms are true: exactly 90 %, in a fraction that doubles cannot hold."""
    scores, labels = np.arange(20) / 8.0, (np.arange(20) >= 11).astype(np.int32)
    labels[10], labels[15] = 1, 0  # the top ten: nine positives and one negative
    logits = np.stack([0 * scores, scores], 1).astype(np.float32)
    assert evaluate(90, logits, labels)['recall_at_precision_90'] == best_recall(labels, scores, 90) == 9 / 9 == 1.0
    assert evaluate(95, logits, labels)['recall_at_precision_95'] == best_recall(labels, scores, 95) == 4 / 9


def test_the_best_threshold_need_not_be_the_highest():
    """The top alarm is false, so no high threshold is precise; a lower one is."""
    scores = np.arange(60) / 8.0
    labels = (np.arange(60) >= 20).astype(np.int32)
    labels[59] = 0
    logits = np.stack([0 * scores, scores], 1).astype(np.float32)
    assert evaluate(95, logits, labels)['recall_at_precision_95'] == best_recall(labels, scores, 95) == 1.0


def test_ties_cannot_be_told_apart():
    """All 100 examples score alike: the only threshold has a precision of 10 %."""
    logits, labels = np.zeros((100, 2), np.float32), (np.arange(100) < 10).astype(np.int32)
    got = evaluate(90, logits, labels)
    assert got['recall_at_precision_90'] == 0.0 == best_recall(labels, logits[:, 1], 90)
    assert got['recall_at_precision_90_per_class'] == [1.0, 0.0]


def test_what_is_undefined_and_what_is_masked():
    logits, labels, _ = draw(0, n=40)
    mask = np.float32(np.arange(40) % 2)
    kept = mask > 0
    dirty = np.where(kept[:, None], logits, np.nan).astype(np.float32)
    assert evaluate(90, dirty, np.where(kept, labels, -5).astype(np.int32), mask) == evaluate(90, logits[kept], labels[kept])
    none = evaluate(90, logits, 0 * labels)
    assert np.isnan(none['recall_at_precision_90']) and none['recall_at_precision_90_per_class'][0] == 1.0
    assert np.isnan(evaluate(90, logits, labels, 0 * mask)['recall_at_precision_90'])
    logits[3, 1] = np.nan
    assert np.isnan(evaluate(90, logits, labels)['recall_at_precision_90_per_class']).all()


def test_several_classes_are_averaged():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300).astype(np.int32)
    logits = (3 * np.eye(3)[labels] + rng.normal(size=(300, 3))).astype(np.float32)
    got = RecallAtPrecision(3, 'label', 90)
    result = got.compute(got.batch(jnp.asarray(logits), {'label': labels, 'mask': np.ones(300, np.float32)}))
    assert result['recall_at_precision_90'] == pytest.approx(np.mean(result['recall_at_precision_90_per_class']))
    p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(1, keepdims=True)
    for c in range(3):
        exact = best_recall(labels == c, p[:, c], 90)
        assert exact - 0.02 <= result['recall_at_precision_90_per_class'][c] <= exact
