"""Damage to every file of a checkpoint, and what a restore makes of it.

`python -m bench.soak --corruptions=N` counts them; `tests/train/test_checkpoint.py` does a few of each kind at every commit. A
restore is *silently wrong* when it gives a state that is not, bit for bit, the one that was saved at the step it names.
"""

import collections
import contextlib
import gc
import os
import pathlib
import random
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.core import leaves
from research.train import array_store
from research.train.checkpoint import Checkpoints
from research.train.state import TrainState


def flip(path: pathlib.Path, rng: random.Random) -> None:
    """Turns one bit."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: pathlib.Path, rng: random.Random) -> None:
    """Cuts the end off."""
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def zero(path: pathlib.Path, rng: random.Random) -> None:
    """Loses a block of up to 512 bytes, as a disk does: zeros."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    size = min(512, len(data) - start)
    data[start : start + size] = bytes(size)
    path.write_bytes(data)


def swap(path: pathlib.Path, rng: random.Random) -> None:
    """Exchanges two blocks of up to 64 bytes."""
    data = bytearray(path.read_bytes())
    size = max(1, min(64, len(data) // 2))
    a, b = rng.randrange(len(data) - size + 1), rng.randrange(len(data) - size + 1)
    one, two = bytes(data[a : a + size]), bytes(data[b : b + size])
    data[a : a + size], data[b : b + size] = two, one
    path.write_bytes(data)


def append(path: pathlib.Path, rng: random.Random) -> None:
    """Adds bytes at the end."""
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 64)))


def empty(path: pathlib.Path, rng: random.Random) -> None:
    """Leaves nothing in it."""
    del rng
    path.write_bytes(b'')


def delete(path: pathlib.Path, rng: random.Random) -> None:
    """Takes it away."""
    del rng
    path.unlink()


DAMAGES: tuple[Callable[[pathlib.Path, random.Random], None], ...] = (
    flip,
    flip,
    flip,
    truncate,
    zero,
    swap,
    append,
    empty,
    delete,
)


class Victim:
    """A folder with checkpoints of the steps 1 and 2 whose states are known; `hit` damages the newer one in a copy."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder / 'whole'
        self.states = {step: small_state(step) for step in (1, 2)}
        with Checkpoints(self.folder, keep=2) as checkpoints:
            for step, state in self.states.items():
                checkpoints.save(step, state, {'seconds': {'train': 1.0}})
        self.files = sorted(
            path.relative_to(self.folder).as_posix() for path in (self.folder / '2').rglob('*') if path.is_file()
        )
        self.abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.states[1])
        self.bits = {step: as_bytes(state) for step, state in self.states.items()}

    def hit(self, name: str, damage: Callable[[pathlib.Path, random.Random], None], rng: random.Random) -> tuple[str, str]:
        """Damages file `name` of step 2 and restores: what came of it with verification, and by Orbax alone.

        'fell back' (step 1, right), 'unharmed' (step 2, right), 'refused' (an error), 'SILENTLY WRONG', or 'no change' where
        the damage left the bytes as they were.
        """
        copy = self._damaged(name, damage, rng)
        return ('no change', 'no change') if copy is None else (self._verified(copy), self._bare(copy, name))

    def verified(self, name: str, damage: Callable[[pathlib.Path, random.Random], None], rng: random.Random) -> str:
        """As `hit`, but without Orbax alone."""
        copy = self._damaged(name, damage, rng)
        return 'no change' if copy is None else self._verified(copy)

    def _damaged(
        self, name: str, damage: Callable[[pathlib.Path, random.Random], None], rng: random.Random
    ) -> pathlib.Path | None:
        """A damaged copy; None if the damage changed nothing."""
        copy = self.folder.with_name('copy')
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder, copy)
        before = (copy / name).read_bytes()
        damage(copy / name, rng)
        return None if (copy / name).exists() and (copy / name).read_bytes() == before else copy

    def _verified(self, copy: pathlib.Path) -> str:
        with Checkpoints(copy, keep=2, writable=False, say=lambda text: None) as checkpoints:
            found = checkpoints.newest(self.abstract)
        if found is None:
            return 'refused'
        step, state, _ = found
        if as_bytes(state) != self.bits[step]:
            return 'SILENTLY WRONG'
        return 'unharmed' if step == 2 else 'fell back'

    def _bare(self, copy: pathlib.Path, name: str) -> str:
        """What Orbax alone makes of the newest step."""
        if name.endswith('manifest.json'):
            return 'no such file'
        tree = {key: getattr(self.abstract, key) for key in ('step', 'params', 'model_state', 'optimizer_state', 'extra')}
        try:
            found = TrainState(**array_store.restore(copy / '2' / 'state', tree))
        except Exception:  # noqa: BLE001 - any error is a refusal
            return 'refused'
        return 'unharmed' if as_bytes(found) == self.bits[2] else 'SILENTLY WRONG'


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps from the terminal what TensorStore's threads print about damaged files."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def small_state(step: int) -> TrainState:
    """A state of every kind of leaf: float32, bfloat16, integers, booleans, scalars, an average."""
    keys = jax.random.split(jax.random.key(step), 3)
    params = {
        # More than manifest.SMALL, so that only fingerprints prove what is in the data file.
        'dense': {'kernel': jax.random.normal(keys[0], (640, 480)), 'bias': jnp.zeros(480)},
        'half': jax.random.normal(keys[1], (33, 7), jnp.bfloat16),
    }
    return TrainState(
        step=jnp.int32(step),
        params=params,
        model_state={'batch_stats': {'mean': jax.random.normal(keys[2], (480,)), 'seen': jnp.arange(9) > step}},
        optimizer_state=optax.adamw(1e-3).init(params),
        extra={'ema': jax.tree.map(jnp.copy, params), 'skips': {'total': jnp.int32(step)}},
    )


def as_bytes(state: TrainState) -> dict[str, bytes]:
    """Every leaf's bits by name."""
    return {name: np.asarray(leaf).tobytes() for name, leaf in leaves.flat(state).items()}


def corruptions(folder: pathlib.Path, count: int, seed: int) -> dict[str, Any]:
    """Hits every file in turn with damages in random order: how often which outcome, verified and by Orbax alone."""
    rng, victim = random.Random(seed), Victim(folder)  # noqa: S311 - no secret
    verified, bare, done = collections.Counter(), collections.Counter(), 0
    with silenced():
        while done < count:
            for name in victim.files:
                outcome, alone = victim.hit(name, rng.choice(DAMAGES), rng)
                if outcome != 'no change':
                    verified[outcome] += 1
                    bare[alone] += 1
                    done += 1
        gc.collect()  # forgotten tasks of asyncio print as well
        time.sleep(0.5)
    return {'n': done, 'files': len(victim.files), 'verified': dict(verified), 'orbax alone': dict(bare)}
