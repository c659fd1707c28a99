"""Every metric against scikit-learn, over uneven batches padded with garbage; and what it leaves undefined."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from research.core.errors import UsageError
from research.tasks import ranking
from research.tasks.metrics import CLASS_METRICS, METRICS, VALUE_METRICS, CalibrationError, make, summarise

BATCH = 64
BITS = {'rel': 2e-7, 'abs': 1e-12}  # sums of float32 roundings of values of one sign; counts are exact


@functools.cache
def jitted(name, k):
    metric = METRICS[name](k, 'label')
    return metric, jax.jit(metric.batch)


def evaluate(name, outputs, labels, sizes=(64, 1, 0, 37)):
    """The results of a metric over batches of ragged sizes, scattered over BATCH rows that are otherwise garbage."""
    metric, batch_state = jitted(name, outputs.shape[1])
    rng, state, start = np.random.default_rng(7), None, 0
    sizes = itertools.cycle(sizes)
    while start < len(labels) or state is None:
        take = slice(start, start + next(sizes))
        rows, start = len(labels[take]), take.stop
        padded = np.full((BATCH, outputs.shape[1]), np.nan, np.float32)
        padded_labels = np.full((BATCH, *labels.shape[1:]), -7, labels.dtype)
        where = rng.choice(BATCH, rows, replace=False)
        padded[where], padded_labels[where] = outputs[take], labels[take]
        mask = np.isin(np.arange(BATCH), where).astype(np.float32)
        new = batch_state(padded, {'label': padded_labels, 'mask': mask})
        state = new if state is None else metric.merge(state, new)
    return metric.compute(state)


def draw(seed, k, n=300, spread=2.0, label_classes=None):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, label_classes or k, n).astype(np.int32)
    logits = rng.normal(size=(n, k)) * spread + 1.5 * np.eye(k)[labels]
    return logits.astype(np.float32), labels


def softmax(logits):
    e = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


CASES = [(seed, k) for seed in range(3) for k in (2, 3, 10)]


@pytest.mark.parametrize(('seed', 'k'), CASES)
def test_accuracy_and_confusion_matrix(seed, k):
    logits, labels = draw(seed, k)
    assert evaluate('accuracy', logits, labels)['accuracy'] == reference.accuracy_score(labels, logits.argmax(-1))
    expected = reference.confusion_matrix(labels, logits.argmax(-1), labels=range(k))
    np.testing.assert_array_equal(evaluate('confusion_matrix', logits, labels)['confusion_matrix'], expected)


SCORES = {'precision': reference.precision_score, 'recall': reference.recall_score, 'f1': reference.f1_score}


def degenerate(which):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 50).astype(np.int32)
    logits = rng.normal(size=(50, 3)).astype(np.float32)
    if which == 'class absent from labels':
        labels = np.minimum(labels, 1)
    elif which == 'class absent from predictions':
        logits[:, 1] = -9
    elif which == 'class absent from both':
        labels, logits[:, 2] = np.minimum(labels, 1), -9
    elif which == 'all one class':
        labels[:] = 2
    elif which == 'single example':
        labels, logits = labels[:1], logits[:1]
    elif which == 'perfect':
        logits = 5 * np.eye(3, dtype=np.float32)[labels]
    elif which == 'worst':
        logits = -5 * np.eye(3, dtype=np.float32)[labels]
    elif which == 'constant':
        logits[:] = 0.5
    return logits, labels


DEGENERATE = [
    'class absent from labels',
    'class absent from predictions',
    'class absent from both',
    'all one class',
    'single example',
    'perfect',
    'worst',
    'constant',
]


def check_scores(logits, labels):
    k, predicted = logits.shape[1], logits.argmax(-1)
    for name, score in SCORES.items():
        got = evaluate(name, logits, labels)
        for average, key in (('macro', 'macro'), ('micro', 'micro'), (None, 'per_class')):
            want = score(labels, predicted, labels=range(k), average=average, zero_division=0)
            np.testing.assert_allclose(got[f'{name}_{key}'], want, rtol=1e-14)


@pytest.mark.parametrize(('seed', 'k'), CASES)
def test_precision_recall_f1(seed, k):
    check_scores(*draw(seed, k))


@pytest.mark.parametrize('which', DEGENERATE)
def test_counts_on_degenerate_inputs(which):
    logits, labels = degenerate(which)
    check_scores(logits, labels)
    assert evaluate('accuracy', logits, labels)['accuracy'] == reference.accuracy_score(labels, logits.argmax(-1))


@pytest.mark.parametrize('seed', range(3))
def test_top5(seed):
    logits, labels = draw(seed, 10)
    assert evaluate('top5', logits, labels)['top5'] == reference.top_k_accuracy_score(labels, logits, k=5, labels=range(10))


def test_top5_breaks_ties_against_the_model():
    labels = np.zeros(4, np.int32)
    logits = np.zeros((4, 10), np.float32)
    logits[1, 0] = 1.0  # best alone
    logits[2, 5:] = -1.0  # tied with four others: five in all
    logits[3, 1:5] = 1.0  # tied with five for the fifth place
    assert evaluate('top5', logits, labels)['top5'] == 2 / 4
    with pytest.raises(UsageError, match='always 1 with 5'):
        METRICS['top5'](5, 'label')


def one_vs_rest(labels, k):
    return np.eye(k, dtype=int)[labels]


def exact_log_odds(logits):
    p = softmax(logits)
    others = np.where(np.eye(p.shape[1], dtype=bool), 0.0, p[:, None, :]).sum(-1)
    return np.log(p) - np.log(others)


def histograms(logits, labels):
    """Bin, positive or not, for each example and class; by numpy in float64."""
    return np.round(exact_log_odds(logits) * ranking.BINS_PER_NAT), one_vs_rest(labels, logits.shape[1])


def roc_bound(bins, positive):
    occupied = [np.bincount((bins[positive == value] + 4096).astype(int), minlength=8192) for value in (1, 0)]
    return np.sum(occupied[0] / occupied[0].sum() * occupied[1] / occupied[1].sum()) / 2


def precision_bounds(bins, positive):
    """Average precision with each bin's negatives all above its positives, taken singly, and all below them, taken at once."""
    one_by_one = np.linspace(0, 0.1, len(bins))
    return [
        reference.average_precision_score(positive, scores)
        for scores in (bins + one_by_one - 0.25 * positive, bins + 0.25 * positive)
    ]


