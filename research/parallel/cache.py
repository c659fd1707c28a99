"""The persistent compilation cache, in a folder that only this user can write.

Who can write to a compilation cache can run code in the process that reads it, so a folder that others can write is refused.
"""

import os
import pathlib

import jax

from research.core.files import problem_of_folder as problem


def folder() -> pathlib.Path:
    """Where compiled programs are kept: $FULCRUM_CACHE, else the user's cache folder."""
    base = os.environ.get('FULCRUM_CACHE')
    return pathlib.Path(base) if base else pathlib.Path.home() / '.cache' / 'fulcrum' / 'xla'


def enable() -> str | None:
    """Turns the cache on; returns why, if it stays off (training goes on without it)."""
    path = folder()
    reason = problem(path)
    if reason:
        return f'no compilation cache: {reason}'
    jax.config.update('jax_compilation_cache_dir', str(path))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
    return None
