"""Checkpoints of the whole experiment: one folder a step, written in the background, believed only when it is proved.

    folder/1200/state/...          every array of the state, by Orbax (`array_store.py`)
    folder/1200/manifest.json      what must be in it, bit for bit; written last (`manifest.py`)
    folder/1400.tmp/               being written, or left over by a death: removed at the next start
    folder/1000.corrupt/           it did not hold what its manifest says: put away, never deleted

The truth about what exists is what the manifests on the disk say, never a memory of what was saved. A save goes into `N.tmp`,
which takes the name `N` when everything is down on the disk. It may fail (a full disk): then nothing but `N.tmp` is lost, and
`failure` says so. A checkpoint is restored *into* abstract arrays with shardings, so any number of devices can read it; names,
shapes and dtypes are compared first (nothing is cast, left out or made up), and the fingerprint of every leaf afterwards.

*Permanent* checkpoints are the newest `keep`; a *temporary* one lives until the next checkpoint of any kind is complete.
"""

import dataclasses
import errno
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from research.core import files, leaves
from research.core.errors import NumericalError, StorageError
from research.parallel import hosts
from research.train import array_store, manifest
from research.train.fingerprint import Fingerprints
from research.train.manifest import CorruptError
from research.train.state import TrainState

PERMANENT, TEMPORARY = 'permanent', 'temporary'
NUMBERS_FIX = 'lower config.optimizer.learning_rate, set config.optimizer.clip=global_norm, or look at the data'
STATE = 'state'