@pytest.mark.parametrize(('seed', 'k'), CASES)
def test_areas_within_the_stated_bound(seed, k):
    logits, labels = draw(seed, k, n=1000)
    roc, precision = evaluate('auroc', logits, labels), evaluate('average_precision', logits, labels)
    bins, positives = histograms(logits, labels)
    probabilities = softmax(logits)
    for c in range(k):
        exact = reference.roc_auc_score(positives[:, c], probabilities[:, c])
        bound = roc_bound(bins[:, c], positives[:, c])
        assert abs(roc['auroc_per_class'][c] - exact) <= bound + 1e-12
        assert bound <= 1.1e-3 and abs(roc['auroc_per_class'][c] - exact) <= 2.5e-4  # as `ranking` says of such data
        low, high = precision_bounds(bins[:, c], positives[:, c])
        assert low - 1e-12 <= precision['average_precision_per_class'][c] <= high + 1e-12
        assert low - 1e-12 <= reference.average_precision_score(positives[:, c], probabilities[:, c]) <= high + 1e-12
        assert high - low <= 5.1e-3
    if k == 2:
        assert roc['auroc'] == roc['auroc_per_class'][1]
        assert precision['average_precision'] == precision['average_precision_per_class'][1]
    else:
        assert roc['auroc'] == pytest.approx(reference.roc_auc_score(labels, probabilities, multi_class='ovr'), abs=2.5e-4)
        want = reference.average_precision_score(positives, probabilities)
        assert precision['average_precision'] == pytest.approx(want, abs=3e-3)


