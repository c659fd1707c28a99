"""The recorded experiment of a run, to evaluate or export it: with overrides, and without running code that nobody trusts.

`recorded(pathlib.Path('runs/digits_cnn'), ['evaluate.final=test'])` -> its directory and its experiment.
"""

import copy
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from research.core import config_file, schema
from research.core.errors import UsageError
from research.core.schema import Experiment
from research.train.run_directory import RunDirectory

# 'package.module:Thing' at the beginning of a string or where a component is spelled inside one.
FOREIGN = re.compile(r"""(?:^|[\s('",=\[])([A-Za-z_][\w.]*:[A-Za-z_]\w*)""")


def recorded(
    workdir: pathlib.Path,
    overrides: list[str],
    trust: bool = False,
    purpose: str = 'an evaluation',
    needs_checkpoint: bool = True,
) -> tuple[RunDirectory, Experiment]:
    """The run in `workdir` and its experiment with `overrides`.

    Args:
      workdir: the run directory.
      overrides: 'key=value' changes of the recorded config, such as 'evaluate.final=test'.
      trust: accept components that the recorded config names as `package.module:Thing`. A run directory may come from
        anyone, and such a name can call any function, so it is refused by default.
      purpose: what the run is opened for, in errors.
      needs_checkpoint: a run that has saved none is refused.

    Raises:
      UsageError: there is no run, or no checkpoint, in `workdir`; it names components that are not trusted; or an override
        changes what was trained.
    """
    directory = RunDirectory(workdir)
    run = directory.read_run()
    if run is None:
        raise UsageError(f'{workdir} holds no run', 'give the --workdir of a run that was started')
    if needs_checkpoint and not directory.checkpoints.is_dir():
        raise UsageError(f'the run in {workdir} has saved no checkpoint', 'train it further: the same command goes on')
    names = foreign(run['config'])
    if names and not trust:
        raise UsageError(f'the run in {workdir} names code outside Fulcrum: {names[0]}', 'if you trust it, add --trust_run')
    config = copy.deepcopy(run['config'])
    for override in overrides:
        path, _, text = override.partition('=')
        config_file.override(config, path, text)
    before, experiment = schema.resolve(run['config']), schema.resolve(config)
    changes = [change for change in schema.differences(before, experiment) if not change.resumable]
    if changes:
        raise UsageError(f'{purpose} cannot change what was trained: {changes[0]}', 'change evaluate.final, say, or parallel')
    return directory, experiment


def foreign(config: Any) -> list[str]:
    """Every 'package.module:Thing' that a plain config names, in order of the alphabet."""
    return sorted(name for text in strings(config) for name in FOREIGN.findall(text))


def strings(config: Any) -> Iterator[str]:
    """All strings in nested dicts and lists."""
    if isinstance(config, str):
        yield config
    elif isinstance(config, dict):
        yield from (text for value in config.values() for text in strings(value))
    elif isinstance(config, (list, tuple)):
        yield from (text for value in config for text in strings(value))
