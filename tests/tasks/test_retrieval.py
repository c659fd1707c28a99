"""Retrieval and zero-shot metrics against brute force, over uneven padded batches; what they leave undefined."""

import jax
import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from research.tasks.retrieval import Retrieval, ZeroShot, best_ranks, retrieval_metrics

BATCH = 16


def draw(n=70, captions=70, noise=1.0, seed=0):
    """Vectors of images near those of their captions, of which some are equal, and their tokens with garbage as padding."""
    rng = np.random.default_rng(seed)
    which = rng.permutation(np.arange(n) % captions)
    meanings = rng.normal(size=(captions, 8))
    text = meanings[which]
    image = text + noise * rng.normal(size=(n, 8))
    segment = (np.arange(5) < 2 + which[:, None] % 4).astype(np.int32)
    tokens = np.where(segment > 0, which[:, None] + np.arange(5), rng.integers(0, 999, (n, 5))).astype(np.int32)
    unit = [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text)]
    return unit[0], unit[1], tokens, segment, which


def evaluate(image, text, tokens, segment, sizes=(16, 1, 7)):
    """The results over batches of ragged sizes, scattered over rows that are otherwise garbage."""
    metric, state, start, turn = Retrieval(), None, 0, 0
    rng, batch_state = np.random.default_rng(1), jax.jit(metric.batch)
    while start < len(image) or state is None:
        take = slice(start, start + sizes[turn % len(sizes)])
        count, start, turn = len(image[take]), take.stop, turn + 1
        rows = rng.choice(BATCH, count, replace=False)
        full = {'image': np.full((BATCH, 8), np.nan, np.float32), 'text': np.full((BATCH, 8), np.nan, np.float32)}
        batch = {'tokens': np.full((BATCH, 5), 77, np.int32), 'segment': np.ones((BATCH, 5), np.int32)}
        for name, values in (('image', image), ('text', text)):
            full[name][rows] = values[take]
        for name, values in (('tokens', tokens), ('segment', segment)):
            batch[name][rows] = values[take]
        new = jax.device_get(batch_state(full, {**batch, 'mask': np.isin(np.arange(BATCH), rows).astype(np.float32)}))
        state = new if state is None else metric.merge(state, new)
    return metric.compute(state)


def brute_force(queries, candidates, which, k):
    """One query after the other: sorted candidates, the wrong ones first among equals."""
    found = 0
    for i, query in enumerate(queries):
        scores = [float(np.dot(query.astype(np.float64), candidate)) for candidate in candidates.astype(np.float64)]
        order = sorted(range(len(scores)), key=lambda j: (-scores[j], which[j] == which[i]))
        found += any(which[j] == which[i] for j in order[:k])
    return found / len(queries)


@pytest.mark.parametrize('captions', [70, 20, 3])
def test_recall_against_brute_force(captions):
    image, text, tokens, segment, which = draw(captions=captions)
    got = evaluate(image, text, tokens, segment)
    for k in (1, 5, 10):
        assert got[f'image_to_text_recall_at_{k}'] == brute_force(image, text, which, k)
        assert got[f'text_to_image_recall_at_{k}'] == brute_force(text, image, which, k)
    assert len(got) == 6
    assert got['image_to_text_recall_at_1'] < 1 or captions == 3


def test_recall_of_different_captions_is_scikit_learns_top_k_accuracy():
    image, text, tokens, segment, _ = draw(noise=1.5)
    got = evaluate(image, text, tokens, segment)
    for k in (1, 5, 10):
        want = top_k_accuracy_score(np.arange(70), image.astype(np.float64) @ text.astype(np.float64).T, k=k)
        assert got[f'image_to_text_recall_at_{k}'] == want


def test_batches_do_not_matter():
    data = draw(captions=30)[:4]
    assert evaluate(*data) == evaluate(*data, sizes=(3, 16)) == evaluate(*data, sizes=(1,))


def test_equal_similarities_count_against_the_model():
    ones = np.ones((4, 8), np.float32)
    ranks = best_ranks(ones, ones, np.array([0, 0, 1, 2]))
    np.testing.assert_array_equal(ranks, [2, 2, 3, 3])


def test_many_queries_are_compared_piece_by_piece(monkeypatch):
    image, text, _, _, which = draw(captions=30)
    whole = best_ranks(image, text, which)
    monkeypatch.setattr('research.tasks.retrieval.ROWS', 9)
    np.testing.assert_array_equal(best_ranks(image, text, which), whole)


def test_no_examples_and_nan_are_nan():
    image, text, tokens, segment, _ = draw(n=12, captions=12)
    assert all(np.isnan(value) for value in evaluate(image[:0], text[:0], tokens[:0], segment[:0]).values())
    image[3, 1] = np.nan
    assert all(np.isnan(value) for value in evaluate(image, text, tokens, segment).values())


def test_zero_shot_is_the_share_of_right_classes():
    rng = np.random.default_rng(0)
    image, classes = rng.normal(size=(10, 8)).astype(np.float32), rng.normal(size=(3, 8)).astype(np.float32)
    labels, mask = rng.integers(0, 3, 10).astype(np.int32), np.float32(np.arange(10) < 7)
    image[8] = np.nan
    metric = ZeroShot('label')
    state = jax.jit(metric.batch)({'image': image, 'classes': classes}, {'label': labels, 'mask': mask})
    want = np.mean((image @ classes.T).argmax(1)[:7] == labels[:7])
    assert metric.compute(metric.merge(state, state)) == {'zero_shot': pytest.approx(want)}
    assert np.isnan(
        metric.compute(metric.batch({'image': image, 'classes': classes}, {'label': labels, 'mask': 0 * mask}))['zero_shot']
    )


def test_the_table_makes_them():
    assert retrieval_metrics('caption')['retrieval'](64, 'label') == Retrieval('caption')
    assert retrieval_metrics('tokens')['zero_shot'](64, 'kind') == ZeroShot('kind')


def test_batches_of_other_widths_are_merged():
    """As padding buckets give them: equal captions stay equal however wide their batch was."""
    vectors = np.eye(4, dtype=np.float32)
    tokens = np.array([[5, 6, 0], [7, 0, 0], [5, 6, 0], [8, 9, 9]], np.int32)
    batch = {'tokens': tokens, 'segment': np.int32(tokens > 0), 'mask': np.ones(4, np.float32)}
    outputs = {'image': vectors, 'text': vectors[[2, 1, 0, 3]]}  # the two equal captions are exchanged
    metric = Retrieval()
    halves = []
    for rows, width in ((slice(0, 2), 2), (slice(2, 4), 3)):
        part = {k: v[rows, :width] if v.ndim == 2 else v[rows] for k, v in batch.items()}
        halves.append(metric.batch({k: v[rows] for k, v in outputs.items()}, part))
    whole = metric.compute(metric.batch(outputs, batch))
    assert metric.compute(metric.merge(*halves)) == metric.compute(metric.merge(*halves[::-1])) == whole
    assert whole['image_to_text_recall_at_1'] == 1.0
