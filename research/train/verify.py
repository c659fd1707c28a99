"""`--mode=verify`: reads every checkpoint of a run and proves it, byte by byte; needs no model and no device.

    checkpoints/1000  permanent  31 leaves, 1.2 MB  good
    checkpoints/1200  permanent  DAMAGED: params/Dense_0/kernel does not hold what was saved (fingerprints differ)

What is damaged is renamed to `*.corrupt`. Where no checkpoint is good, the newest `*.corrupt` one that is good after all (the
disk was, for a while, not there) gets its name back; else the run may have gone on from another, and its record with it. Both
unless a process trains in the run.
"""

import contextlib
import pathlib
import re

from research.core.errors import StorageError, UsageError
from research.train.checkpoint import Checkpoints
from research.train.manifest import CorruptError
from research.train.run_directory import RunDirectory

NAME = re.compile(r'(\d+)(\.corrupt(?:-\d+)?)?')


def report(workdir: pathlib.Path, overrides: list[str], trust: bool) -> None:
    """Prints what is good and what is not.

    Raises:
      UsageError: there is no run.
      StorageError: a checkpoint is damaged.
    """
    del trust
    if overrides:
        raise UsageError(f'--config.{overrides[0]} has no use in --mode=verify', 'leave it out')
    directory = RunDirectory(workdir)
    folders = [folder for folder in (directory.checkpoints, directory.best) if folder.is_dir()]
    if not folders:
        raise UsageError(f'{workdir} holds no checkpoint', 'give the --workdir of a run that saved one')
    with contextlib.ExitStack() as stack:
        may_rename = True
        try:
            stack.enter_context(directory.lock.held())
        except UsageError as error:
            may_rename = False
            print(f'note: {str(error).splitlines()[0]}: nothing is renamed')
        damaged = [f'{folder.name}/{name}' for folder in folders for name in scrub(folder, may_rename)]
    if damaged:
        raise StorageError(f'{len(damaged)} damaged: {", ".join(damaged)}', 'the same command goes on from the newest good one')


def scrub(folder: pathlib.Path, may_rename: bool) -> list[str]:
    """Proves every checkpoint in `folder`, prints a line for each, and returns the names of the damaged ones."""
    checkpoints = Checkpoints(folder, writable=False)
    damaged, good, returning = [], False, []
    found = [match for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    for match in sorted(found, key=lambda match: int(match[1])):
        name = match[0]
        try:
            print(f'{folder.name}/{name}  {checkpoints.verify(name)}', flush=True)
        except CorruptError as error:
            print(f'{folder.name}/{name}  DAMAGED: {error}', flush=True)
            damaged.append(name)
            if may_rename and not match[2]:
                checkpoints.put_away(int(name))
            continue
        good |= not match[2]
        if match[2] and not (folder / match[1]).exists():
            returning.append(match)
    if may_rename and not good and returning:
        name, step = returning[-1][0], returning[-1][1]
        (folder / name).rename(folder / step)
        print(f'{folder.name}/{step}  has its name back')
    return damaged
