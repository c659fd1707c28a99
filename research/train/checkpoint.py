"""Checkpoints of the whole experiment, by Orbax: one folder a step, written in the background.

Three items: `model` (parameters and model state: what another run can start from), `training` (step, optimiser, what the
wrappers keep) and `meta` (the clock, and the sums of an open log record). There is no data position: data are a function of
the step.

A checkpoint is restored *into* abstract arrays with shardings, so any number of devices can read it. Every leaf's name, shape
and dtype is compared first: nothing is cast, left out or made up.
"""

import contextlib
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from research.core import leaves
from research.core.errors import StorageError
from research.train.state import TrainState


class Checkpoints:
    """The checkpoints in one folder; `keep` of the newest stay. A context manager: at its end the last save is on disk."""

    def __init__(self, folder: pathlib.Path, keep: int = 1, writable: bool = True):
        self.folder = folder
        if writable:
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        else:  # it may belong to a run that is under way: nothing is touched
            options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
        handlers = {
            'model': ocp.StandardCheckpointHandler(),
            'training': ocp.StandardCheckpointHandler(),
            'meta': ocp.JsonCheckpointHandler(),
        }
        with _quiet(not writable):
            self._manager = ocp.CheckpointManager(folder.resolve(), options=options, item_handlers=handlers)

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> bool:
        """Saves the state after `step` steps, unless it is saved; returns as soon as the arrays are copied off the device."""
        if step in self._manager.all_steps():
            return False
        model, training = _split(state)
        arguments = {
            'model': ocp.args.StandardSave(model),
            'training': ocp.args.StandardSave(training),
            'meta': ocp.args.JsonSave(meta),
        }
        return self._guarded(lambda: self._manager.save(step, args=ocp.args.Composite(**arguments), force=True))

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of steps after `step`: they belong to a course that is run again."""
        for later in [s for s in self._manager.all_steps() if s > step]:
            self._guarded(lambda later=later: self._manager.delete(later))

    def latest(self) -> int | None:
        """The newest step on disk; None without any. Waits for a save that is under way."""
        self.wait()
        return self._manager.latest_step()

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and the meta data of a step, as arrays like `abstract` (shapes, dtypes and shardings).

        Raises:
          StorageError: the checkpoint cannot be read or does not fit; nothing is started afresh over it.
        """
        model, training = _split(abstract)
        self._compare(step, {'model': model, 'training': training})
        arguments = {
            'model': ocp.args.StandardRestore(model),
            'training': ocp.args.StandardRestore(training),
            'meta': ocp.args.JsonRestore(),
        }
        found = self._guarded(lambda: self._manager.restore(step, args=ocp.args.Composite(**arguments)))
        return _join(found.model, found.training), found.meta

    def read(self, step: int) -> tuple[dict[str, Any], Any]:
        """What a step holds of its model, as numpy arrays in the structure it was saved in, and the averaged parameters.

        {'params': ..., 'model_state': ...}, for another model to start from; the average is None where none was kept. Nothing
        else of the training is read.
        """
        saved = self._guarded(lambda: self._manager.item_metadata(step))
        if saved.get('model') is None or saved.get('training') is None:
            raise StorageError(f'{self.folder / str(step)} is not readable', 'give another run, or remove this checkpoint')
        model = self._read(step, 'model', dict(saved['model'].tree))
        average = saved['training'].tree.get('extra', {}).get('ema')
        return model, None if average is None else self._read(step, 'training', {'extra': {'ema': average}})['extra']['ema']

    def _read(self, step: int, item: str, tree: Any) -> Any:
        """The leaves of an item that `tree` names, as numpy arrays."""
        arguments = ocp.args.PyTreeRestore(
            item=tree,
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree),
            partial_restore=True,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return self._guarded(lambda: reader.restore(self.folder.resolve() / str(step) / item, args=arguments))

    def wait(self) -> None:
        """Returns when every save is on disk."""
        self._guarded(self._manager.wait_until_finished)

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, *_: Any) -> None:
        """Waits for the last save and ends the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _guarded(self, action: Any) -> Any:
        """Runs an action of Orbax; what the disk refuses becomes a storage error that names the folder."""
        try:
            return action()
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).split('\n')[0][:200]
            raise StorageError(
                f'checkpoints in {self.folder}: {reason}', 'see free space and permissions; nothing was deleted'
            ) from error

    def _compare(self, step: int, items: dict[str, Any]) -> None:
        """Refuses a checkpoint whose leaves differ from `items`, with a list of what differs."""
        saved = self._guarded(lambda: self._manager.item_metadata(step))
        problems = []
        for item, wanted in items.items():
            if saved.get(item) is None:
                raise StorageError(
                    f'{self.folder / str(step)} has no readable {item!r}',
                    f'remove {self.folder / str(step)} to go on from the step before',
                )
            problems += _mismatches(_described(saved[item].tree), _described(wanted))
        if problems:
            listed = '; '.join(problems[:4]) + (f'; and {len(problems) - 4} more' if len(problems) > 4 else '')
            raise StorageError(
                f'{self.folder / str(step)} does not fit this model: {listed}', 'use the config it was made with'
            )


@contextlib.contextmanager
def _quiet(is_quiet: bool) -> Iterator[None]:
    """Keeps Orbax from warning that what was opened read-only is read-only."""
    log = logging.getLogger('absl')
    before = log.level
    log.setLevel(logging.ERROR if is_quiet else before)
    try:
        yield
    finally:
        log.setLevel(before)


def _split(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The items of a state."""
    model = {'params': state.params, 'model_state': state.model_state}
    training = {'step': state.step, 'optimizer_state': state.optimizer_state, 'extra': state.extra}
    return model, training


def _join(model: dict[str, Any], training: dict[str, Any]) -> TrainState:
    return TrainState(**model, **training)


def _described(tree: Any) -> dict[str, str]:
    """'float32(3, 3)' for each leaf by name."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {leaves.name(path): f'{leaf.dtype}{tuple(leaf.shape)}' for path, leaf in flat}


def _mismatches(saved: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """What differs, leaf by leaf, in words."""
    return (
        [f'{name} is missing' for name in wanted if name not in saved]
        + [f'{name} is not expected' for name in saved if name not in wanted]
        + [f'{n} is {saved[n]}, expected {wanted[n]}' for n in wanted if n in saved and saved[n] != wanted[n]]
    )
