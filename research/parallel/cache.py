"""The persistent compilation cache, in a folder that only this user can enter.

    FULCRUM_CACHE=/scratch/me/cache python launch.py --config=configs/digits_cnn.py    # the second run compiles nothing

Who can write to a compilation cache can run code in the process that reads it, so a folder that others can write, or could
exchange, is refused. One that others can only read is closed to them.
"""

import contextlib
import grp
import os
import pathlib
import pwd
import stat
from collections.abc import Iterator

import jax

from research.core.files import problem_of_folder

MIN_COMPILE_S = 0.1  # what compiles in less is not worth a file


def folder() -> pathlib.Path:
    """Where compiled programs are kept: $FULCRUM_CACHE, else the user's cache folder."""
    base = os.environ.get('FULCRUM_CACHE')
    return pathlib.Path(base) if base else pathlib.Path.home() / '.cache' / 'fulcrum' / 'xla'


def problem(path: pathlib.Path) -> str | None:
    """Why `path` cannot be the cache; None if it can: it is made where it is missing, and has mode 0700 then."""
    _make_parents(path)
    reason = problem_of_folder(path) or _problem_above(path)
    if reason:
        return reason
    if path.lstat().st_uid != os.getuid():  # a link of another user, who may let it point elsewhere later
        return f'{path} belongs to another user; set FULCRUM_CACHE to a folder of your own'
    if path.stat().st_mode & 0o077:
        with contextlib.suppress(OSError):  # some file systems have no modes: there it may stay readable, as it is not writable
            path.chmod(0o700)
    return None


def _make_parents(path: pathlib.Path) -> None:
    """Makes what is missing above `path` so that only this user can write there, whatever the umask says."""
    with contextlib.suppress(OSError):  # `problem_of_folder` says what is wrong
        for parent in reversed([parent for parent in path.parents if not parent.exists()]):
            parent.mkdir(mode=0o755, exist_ok=True)


def _problem_above(path: pathlib.Path) -> str | None:
    """Who can write a folder above (without the sticky bit of /tmp) can put another one in the place of `path`."""
    for parent in _above(path):
        status = parent.stat()
        is_open = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid))
        if (is_open and not status.st_mode & stat.S_ISVTX) or status.st_uid not in (0, os.getuid()):
            return f'others can exchange {path}, for they can write {parent}; set FULCRUM_CACHE to a folder of your own'
    return None


def _is_private(group: int) -> bool:
    """Whether a group is this user's alone, as where every user has one and the umask is 002."""
    try:
        name, members = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return members.gr_name == name and set(members.gr_mem) <= {name}


def _above(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folders above `path` as it is written, and above what it is when links are followed."""
    yield from dict.fromkeys([*path.absolute().parents, *path.resolve().parents])


def enable() -> str | None:
    """Turns the cache on; returns why, if it stays off (training goes on without it)."""
    path = folder()
    reason = problem(path)
    if reason:
        other = jax.config.values['jax_compilation_cache_dir']  # JAX_COMPILATION_CACHE_DIR may name one
        if other and (other == str(path) or ('://' not in other and problem(pathlib.Path(other)))):
            jax.config.update('jax_compilation_cache_dir', None)
        return f'no compilation cache: {reason}'
    jax.config.update('jax_compilation_cache_dir', str(path))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', MIN_COMPILE_S)
    return None