@pytest.mark.parametrize('seed', range(3))
def test_areas_are_exact_on_bins_with_ties(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-400, 400, 500) / 64  # few enough values that many tie
    labels = (rng.random(500) < 1 / (1 + np.exp(-scores))).astype(np.int32)
    shift = rng.integers(-3, 4, 500)  # a logit offset that the softmax ignores
    logits = np.stack([shift, scores + shift], -1).astype(np.float32)
    assert evaluate('auroc', logits, labels)['auroc'] == pytest.approx(reference.roc_auc_score(labels, scores), rel=1e-13)
    want = reference.average_precision_score(labels, scores)
    assert evaluate('average_precision', logits, labels)['average_precision'] == pytest.approx(want, rel=1e-13)


def test_areas_do_not_saturate_where_probabilities_do():
    scores = np.linspace(17, 30, 200).astype(np.float32)  # p = 1.0 in float32 from 17 on
    labels = (np.arange(200) >= 100).astype(np.int32)
    assert evaluate('auroc', np.stack([0 * scores, scores], -1), labels)['auroc'] == 1.0
    assert evaluate('auroc', np.stack([0 * scores, -scores], -1), labels)['auroc'] == 0.0


def test_log_odds_agree_with_float64():
    logits = draw(0, 5, spread=8.0)[0]
    np.testing.assert_allclose(jax.jit(ranking.log_odds)(jnp.asarray(logits)), exact_log_odds(logits), atol=4e-6)


@pytest.mark.parametrize('value', [0.0, 100.0])
def test_areas_of_constant_scores(value):
    logits, labels = np.tile(np.float32([0, value]), (20, 1)), (np.arange(20) < 5).astype(np.int32)
    assert evaluate('auroc', logits, labels)['auroc'] == 0.5 == reference.roc_auc_score(labels, logits[:, 1])
    assert evaluate('average_precision', logits, labels)['average_precision'] == 0.25


def test_areas_of_perfect_and_worst_scores():
    labels = (np.arange(20) % 3).astype(np.int32)
    assert evaluate('auroc', 9 * np.eye(3, dtype=np.float32)[labels], labels)['auroc'] == 1.0
    assert evaluate('average_precision', 9 * np.eye(3, dtype=np.float32)[labels], labels)['average_precision'] == 1.0
    worst = -9 * np.eye(3, dtype=np.float32)[labels]
    assert evaluate('auroc', worst, labels)['auroc'] == 0.0
    positives = one_vs_rest(labels, 3)
    want = reference.average_precision_score(positives, -positives)
    assert evaluate('average_precision', worst, labels)['average_precision'] == pytest.approx(want, rel=1e-14)


def test_areas_leave_undefined_classes_out_of_the_mean():
    logits, labels = draw(0, 3, label_classes=2)
    roc, precision = evaluate('auroc', logits, labels), evaluate('average_precision', logits, labels)
    assert np.isnan(roc['auroc_per_class'][2]) and np.isnan(precision['average_precision_per_class'][2])
    assert roc['auroc'] == pytest.approx(np.mean(roc['auroc_per_class'][:2]), rel=1e-15)
    assert precision['average_precision'] == pytest.approx(np.mean(precision['average_precision_per_class'][:2]), rel=1e-15)


def test_areas_of_one_class_only():
    logits, _ = draw(0, 2, n=10)
    ones = np.ones(10, np.int32)
    assert np.isnan(evaluate('auroc', logits, ones)['auroc'])  # no negatives
    assert evaluate('average_precision', logits, ones)['average_precision'] == 1.0
    assert np.isnan(evaluate('auroc', logits, 0 * ones)['auroc'])  # no positives
    assert np.isnan(evaluate('average_precision', logits, 0 * ones)['average_precision'])


