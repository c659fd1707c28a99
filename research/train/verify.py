"""`--mode=verify`: reads every checkpoint of a run and proves it, byte by byte; needs no model and no device.

    checkpoints/1000  permanent  31 leaves, 1.2 MB  good
    checkpoints/1200  DAMAGED: params/Dense_0/kernel does not hold what was saved (fingerprints differ); renamed to 1200.corrupt

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
        found = {folder.name: scrub(folder, may_rename) for folder in folders}
    damaged = [f'{folder}/{name}' for folder, (_, names) in found.items() for name in names]
    if damaged:
        if found.get('checkpoints', (0, []))[0]:
            fix = 'training goes on from the newest good one'
        else:
            fix = 'restore a checkpoint from a backup, or train anew in another --workdir'
        raise StorageError(f'{len(damaged)} damaged: {", ".join(damaged)}', fix)


def scrub(folder: pathlib.Path, may_rename: bool) -> tuple[int, list[str]]:
    """Proves every checkpoint in `folder` and prints a line for each; how many are good, and the names of those that are not.

    What was put away earlier and is damaged is told of, but counts no more as long as there is a good one.
    """
    checkpoints = Checkpoints(folder, writable=False)
    good, damaged, old, returning = 0, [], [], []
    matches = [match for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    for match in sorted(matches, key=lambda match: int(match[1])):
        name, step, is_away = match[0], match[1], bool(match[2])
        try:
            print(f'{folder.name}/{name}  {checkpoints.verify(name)}', flush=True)
        except CorruptError as error:
            if is_away:
                print(f'{folder.name}/{name}  damaged, put away earlier: {error}', flush=True)
                old.append(name)
            else:
                renamed = f'; renamed to {checkpoints.put_away(int(name))}' if may_rename else ''
                print(f'{folder.name}/{name}  DAMAGED: {error}{renamed}', flush=True)
                damaged.append(name)
            continue
        good += not is_away
        if is_away and not (folder / step).exists():
            returning.append((name, step))
    if may_rename and not good and returning:
        name, step = returning[-1]
        (folder / name).rename(folder / step)
        print(f'{folder.name}/{step}  has its name back')
        good = 1
    if old and good:
        print(f'note: nothing needs {", ".join(f"{folder.name}/{name}" for name in old)} any more: delete it when you like')
    return good, damaged + ([] if good else old)
