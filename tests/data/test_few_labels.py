"""Few labels: what is hidden stays hidden, every batch has its share of both kinds."""

import numpy as np
import pytest

from research.core.errors import UsageError
from research.data.few_labels import few_labels
from research.data.plan import plan_of
from research.data.source import ArraySource, DataSet


def data(n=200, classes=('a', 'b')):
    images = np.random.default_rng(0).integers(0, 256, (n, 2, 2, 1), np.uint8)
    arrays = {'image': images, 'label': np.arange(n, dtype=np.int32) % 2}
    return DataSet('toy', {'train': ArraySource(arrays), 'test': ArraySource(arrays)}, classes)


def test_every_batch_has_its_share_and_only_the_chosen_labels_are_seen():
    train = few_labels(labels='10 examples', unlabelled=3)(data()).splits['train']
    seen = set()
    for step in range(20):
        indices, _, _ = plan_of(train, 16, seed=0).batch(step)
        block = train[indices]
        shown = block['labelled'] == 1
        assert shown.sum() == 4
        assert (block['label'][~shown] == -1).all()
        assert (block['label'][shown] >= 0).all()
        seen |= {image.tobytes() for image in block['image'][shown]}
    assert len(seen) == 10
    assert train.labels() is None  # so that not even the counts of hidden labels reach a loss


def test_labels_are_nested_and_stratified_and_other_splits_keep_theirs():
    few, more = (few_labels(labels=f'{n} examples', unlabelled=0)(data()) for n in (10, 20))
    images = [{row.tobytes() for row in d.splits['train'][np.arange(len(d.splits['train']))]['image']} for d in (few, more)]
    assert images[0] < images[1]
    assert np.bincount(few.splits['train'].labels()).tolist() == [5, 5]
    assert 'labelled' not in few.splits['test'][np.array([0])]


def test_mistakes():
    with pytest.raises(UsageError, match='has no classes whose labels could be hidden'):
        few_labels(labels='10 examples')(data(classes=None))
    with pytest.raises(UsageError, match='unlabelled is -1'):
        few_labels(labels='10 examples', unlabelled=-1)
