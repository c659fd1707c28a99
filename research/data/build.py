"""From the data section of an experiment to splits and their description.

source -> bad records skipped (if wanted) -> splits by hash -> data budget -> tokenizer (from the training texts)
-> transforms (learn from training alone)
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from research.core import registry, schema
from research.core.errors import UsageError
from research.data import augment, source, splits
from research.data.augment import Augmentation
from research.data.bad_records import BadRecords, Skipping
from research.data.mixture import Mixture, map_source
from research.data.plan import has_own_plan
from research.data.source import DataSet, DataSpec, Source

BLOCK = 1024  # examples that are read at once
SAMPLE = 4096  # rows that are looked at for the mean number of tokens


def build_splits(data: schema.Data, bad_records: BadRecords | None = None) -> tuple[dict[str, Source], DataSpec]:
    """The splits of an experiment ('train' cut to the data budget) and what a task must know of them.

    Args:
      data: the data section.
      bad_records: told of the records that on_bad_record='skip' leaves out; None: they are counted for these splits alone.

    Raises:
      BadRecordError: a record that had to be read already cannot be, or more than config.data.max_bad_share of a split.
    """
    raw = data.source.build()
    if data.on_bad_record == 'skip':
        raw = skipping(raw, BadRecords(share=data.max_bad_share) if bad_records is None else bad_records)
    else:
        check_loaded(raw)
    parts = splits.split(raw, data.validation, data.test)
    budget = None if data.budget is None else schema.parse_budget(data.budget)
    parts['train'] = splits.subset(parts['train'], budget, data.subset_seed)
    dataset = dataclasses.replace(raw, splits=parts)
    if data.tokenizer is not None:
        dataset = dataclasses.replace(dataset, tokenizer=data.tokenizer.build(Texts(parts['train'])))
    for transform in data.transforms:
        dataset = transform.build()(dataset)
    return dataset.splits, describe(dataset)


def skipping(raw: DataSet, bad_records: BadRecords) -> DataSet:
    """The data set with bad records skipped, in a mixture those of each part.

    Raises:
      UsageError: a source has a plan of its own.
    """

    def skipped(split: str, part: Source, total: int) -> Source:
        if has_own_plan(part):
            raise UsageError(
                f'the source of split {split!r} says the order of training itself, which skipping bad records would undo',
                "set config.data.on_bad_record='stop'",
            )
        return Skipping(part, split, bad_records, total)

    def wrapped(split: str, source: Source) -> Source:
        return map_source(lambda part: skipped(split, part, len(source)), source)

    return dataclasses.replace(raw, splits={split: wrapped(split, source) for split, source in raw.splits.items()})


def check_loaded(raw: DataSet) -> None:
    """Raises the first error of a source that has read all its records at the start; others raise it when they come to it."""

    def checked(part: Source) -> Source:
        for error in getattr(part, 'errors', {}).values():
            raise error
        return part

    for split in raw.splits.values():
        map_source(checked, split)


def describe(dataset: DataSet) -> DataSpec:
    """What a task must know of a data set with a training split.

    Raises:
      UsageError: its examples hold text that nothing has turned into numbers.
    """
    train = dataset.splits['train']
    examples = source.example_spec(train)
    texts = sorted(key for key, (_, dtype) in examples.items() if dtype.kind == 'O')
    if texts:
        raise UsageError(
            f'the examples hold text ({", ".join(texts)}), which no model reads',
            "set config.data.tokenizer and config.data.transforms, e.g. 'byte' and 'pad(length=128)'",
        )
    labels = train.labels() if dataset.class_names else None
    counts = None if labels is None else np.bincount(labels[labels >= 0], minlength=len(dataset.class_names or ()))
    class_counts = None if counts is None else tuple(int(c) for c in counts)
    return DataSpec(
        examples,
        dataset.class_names,
        class_counts,
        dataset.tokenizer,
        dataset.cardinalities,
        example_tokens(train, examples),
        dataset.unlabelled,
    )


def example_tokens(train: Source, keys: Iterable[str]) -> float | None:
    """The tokens of an example, padding left out: the mean over at most `SAMPLE` evenly spaced rows; None without tokens.

    In a mixture it is the mean of the parts' means by their weights: parts of 10 and 100 tokens a row and the weights (9, 1)
    give 19, as training draws them until a part reaches its max_epochs.

    It counts what a model reads. In rows of windows, in packed rows and in the targets of pairs that is every token but the
    row's first: one for each target of windows and pairs, but in packed rows also the first token of each later document,
    which is no target. In padded rows it is every token, whatever share of them masked language modelling predicts.
    """
    if isinstance(train, Mixture):
        parts = [part for part in train.parts if len(part)]
        weights = [w for w, part in zip(train.weights or map(len, train.parts), train.parts, strict=True) if len(part)]
        means = [example_tokens(part, keys) for part in parts]
        known = [mean for mean in means if mean is not None]
        return float(np.average(known, weights=weights)) if known else None
    columns = sorted({'segment', 'source_segment', 'target_segment'}.intersection(keys)) or ['tokens']
    if columns[0] not in keys:
        return None
    rows = np.unique(np.linspace(0, len(train) - 1, min(len(train), SAMPLE)).astype(np.int64))
    block = train[rows]
    overlap = 0 if 'segment' in keys and 'position' not in keys else 1
    counted = [block[name][:, 0 if name == 'source_segment' else overlap :] for name in columns]
    is_token = [np.ones_like(c, bool) if columns == ['tokens'] else c > 0 for c in counted]
    return float(sum(part.sum() for part in is_token) / len(rows))


class Texts:
    """All texts of a source, example by example and column by column; can be gone through any number of times."""

    def __init__(self, documents: Source):
        self.source = documents

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self.source), BLOCK):
            block = self.source[np.arange(start, min(start + BLOCK, len(self.source)))]
            for _, column in sorted((key, column) for key, column in block.items() if column.dtype == object):
                yield from column


def build_augmentation(components: tuple[registry.Component, ...]) -> Augmentation:
    """The augmentations of a config section, one after the other."""
    return augment.chain([component.build() for component in components])
