"""From the data section of an experiment to splits and their description."""

import numpy as np

from research.core import registry, schema
from research.data import augment, source, splits
from research.data.augment import Augmentation
from research.data.source import DataSpec, Source


def build_splits(data: schema.Data) -> tuple[dict[str, Source], DataSpec]:
    """The splits of an experiment ('train' cut to the data budget) and what a task must know of them."""
    dataset = data.source.build()
    parts = splits.split(dataset, data.validation, data.test)
    budget = None if data.budget is None else schema.parse_budget(data.budget)
    parts['train'] = splits.subset(parts['train'], budget, data.subset_seed)
    labels = parts['train'].labels() if dataset.class_names else None
    counts = None if labels is None else np.bincount(labels, minlength=len(dataset.class_names or ()))
    spec = DataSpec(
        source.example_spec(parts['train']), dataset.class_names, None if counts is None else tuple(int(c) for c in counts)
    )
    return parts, spec


def build_augmentation(components: tuple[registry.Component, ...]) -> Augmentation:
    """The augmentations of a config section, one after the other."""
    return augment.chain([component.build() for component in components])