@pytest.mark.parametrize(('seed', 'k'), CASES)
def test_calibration_error(seed, k):
    logits, labels = draw(seed, k)
    probabilities = softmax(logits)
    confidence, correct = probabilities.max(-1), probabilities.argmax(-1) == labels
    counts = np.histogram(confidence, bins=15, range=(0, 1))[0]
    accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=15)
    want = np.sum(counts[counts > 0] / len(labels) * np.abs(accuracy - mean_confidence))
    # |a - b| loses relative but not absolute precision: one float32 rounding of a confidence up to 1
    assert evaluate('calibration_error', logits, labels)['calibration_error'] == pytest.approx(want, abs=2e-7)


def test_calibration_bins_are_closed_above():
    def logit(p):
        return np.log(p / (1 - p))

    # Confidence 1 (wrong) and 0.95 (right) share the last bin: the gap there is |1/2 - 0.975|.
    logits, labels = np.float32([[200, 0], [logit(0.95), 0]]), np.int32([1, 0])
    assert evaluate('calibration_error', logits, labels)['calibration_error'] == pytest.approx(0.475, abs=1e-6)
    # With two bins, (0, 1/2] and (1/2, 1], confidence 1/2 (wrong) is apart from 0.95 (right): gaps 0.5 and 0.05.
    metric = CalibrationError('label', num_bins=2)
    state = metric.batch(jnp.float32([[0, 0], [logit(0.95), 0]]), {'label': labels, 'mask': np.ones(2, np.float32)})
    assert metric.compute(state)['calibration_error'] == pytest.approx((0.5 + 0.05) / 2, abs=1e-6)


def test_calibration_of_extremes():
    labels = np.zeros(8, np.int32)
    sure = np.float32([[200, 0]] * 8)  # confidence exactly 1: the last bin
    assert evaluate('calibration_error', sure, labels)['calibration_error'] == 0.0
    assert evaluate('calibration_error', sure, labels + 1)['calibration_error'] == 1.0
    halves = np.float32([[0, 0]] * 8)  # confidence 1/2, half of the labels right
    assert evaluate('calibration_error', halves, (np.arange(8) % 2).astype(np.int32))['calibration_error'] == 0.0


@pytest.mark.parametrize('outputs', [1, 3])
@pytest.mark.parametrize('seed', range(3))
def test_regression_metrics(seed, outputs):
    rng = np.random.default_rng(seed)
    targets = rng.normal(size=(300, outputs)).astype(np.float32) * 3
    predictions = (targets + rng.normal(size=targets.shape)).astype(np.float32)
    given = targets[:, 0] if outputs == 1 else targets
    exact = targets.astype(np.float64), predictions.astype(np.float64)
    assert evaluate('mse', predictions, given)['mse'] == pytest.approx(reference.mean_squared_error(*exact), **BITS)
    assert evaluate('mae', predictions, given)['mae'] == pytest.approx(reference.mean_absolute_error(*exact), **BITS)
    assert evaluate('r2', predictions, given)['r2'] == pytest.approx(reference.r2_score(*exact), rel=1e-6)


def test_regression_metrics_of_integer_labels():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 200).astype(np.int32)
    predictions = (labels[:, None] + rng.normal(size=(200, 1))).astype(np.float32)
    assert evaluate('r2', predictions, labels)['r2'] == pytest.approx(reference.r2_score(labels, predictions), rel=1e-6)


@pytest.mark.parametrize('offset', [1e4, 1e6])
def test_r2_does_not_cancel_under_a_large_offset(offset):
    rng = np.random.default_rng(0)
    targets = (offset + rng.normal(size=300)).astype(np.float32)
    predictions = (targets + rng.choice([-0.5, 0.5], 300)).astype(np.float32)[:, None]
    want = reference.r2_score(targets.astype(np.float64), predictions.astype(np.float64))
    assert evaluate('r2', predictions, targets)['r2'] == pytest.approx(want, rel=1e-6)


