"""The run directory: what a run writes, by name. Reading it needs neither jax nor the code that wrote it.

run.json         what was asked for and with what: config, command, versions, devices, data fingerprint; before step 0
metrics.jsonl    one line a record {"step", "split", "time", NAME: value}: the source of truth
events.jsonl     one line an event: start (and from where), compile, save, corrupt, rollback, signal, exit
checkpoints/     one folder a step; best/: the best step; tensorboard/: event files
rollbacks.json   the batches that were left out because the numbers went wrong there; failure/: why the run gave up
bad_records.jsonl  the records of the data that could not be read and were left out; .1.jsonl of process 1
stacks.txt       where every thread was when the watchdog ended the process
.lock            who trains here
summary.json     at the end: status, metrics, and what the run spent
"""

import json
import os
import pathlib
import shutil
import time
from typing import Any

from research.core import fields, files, schema
from research.core.errors import AccessError, StorageError, UsageError
from research.core.journal import Journal, cut
from research.core.lock import Lock
from research.core.redact import redact
from research.core.schema import Experiment


class RunDirectory:
    """Names and record files of one run; the folder is made by `create`."""

    def __init__(self, path: files.Path):
        self.path = pathlib.Path(path)
        self.run = self.path / 'run.json'
        self.metrics = self.path / 'metrics.jsonl'
        self.events = self.path / 'events.jsonl'
        self.summary = self.path / 'summary.json'
        self.checkpoints = self.path / 'checkpoints'
        self.best = self.path / 'best'
        self.tensorboard = self.path / 'tensorboard'
        self.rollbacks = self.path / 'rollbacks.json'
        self.bad_records = self.path / 'bad_records.jsonl'
        self.failure = self.path / 'failure' / 'bundle.json'
        self.stacks = self.path / 'stacks.txt'
        self.lock = Lock(self.path / '.lock')
        self._events = Journal(self.events)
        self.is_silent = False  # in the processes of a run that leave the telling to the main one

    def create(self) -> None:
        """Makes the folder.

        Raises:
          AccessError: the user may not write there.
          StorageError: it cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f'.writable-{os.getpid()}'
            probe.touch()
            probe.unlink(missing_ok=True)
        except PermissionError as error:
            raise AccessError(f'you may not write to the run directory {self.path}', 'give another --workdir') from error
        except OSError as error:
            raise StorageError(
                f'the run directory {self.path} cannot be written: {error.strerror}', 'give another --workdir'
            ) from error

    def read_run(self) -> dict[str, Any] | None:
        """What `run.json` says; None before the first start."""
        try:
            record = files.read_json(self.run) if self.run.exists() else None
            return None if record is None else {'config': record['config'], **record}
        except (ValueError, KeyError) as error:
            raise StorageError(f'{self.run} is damaged', 'give another --workdir, or mend the file by hand') from error

    def read_summary(self) -> dict[str, Any] | None:
        """What `summary.json` says; None before the end."""
        return files.read_json(self.summary) if self.summary.exists() else None

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records of `metrics.jsonl`."""
        return list(files.read_json_lines(self.metrics)) if self.metrics.exists() else []

    def has_progress(self) -> bool:
        """Whether there is something to lose: a checkpoint, be it damaged, or a summary."""
        saved = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return self.summary.exists() or any(path.name.partition('.corrupt')[0].isdigit() for path in saved)

    def event(self, kind: str, /, **details: Any) -> None:
        """Appends one event with the time in seconds since 1970. A full disk is not told of here: nothing depends on events."""
        if not self.is_silent:
            self._events.append({'event': kind, 'time': time.time(), **details})

    def keep_metrics_until(self, step: int) -> None:
        """Drops the records after `step`: the steps that follow are run, and recorded, again."""
        if self.metrics.exists() and not self.is_silent:
            cut(self.metrics, lambda record: record['step'] <= step)

    def clear(self) -> None:
        """Deletes what an earlier run has left that saved nothing."""
        for path in (self.metrics, self.events, self.rollbacks, self.stacks, *self.path.glob('bad_records*.jsonl')):
            path.unlink(missing_ok=True)
        for path in (self.best, self.tensorboard, self.failure.parent):
            shutil.rmtree(path, ignore_errors=True)


def digest(experiment: Experiment) -> str:
    """A fingerprint of the whole config."""
    return files.digest([json.dumps(fields.to_plain(experiment), sort_keys=True)])


def changes_of(experiment: Experiment, run: dict[str, Any]) -> list[schema.Change]:
    """What differs from the config in `run.json` so that one cannot go on from the other."""
    # A recorded config has no secrets in it: it is compared with the new one without them.
    recorded, wanted = schema.resolve(run['config']), schema.resolve(redact(fields.to_plain(experiment)))
    return [change for change in schema.differences(recorded, wanted) if not change.resumable]


def finished(experiment: Experiment, directory: RunDirectory, allow_change: bool) -> dict[str, Any] | None:
    """The summary if this very run is complete. Needs no jax, so that the answer comes at once.

    Raises:
      UsageError: the run directory belongs to another experiment.
    """
    run = directory.read_run()
    if run is None or not directory.has_progress():
        return None
    changes = changes_of(experiment, run)
    if changes and not allow_change:
        listed = ', '.join(str(change) for change in changes[:3]) + (', ...' if len(changes) > 3 else '')
        raise UsageError(
            f'{directory.path} holds a run with another config: {listed}',
            'give another --workdir, or go on with the new config by --allow_config_change',
        )
    summary = directory.read_summary()
    return summary if summary is not None and summary['status'] == 'completed' and not changes else None
