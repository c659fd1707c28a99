"""Runs of the command line that are hit by faults: what the soak and the tests of reliability are made of.

base = Course(folder / 'base').run()                    # a run that nothing happens to
course = Course(folder / 'hit', processes=2)
course.life(kill_after=3.0)                             # SIGKILL to one process after 3 s
course.run()                                            # the same command again, until it is done
assert course.proof() == base.proof()                   # state, records and examples, bit for bit
"""

import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from research.core import files
from research.train import manifest

ROOT = pathlib.Path(__file__).parents[1]
SMALL = (
    '--config=configs/digits_cnn.py', '--config.model=mlp', '--config.train.duration=300 steps', '--config.log.every=1 step',
    '--config.checkpoint.every=20 steps', '--config.evaluate.every=50 steps', '--config.log.model_table=false',
    '--config.log.tensorboard=false', '--config.checkpoint.best=validation/loss',
)  # fmt: skip
TIMED = ('time', 'examples_per_second', 'tokens_per_second', 'mfu')
IDS = re.compile(r'^ids (\d+) (\w+)$', re.MULTILINE)


@dataclasses.dataclass
class Life:
    """How the processes of one life of a run ended: exit codes, what they said, and when (seconds since 1970)."""

    codes: list[int]
    told: list[str]
    ended: list[float]
    seconds: float


@dataclasses.dataclass
class Course:
    """One run directory and the lives it has had; `arguments` come after the small default command."""

    workdir: pathlib.Path
    processes: int = 1
    devices: int = 1
    arguments: tuple[str, ...] = ()
    lives: list[Life] = dataclasses.field(default_factory=list)

    def life(
        self, faults: str | tuple[str, ...] = '', kill_after: float | None = None, victim: int = 0, limit: float = 120.0
    ) -> Life:
        """Starts the command once; `kill_after` so many seconds SIGKILL goes to process `victim`, if it still runs.

        Args:
          faults: of process `victim`, or of each process.
          kill_after: seconds from the start.
          victim: a process.
          limit: seconds.

        Raises:
          TimeoutError: it was not gone after `limit` seconds; its processes are killed.
        """
        start, port = time.monotonic(), free_port()
        each = faults if isinstance(faults, tuple) else tuple(faults if i == victim else '' for i in range(self.processes))
        running = [self._start(i, port, own) for i, own in enumerate(each)]
        # Through pipes, for a limit on the size of files must not hit what the processes say.
        told: list[list[str]] = [[] for _ in running]
        readers = [
            threading.Thread(target=text.extend, args=(process.stdout,), daemon=True)
            for text, process in zip(told, running, strict=True)
        ]
        for reader in readers:
            reader.start()
        ended = [0.0] * self.processes
        try:
            while any(process.poll() is None for process in running):
                now = time.monotonic() - start
                if now > limit:
                    raise TimeoutError(f'{self.workdir}: not gone after {limit} s\n' + ''.join(told[0])[-2000:])
                if kill_after is not None and now >= kill_after:
                    running[victim].send_signal(signal.SIGKILL)
                    kill_after = None
                ended = [t or (time.time() if p.poll() is not None else 0.0) for t, p in zip(ended, running, strict=True)]
                time.sleep(0.01)
        finally:
            for process, reader in zip(running, readers, strict=True):
                process.kill()
                process.wait()
                reader.join()
                process.stdout.close()  # type: ignore[union-attr] - it is a pipe
        ended = [t or time.time() for t in ended]
        life = Life(
            [process.returncode for process in running], [''.join(text) for text in told], ended, time.monotonic() - start
        )
        self.lives.append(life)
        return life

    def run(self, most: int = 5) -> 'Course':
        """Starts the command until it is done.

        Raises:
          RuntimeError: it is not, after `most` lives.
        """
        for _ in range(most):
            if set(self.life().codes) == {0}:
                return self
        raise RuntimeError(
            f'{self.workdir}: not done after {most} lives: {self.lives[-1].codes}\n{self.lives[-1].told[0][-3000:]}'
        )

    def proof(self) -> dict[str, Any]:
        """What must be the same however often the run was hit: final states, records, results, examples of every step."""
        return {
            'state': {folder: leaves(newest(self.workdir / folder)) for folder in ('checkpoints', 'best')},
            'records': records(self.workdir),
            'results': {k: files.read_json(self.workdir / 'summary.json')[k] for k in ('step', 'metrics', 'best')},
            'ids': self.ids(),
        }

    def ids(self) -> list[list[str]]:
        """For each process the examples of each step, in order.

        Raises:
          AssertionError: a step had other examples in one life than in another.
        """
        every = []
        for i in range(self.processes):
            found: dict[int, str] = {}
            for life in self.lives:
                for step, digest in IDS.findall(life.told[i]):
                    assert found.setdefault(int(step), digest) == digest, f'step {step} had other examples'
            every.append([found[step] for step in sorted(found)])
        return every

    def leftovers(self) -> list[str]:
        """What should not lie in the run directory of a run that is over."""
        return [str(path) for path in self.workdir.rglob('*') if 'tmp' in path.name]

    def _start(self, index: int, port: int, faults: str) -> subprocess.Popen:
        distributed = {
            'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_NUM_PROCESSES': str(self.processes),
            'JAX_PROCESS_ID': str(index),
        }  # fmt: skip
        environment = {
            **os.environ,
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': f'--xla_force_host_platform_device_count={self.devices}',
            'FULCRUM_FAULTS': ','.join(filter(None, ['ids@0-1000000', faults])),
            **(distributed if self.processes > 1 else {}),
        }
        command = [sys.executable, str(ROOT / 'launch.py'), *SMALL, f'--workdir={self.workdir}', *self.arguments]
        return subprocess.Popen(  # noqa: S603 - our own command
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True, errors='replace'
        )


def newest(folder: pathlib.Path) -> pathlib.Path:
    """The folder of the newest checkpoint."""
    return max((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def leaves(checkpoint: pathlib.Path) -> dict[str, Any]:
    """Step and leaves of a checkpoint with their fingerprints, from its manifest."""
    described = manifest.read(checkpoint)
    return {'step': described['step'], 'leaves': described['leaves']}


def records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a run without what the clock has in them.

    Raises:
      AssertionError: a step is recorded twice.
    """
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    keys = [(line['split'], line['step']) for line in lines]
    assert len(keys) == len(set(keys)), 'a step is recorded twice'
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def struck(life: Life) -> list[float]:
    """When faults struck, in seconds since 1970."""
    return [float(text) for told in life.told for text in re.findall(r'^struck ([\d.]+) ', told, re.MULTILINE)]


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]