def test_r2_of_constant_targets_and_single_examples():
    threes = np.full(100, 3.0, np.float32)
    assert evaluate('r2', threes[:, None], threes)['r2'] == 1.0 == reference.r2_score(threes, threes)
    assert evaluate('r2', threes[:, None] + 1, threes)['r2'] == 0.0 == reference.r2_score(threes, threes + 1)
    both = np.stack([threes, np.arange(100, dtype=np.float32)], -1)
    assert evaluate('r2', both, both)['r2'] == 1.0
    assert np.isnan(evaluate('r2', threes[:1, None] + 1, threes[:1])['r2'])
    assert np.isnan(evaluate('r2', np.full((100, 1), np.nan, np.float32), threes)['r2'])


def numbers(results):
    return np.concatenate([np.ravel(value) for value in results.values()])


@pytest.mark.parametrize('name', sorted(METRICS))
def test_nothing_to_measure_is_nan(name):
    empty = evaluate(name, np.zeros((0, 10), np.float32), np.zeros((0,) if name in CLASS_METRICS else (0, 10), np.int32))
    if name == 'confusion_matrix':
        assert not numbers(empty).any()
    else:
        assert np.isnan(numbers(empty)).all(), empty


FAULTS = [(name, fault) for name in CLASS_METRICS for fault in ('label too large', 'label negative', 'NaN output')]


@pytest.mark.parametrize(('name', 'fault'), FAULTS + [(name, 'NaN output') for name in VALUE_METRICS])
def test_a_fault_in_one_example_shows(name, fault):
    logits, labels = draw(0, 10, n=100)
    if fault == 'NaN output':
        logits[70, 2] = np.nan
    else:
        labels[70] = 10 if fault == 'label too large' else -1
    results = evaluate(name, logits, labels if name in CLASS_METRICS else np.stack([labels] * 10, -1))
    for key, value in results.items():
        assert np.isnan(value).any(), key


@pytest.mark.parametrize('name', sorted(METRICS))
def test_merging_is_independent_of_the_batches(name):
    logits, labels = draw(5, 10, n=120)
    labels = labels if name in CLASS_METRICS else np.stack([labels, *logits.T[1:]], -1)
    one, other = (evaluate(name, logits, labels, sizes) for sizes in ((64, 56), (3, 50, 1, 20)))
    np.testing.assert_allclose(numbers(one), numbers(other), rtol=1e-6, atol=1e-7)


def test_merged_states_are_float64():
    for name in METRICS:
        metric, batch_state = jitted(name, 10)
        labels = np.zeros((BATCH, 10) if name in VALUE_METRICS else BATCH, np.int32)
        state = batch_state(np.ones((BATCH, 10), np.float32), {'label': labels, 'mask': np.ones(BATCH, np.float32)})
        assert {leaf.dtype for leaf in jax.tree.leaves(metric.merge(state, state))} == {np.dtype(np.float64)}


def test_make_and_summarise():
    metrics = make(('accuracy', 'f1', 'auroc'), CLASS_METRICS, 3, 'digit')
    logits, labels = draw(0, 3, n=50)
    batch = {'digit': labels, 'mask': np.ones(50, np.float32)}
    results = summarise(metrics, jax.jit(lambda: {name: metric.batch(logits, batch) for name, metric in metrics.items()})())
    assert set(results) == {'accuracy', 'f1_macro', 'f1_micro', 'f1_per_class', 'auroc', 'auroc_per_class'}
    assert results['f1_micro'] == pytest.approx(results['accuracy'])
    assert make(metrics, CLASS_METRICS, 3, 'digit') == metrics


def test_unknown_metrics_are_refused():
    with pytest.raises(UsageError, match=r"'accurracy' does not exist\n  fix: did you mean 'accuracy'"):
        make(('accurracy',), CLASS_METRICS, 3, 'label')
    with pytest.raises(UsageError, match="'mse' is not for this task"):
        make(('mse',), CLASS_METRICS, 3, 'label')
