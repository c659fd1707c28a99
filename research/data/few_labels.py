"""Few labels: a training split of which only some labels may be used, as a mixture of labelled and unlabelled examples.

Shape letters: B batch.

With `few_labels(labels='400 examples', unlabelled=7)` and a batch of 128, every batch holds 16 labelled examples, which come
round often, and 112 of the whole training split, whose labels are hidden: 'labelled' (B,) float32 says which are which, and
'label' is -1 where it is hidden.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from research.core.errors import UsageError
from research.core.schema import parse_budget
from research.data import splits
from research.data.mixture import Mixture
from research.data.plan import has_own_plan
from research.data.source import Block, DataSet, Source, select


def few_labels(*, labels: str, unlabelled: int = 7, seed: int = 0) -> Callable[[DataSet], DataSet]:
    """The training split as labelled examples and, `unlabelled` times as many in each batch, examples without their label.

    Args:
      labels: how many labels are used: a nested, class-stratified subset, '5%' or '400 examples'.
      unlabelled: unlabelled examples for each labelled one (mu of Sohn et al. 2020, FixMatch, table 4); 0: none at all.
      seed: which nested family of subsets the labels are drawn from.

    Raises:
      UsageError: the data have no classes, there are not so many examples, or they have an order of training of their own (a
        mixture, buckets), which would be lost.
    """
    if unlabelled < 0:
        raise UsageError(f'few_labels.unlabelled is {unlabelled}', 'give 0 or more')

    def apply(data: DataSet) -> DataSet:
        train = data.splits['train']
        if not data.class_names or train.labels() is None:
            raise UsageError(f'data set {data.name!r} has no classes whose labels could be hidden', 'leave few_labels out')
        if has_own_plan(train):
            raise UsageError(
                f'few_labels would undo the order of training of data set {data.name!r}, a mixture or buckets',
                'leave few_labels out, or take one source and put no buckets before it',
            )
        chosen = splits.budget_indices(train, parse_budget(labels), seed)
        shown = Labelled(select(train, chosen), shown=True)
        parts = [shown, Labelled(train, shown=False)]
        rows = (chosen, np.arange(len(train)))  # a labelled example is one of all
        mixed = Mixture(parts, (1, unlabelled), (None, None), rows) if unlabelled else shown
        return dataclasses.replace(data, splits={**data.splits, 'train': mixed}, unlabelled=unlabelled)

    return apply


class Labelled:
    """The examples of `source` with the column 'labelled': 1, or 0 and the label -1."""

    def __init__(self, source: Source, shown: bool):
        self.source, self.shown = source, shown

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray) -> Block:
        block = self.source[indices]
        label = block['label'] if self.shown else np.full_like(block['label'], -1)
        return {**block, 'label': label, 'labelled': np.full(len(indices), self.shown, np.float32)}

    def keys(self) -> np.ndarray:
        """Those of the examples, (n,) uint64."""
        return self.source.keys()

    def labels(self) -> np.ndarray | None:
        """The classes (n,); None where they are hidden, so that nothing can be made from them, not even their counts."""
        return self.source.labels() if self.shown else None
