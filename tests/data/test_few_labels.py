"""Few labels: what is hidden stays hidden, every batch has its share of both kinds."""

import numpy as np
import pytest

from research.core.errors import UsageError
from research.data.buckets import Buckets
from research.data.few_labels import few_labels
from research.data.mixture import Mixture
from research.data.plan import plan_of, unique_examples
from research.data.source import ArraySource, DataSet, Subset


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


@pytest.mark.parametrize(
    'transform', [lambda d: d, lambda d: d.map(lambda source: source.map(lambda part: Subset(part, np.arange(len(part)))))]
)
def test_a_labelled_example_is_not_counted_twice(transform):
    whole = DataSet('toy', {'train': data(60).splits['train']}, ('a', 'b'))
    train = transform(few_labels(labels='10 examples', unlabelled=3)(whole)).splits['train']
    plan = plan_of(train, 16, seed=0)
    for steps in (1, 2, 3, 5, 40):
        seen = {row.tobytes() for step in range(steps) for row in train[plan.batch(step)[0]]['image']}
        assert unique_examples(train, steps, 16, seed=0) == len(seen)
    assert unique_examples(train, 40, 16, seed=0) == 60


def test_a_mixture_or_buckets_under_few_labels_are_refused():
    source = data().splits['train']
    text = ArraySource(
        {'tokens': np.ones((8, 8), np.int32), 'segment': np.ones((8, 8), np.int32), 'label': np.arange(8, dtype=np.int32) % 2}
    )
    for train in (Mixture([source, source], (3, 1), (None, 2)), Buckets(text, (4, 8), 'text')):
        ordered = DataSet('toy', {'train': train}, ('a', 'b'))
        for unlabelled in (0, 3):
            with pytest.raises(UsageError, match="would undo the order of training of data set 'toy'"):
                few_labels(labels='4 examples', unlabelled=unlabelled)(ordered)


def test_mistakes():
    with pytest.raises(UsageError, match='has no classes whose labels could be hidden'):
        few_labels(labels='10 examples')(data(classes=None))
    with pytest.raises(UsageError, match='unlabelled is -1'):
        few_labels(labels='10 examples', unlabelled=-1)