@dataclasses.dataclass
class Failure:
    """Saves that fail: since when (`time.monotonic`), how often, the last attempt, and why."""

    since: float
    reason: str
    count: int = 1
    last: float = 0.0


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints in one folder. A context manager: at its end the last save is complete, or has failed.

    Args:
      folder: made when first saved into.
      keep: how many permanent checkpoints stay.
      writable: False touches nothing: the folder may belong to a run that is under way.
      config: digest of the experiment, kept in the manifests.
      say: is told what a person must know.
      event: is told what goes into `events.jsonl`.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        keep: int = 1,
        writable: bool = True,
        config: str = '',
        say: Callable[[str], None] = _tell,
        event: Callable[..., None] | None = None,
    ):
        self.folder, self.keep, self.writable, self.config, self.say = folder, keep, writable, config, say
        self.event = event or (lambda kind, **details: None)
        self.failure: Failure | None = None
        self._store = array_store.ArrayStore()
        self._commit: threading.Thread | None = None
        self._refused: set[int] = set()  # steps whose folders are to go
        if writable and hosts.is_main():
            self._remove_leftovers()

    def steps(self) -> list[int]:
        """The steps that have a folder, in order; whether it holds what it should, only a restore proves."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdigit())

    def latest(self) -> int | None:
        """The newest step with a manifest that is right; None without any. Waits for a save that is under way."""
        self.wait()
        return next((step for step in reversed(self.steps()) if self._described(step) is not None), None)

    def meta(self, step: int) -> dict[str, Any]:
        """What was kept beside the arrays of a step; empty if its manifest is not right."""
        return (self._described(step) or {'meta': {}})['meta']

    def remains(self) -> list[str]:
        """The names of what was put away as corrupt."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path.name for path in found if '.corrupt' in path.name)

    def save(self, step: int, state: TrainState, meta: dict[str, Any], kind: str = PERMANENT) -> bool:
        """Saves the state after `step` steps, unless it is saved; returns as soon as the arrays are copied off the device.

        A failure, of this save or of the one before, is not raised: `failure` tells of it.

        Raises:
          NumericalError: the state holds NaN; nothing is written.
        """
        self.wait()
        if not hosts.is_alone():
            hosts.gather(None)  # the background threads of all are done
            self._remove_refused()
        tree = _tree(state)
        found = Fingerprints(tree)
        if bad := found.not_numbers():
            raise NumericalError(f'the state holds NaN ({bad[0]}): it is not saved', NUMBERS_FIX)
        if hosts.share(step in self.steps()):
            return self._promote(step, kind)
        described = {
            name: {'shape': list(leaf.shape), 'dtype': str(leaf.dtype), 'fingerprint': digits}
            for (name, leaf), digits in zip(leaves.flat(tree).items(), found.by_name().values(), strict=True)
        }
        content = {'step': step, 'kind': kind, 'config': self.config, 'leaves': described, 'meta': files.finite(meta)}
        target = self.folder / f'{step}.tmp'
        if problem := hosts.share(self._prepared(target, sum(leaf.nbytes for leaf in leaves.flat(tree).values()))):
            self.refuse(step, problem)  # in all processes, before Orbax has them wait for each other
            return False
        try:
            self._store.begin(target / STATE, tree)
        except Exception as error:  # noqa: BLE001 - the disk, or Orbax about the disk: reported by `failure`
            self.refuse(step, _reason(error))
            return False
        self._commit = threading.Thread(target=self._finish, args=(step, content), name='checkpoint', daemon=True)
        self._commit.start()
        return True

    def refuse(self, step: int, reason: str) -> None:
        """Step `step` cannot be saved: `failure` tells, and what there is of it will be deleted."""
        now, first = time.monotonic(), self.failure
        self.failure = Failure(now, reason, 1, now) if first is None else Failure(first.since, reason, first.count + 1, now)
        self._store.close()
        self._refused.add(step)
        if hosts.is_alone():
            self._remove_refused()
        self.say(f'warning: step {step} could not be saved in {self.folder}: {reason}; training goes on')
        self.event('save_failed', step=step, folder=self.folder.name, reason=reason)

    def wait(self) -> None:
        """Returns when no save is under way."""
        if self._commit is not None:
            self._commit.join()
            self._commit = None

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of steps after `step`: they belong to a course that is run again."""
        self.wait()
        if hosts.is_main():
            for later in [s for s in self.steps() if s > step]:
                self._delete(later)

    def newest(self, abstract: TrainState, until: int | None = None) -> tuple[int, TrainState, dict[str, Any]] | None:
        """(step, state, meta) of the newest checkpoint that is proved good; None if there never was one.

        One that is not good is put away with a loud line, and the one before is tried. `until`: no newer step than this.

        Raises:
          StorageError: there are checkpoints, but none is good; or a good one does not fit `abstract`.
        """
        self.wait()
        tried: set[int] = set()
        while True:
            left = [s for s in self.steps() if s not in tried and (until is None or s <= until)]
            step = hosts.share(left[-1] if left else None)
            if step is None:
                break
            try:
                return step, *self._restored(step, abstract)
            except CorruptError as error:
                tried.add(step)
                self._damaged(step, error)
        if tried or self.remains():
            raise StorageError(
                f'no checkpoint in {self.folder} is good; the damaged ones are kept as *.corrupt',
                'restore one from a backup, or give another --workdir to begin anew',
            )
        return None

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and the meta data of one step, as arrays like `abstract`.

        Raises:
          StorageError: the checkpoint is damaged, or does not fit.
        """
        self.wait()
        try:
            return self._restored(step, abstract)
        except CorruptError as error:
            raise StorageError(f'{self.folder / str(step)} is damaged: {error}', 'use another checkpoint') from error

    def read(self, step: int) -> tuple[dict[str, Any], Any]:
        """What a step holds of its model, as numpy arrays in the structure it was saved in, and the averaged parameters.

        {'params': ..., 'model_state': ...}, for another model to start from; the average is None where none was kept. Nothing
        else of the training is read.

        Raises:
          StorageError: the checkpoint is damaged.
        """
        path = self.folder / str(step)
        try:
            described = self._checked(step)
            whole = array_store.structure(path / STATE)
            wanted = {name: whole[name] for name in ('params', 'model_state') if name in whole}
            if 'ema' in whole.get('extra', {}):
                wanted['extra'] = {'ema': whole['extra']['ema']}
            found = array_store.read(path / STATE, wanted)
            _prove(found, described['leaves'])
        except CorruptError as error:
            raise StorageError(f'{path} is damaged: {error}', 'give another run, or restore this one') from error
        average = found.pop('extra', {}).get('ema')
        return {'model_state': {}, **found}, average

    def verify(self, name: str) -> str:
        """Proves a checkpoint good without a model: files, and every leaf's fingerprint from the bytes on the disk.

        Args:
          name: of its folder, '1200' or '1200.corrupt'.

        Returns: what it holds, in words.

        Raises:
          CorruptError: it is not.
        """
        described = self._checked(name)
        path = self.folder / name / STATE
        found = array_store.read(path, array_store.structure(path))
        if missing := set(described['leaves']) - set(leaves.flat(found)):
            raise CorruptError(f'{sorted(missing)[0]} is missing')
        _prove(found, described['leaves'])
        size = sum(file['size'] for file in described['files'].values())
        return f'{described["kind"]}  {len(described["leaves"])} leaves, {size / 1e6:.3g} MB  good'

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        self.wait()
        self._store.close()

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _finish(self, step: int, content: dict[str, Any]) -> None:
        """In the background: waits for the arrays, and makes them a checkpoint."""
        try:
            self._store.finish()
            if hosts.is_main():
                temporary = self.folder / f'{step}.tmp'
                manifest.write(temporary, content)
                temporary.rename(self.folder / str(step))
                files.sync_folder(self.folder)
        except Exception as error:  # noqa: BLE001 - reported by `failure`
            self.refuse(step, _reason(error))
            return
        if self.failure is not None:
            self.say(f'saved again: step {step} is on disk in {self.folder}')
        self.failure = None
        if hosts.is_main():
            self._retire()

    def _prepared(self, target: pathlib.Path, size: int) -> str | None:
        """An empty folder to write into; why there is none, in words."""
        if not hosts.is_main():
            return None
        try:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            _check_room(target, size)
        except OSError as error:
            return _reason(error)
        return None

    def _remove_refused(self) -> None:
        """Deletes what failed saves have left. Under the hands of another process that still writes it would be too early."""
        for step in self._refused if hosts.is_main() else ():
            shutil.rmtree(self.folder / f'{step}.tmp', ignore_errors=True)
        self._refused.clear()

    def _promote(self, step: int, kind: str) -> bool:
        """Makes a temporary checkpoint of this very step permanent. Returns False: nothing was saved."""
        self.failure = None  # an earlier step could not be saved, but this one is
        described = self._described(step) if hosts.is_main() else None
        if described is not None and kind == PERMANENT and described['kind'] == TEMPORARY:
            try:
                manifest.rewrite(self.folder / str(step), {**described, 'kind': PERMANENT})
            except OSError as error:
                self.refuse(step, _reason(error))
        return False

    def _retire(self) -> None:
        """Deletes what the policies no longer keep."""
        kinds = {step: found['kind'] for step in self.steps() if (found := self._described(step)) is not None}
        newest = max(kinds, default=None)
        permanent = [step for step, kind in kinds.items() if kind == PERMANENT]
        keep = {newest, *permanent[-self.keep :]}
        for step in kinds:
            if step not in keep:
                self._delete(step)

    def _delete(self, step: int) -> None:
        """By a rename first: what is half deleted no longer has the name of a checkpoint."""
        gone = self.folder / f'{step}.deleted.tmp'
        shutil.rmtree(gone, ignore_errors=True)
        try:
            (self.folder / str(step)).rename(gone)
        except OSError as error:
            self.say(f'warning: {self.folder / str(step)} could not be deleted: {error.strerror}')
        shutil.rmtree(gone, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob('*tmp*') if self.folder.is_dir() else ():
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(f'*/.{manifest.NAME}.*.tmp') if self.folder.is_dir() else ():  # of a torn `rewrite`
            path.unlink(missing_ok=True)

    def _damaged(self, step: int, error: CorruptError) -> None:
        """Tells of a checkpoint that is none, and puts it away."""
        path = self.folder / str(step)
        self.say(f'\nERROR: checkpoint {path} is damaged: {error}')
        self.event('corrupt', step=step, folder=self.folder.name, reason=str(error))
        if self.writable and hosts.is_main():
            self.say(f'       it is kept as {self.put_away(step)}; trying the checkpoint before it')
        elif not self.writable:
            self.say('       it is left as it is; trying the checkpoint before it')

    def put_away(self, step: int) -> str:
        """Takes the name of a checkpoint from what is none; returns the new name."""
        numbered = (f'{step}.corrupt' if i == 0 else f'{step}.corrupt-{i}' for i in range(1000))
        name = next(name for name in numbered if not (self.folder / name).exists())
        (self.folder / str(step)).rename(self.folder / name)
        files.sync_folder(self.folder)
        return name

    def _described(self, step: int | str) -> dict[str, Any] | None:
        """The manifest of a step; None if it is not right."""
        try:
            return manifest.read(self.folder / str(step))
        except CorruptError:
            return None

    def _checked(self, step: int | str) -> dict[str, Any]:
        """The manifest of a step whose files are as it says."""
        path = self.folder / str(step)
        described = manifest.read(path)
        if described['step'] != int(str(step).partition('.')[0]):
            raise CorruptError(f'it is of step {described["step"]}')
        manifest.check_files(path, described)
        return described

    def _restored(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        described = _together(lambda: self._checked(step))
        wanted = _tree(abstract)
        _compare(self.folder / str(step), described['leaves'], wanted)
        found = _together(lambda: array_store.restore(self.folder / str(step) / STATE, wanted))
        _prove(found, described['leaves'])
        return TrainState(**found), described['meta']


def _tree(state: TrainState) -> dict[str, Any]:
    """What is stored of a state; its leaves are named 'params/Dense_0/kernel'."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _reason(error: Exception) -> str:
    return ' '.join(str(error).split())[:200] or type(error).__name__


def _check_room(folder: pathlib.Path, needed: int) -> None:
    """Raises OSError where the disk is too full for so many bytes: Orbax would find out half-way, and in many more words."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f'{needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free')


def _together(action: Callable[[], Any]) -> Any:
    """The result of an action in every process, or `CorruptError` in every process if it failed so in one."""
    error = result = None
    try:
        result = action()
    except CorruptError as found:
        error = found
    if not hosts.all_true(error is None):
        raise error or CorruptError('another process of this run cannot read it')
    return result


def _prove(found: Any, described: dict[str, Any]) -> None:
    """Compares the fingerprint of every leaf that was read with the one that was saved."""
    wrong = [
        name for name, digits in Fingerprints(found).by_name().items() if described.get(name, {}).get('fingerprint') != digits
    ]
    if wrong:
        more = f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''
        raise CorruptError(f'{wrong[0]}{more} does not hold what was saved (fingerprints differ)')


def _compare(path: pathlib.Path, described: dict[str, Any], wanted: Any) -> None:
    """Refuses a checkpoint whose leaves differ from `wanted`, with a list of what differs."""
    saved = {name: f'{leaf["dtype"]}{tuple(leaf["shape"])}' for name, leaf in described.items()}
    here = {name: f'{leaf.dtype}{tuple(leaf.shape)}' for name, leaf in leaves.flat(wanted).items()}
    problems = (
        [f'{name} is missing' for name in here if name not in saved]
        + [f'{name} is not expected' for name in saved if name not in here]
        + [f'{n} is {saved[n]}, expected {here[n]}' for n in here if n in saved and saved[n] != here[n]]
    )
    if problems:
        listed = '; '.join(problems[:4]) + (f'; and {len(problems) - 4} more' if len(problems) > 4 else '')
        raise StorageError(f'{path} does not fit this model: {listed}', 'use the config it was made with')
