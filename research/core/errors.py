"""Errors with a fix, and the exit codes that schedulers act on.

Every expected failure is a `FulcrumError`: what is wrong, how to mend it, and the process's exit code. `launch.py` prints it
in at most three lines:

    error: model 'cnnn' does not exist
      fix: did you mean 'cnn'? known: cnn, mlp
"""

import difflib
import enum
from collections.abc import Iterable


class ExitCode(enum.IntEnum):
    """Exit codes of `launch.py`; an interface for Slurm, Kubernetes and shell loops."""

    DONE = 0
    USAGE = 2  # never retry: the command or the config is wrong
    STORAGE = 74
    STOPPED = 75  # stopped on request; the same command resumes
    NUMERICAL = 76
    PERMISSION = 77
    WATCHDOG = 124  # no progress within the bound of a phase; the same command resumes
    PEER_LOST = 134  # another process of this run is gone; the same command resumes (also what jax's own abort gives)


class FulcrumError(Exception):
    """An expected failure: `message` says what is wrong, `fix` what to do, `exit_code` what the scheduler sees."""

    exit_code = ExitCode.USAGE

    def __init__(self, message: str, fix: str = ''):
        super().__init__(message if not fix else f'{message}\n  fix: {fix}')
        self.message, self.fix = message, fix


class UsageError(FulcrumError):
    """The command line, the config or the data is not what the program can work with."""


class StorageError(FulcrumError):
    """The run directory cannot be read or written."""

    exit_code = ExitCode.STORAGE


class AccessError(FulcrumError):
    """The run directory may not be written by this user."""

    exit_code = ExitCode.PERMISSION


class StoppedError(FulcrumError):
    """The run stopped on request (Ctrl-C) after saving; the same command goes on."""

    exit_code = ExitCode.STOPPED


class NumericalError(FulcrumError):
    """Training cannot go on: the numbers are not finite."""

    exit_code = ExitCode.NUMERICAL


class PeerLostError(FulcrumError):
    """Another process of this run is gone, so that no step can be finished."""

    exit_code = ExitCode.PEER_LOST


class Interrupted(KeyboardInterrupt):
    """Raised by the signal handler where the main thread may be left at once; `name` is the signal's."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends by this error; 1 for one that nobody expects."""
    expected = isinstance(error, (FulcrumError, OSError, KeyboardInterrupt))
    return int(explain(error)[1]) if expected else 1


def explain(error: BaseException) -> tuple[str, ExitCode]:
    """What a failed command prints, at most two lines, and its exit code."""
    if isinstance(error, FulcrumError):
        return str(error), error.exit_code
    if isinstance(error, Interrupted):
        return f'stopped by {error.name}; nothing was lost\n  fix: the same command goes on', ExitCode.STOPPED
    if isinstance(error, KeyboardInterrupt):
        return 'ended at once\n  fix: the same command goes on from the last checkpoint', ExitCode.STOPPED
    code = ExitCode.PERMISSION if isinstance(error, PermissionError) else ExitCode.STORAGE
    return f'{error}\n  fix: see free space, quotas and permissions', code


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt `word`: the nearest known word if one is near, and at most twelve of those that exist."""
    known = sorted(set(known))
    listed = ', '.join(known[:12]) + (f', ... ({len(known)} in all)' if len(known) > 12 else '')
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f'did you mean {close[0]!r}? known: {listed}' if close else f'known: {listed}'
