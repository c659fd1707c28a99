"""Teachers for distillation: the model of a finished run, by its run directory.

Of what the run recorded only its model is built, and its newest weights are read (averaged where it kept an average). The
student's data and task stand for the rest, so teacher and student see the same arrays; where the run saw its examples
otherwise (other preprocessing or transforms, another tokenizer) or told other classes apart, its outputs would mean something
else, and it is refused.
"""

import itertools
import pathlib
from typing import Any

from research.core import fields, registry
from research.core.errors import UsageError
from research.core.schema import Experiment
from research.data import tokenizers
from research.data.source import DataSpec
from research.tasks.distill import Teacher
from research.train import weights
from research.train.open_run import foreign
from research.train.run_directory import RunDirectory

LEARNT = ('standardise', 'quantile_normalise', 'encode_categories')  # transforms that learn from the training split
CHOOSING = ('few_labels', 'buckets')  # transforms that say which examples come when, not how one is seen
TRAINING = ('source', 'validation', 'test', 'budget', 'subset_seed')  # what says which examples that is


def restore(experiment: Experiment, data: DataSpec, path: str) -> Teacher:
    """The model of the run in `path`, for a student that is trained as `experiment` says on `data`.

    A run directory may come from anyone, and `package.module:Thing` can call any function: such a model is built only if the
    student's own config names something of the same package, which whoever starts the student has written or trusted.

    Raises:
      UsageError: there is no run, its model is not trusted, or it saw its examples or their classes otherwise.
    """
    folder = pathlib.Path(path).expanduser()
    run = RunDirectory(folder).read_run()
    if run is None:
        raise UsageError(f'config.task.teacher={path!r} holds no run', 'give the --workdir of a trained run')
    component = registry.component('model', run['config']['model'], 'config.model')
    package = component.name.partition(':')[0].partition('.')[0]
    own = {name.partition('.')[0] for name in foreign(fields.to_plain(experiment))}
    if ':' in component.name and package not in own:
        raise UsageError(
            f'the teacher in {path} names code that your config does not: {component.name}',
            f'if you trust it, take the model of the student from {package!r} too',
        )
    _check_view(experiment, data, run, folder)
    return Teacher(component.bound(), lambda: weights.read_run(folder, 'config.task.teacher')[0])


def _check_view(experiment: Experiment, data: DataSpec, run: dict[str, Any], path: pathlib.Path) -> None:
    """Refuses a teacher that saw its examples otherwise than the student does."""
    ours, theirs = fields.to_plain(experiment.data.preprocess), run['config']['data']['preprocess']
    if ours != theirs:
        raise UsageError(
            f'the teacher in {path} was trained with config.data.preprocess={theirs}, the student has {ours}',
            'give the student the same preprocessing',
        )
    _check_transforms(experiment, run['config']['data'], path)
    classes = run.get('class_names')  # None of data without classes, and of a run that did not record them
    for other, own in itertools.zip_longest(classes, data.class_names) if classes and data.class_names else ():
        if other != own:
            raise UsageError(
                f'the teacher in {path} has the class {other!r} where the student has {own!r}',
                'give the student the same classes in the same order',
            )
    folder = path / 'tokenizer'
    if data.tokenizer is not None and tokenizers.load(folder).fingerprint != data.tokenizer.fingerprint:
        raise UsageError(
            f'the teacher in {path} reads with another tokenizer than the student', f'give the student the one in {folder}'
        )


def _check_transforms(experiment: Experiment, theirs: dict[str, Any], path: pathlib.Path) -> None:
    """Refuses a teacher of other transforms, or whose columns were scaled or coded by other training examples."""
    ours = fields.to_plain(experiment.data)
    mine, other = (_ways_of_seeing(data['transforms']) for data in (ours, theirs))
    if mine != other:
        raise UsageError(
            f'the teacher in {path} was trained with the transforms {other}, the student has {mine}',
            'give the student the same transforms',
        )
    learnt = [transform['name'] for transform in mine if transform['name'] in LEARNT]
    different = [key for key in TRAINING if ours[key] != theirs[key]] if learnt else []
    if different:
        names = ', '.join(f'config.data.{key}' for key in different)
        raise UsageError(
            f'{learnt[0]} learns from the training examples, and those of the teacher in {path} differ by {names}',
            'give the student the same training split, or take a transform that learns nothing',
        )


def _ways_of_seeing(transforms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The transforms that both must have: those that only choose examples matter where another one learns from the chosen."""
    learns = any(transform['name'] in LEARNT for transform in transforms)
    return [transform for transform in transforms if learns or transform['name'] not in CHOOSING]
