"""The persistent compilation cache, in a folder that only this user can write.

Who can write to a compilation cache can run code in the process that reads it, so a folder that others can write is refused.
"""

import os
import pathlib
import stat

import jax


def folder() -> pathlib.Path:
    """Where compiled programs are kept: $FULCRUM_CACHE, else the user's cache folder."""
    base = os.environ.get('FULCRUM_CACHE')
    return pathlib.Path(base) if base else pathlib.Path.home() / '.cache' / 'fulcrum' / 'xla'


def problem(path: pathlib.Path) -> str | None:
    """Why `path` cannot serve as a compilation cache; None if it can."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = path.stat()
    except OSError as error:
        return f'{path} cannot be made: {error.strerror}'
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f'{path} can be written by others; run: chmod 700 {path}'
    return None


def enable() -> str | None:
    """Turns the cache on; returns why, if it stays off (training goes on without it)."""
    path = folder()
    reason = problem(path)
    if reason:
        return f'no compilation cache: {reason}'
    jax.config.update('jax_compilation_cache_dir', str(path))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
    return None
