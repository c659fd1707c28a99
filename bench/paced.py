"""The real training loop in blocks of steps: `research.train.loop.train` with all its hooks, which waits between two requests.

    serve_run(lambda request: experiment)     # in a worker process; see bench/reference_cnn.py

    {"do": "steps", "count": 40}                                          -> {"seconds": ..., "cpu": ...}
    {"do": "accuracy", "every": 100, "target": 0.85, "most": 3000}        -> {..., "steps": ..., "reached": ...}

A hook behind all others answers and reads the next request within the running loop, so that a block costs what it costs a
user: batches, step, records, progress, guard, watchdog. Nothing of the loop is replaced.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from research.core.schema import Experiment
from research.train import loop

Request = dict[str, Any]


class EnoughError(Exception):
    """Ends a run from within a hook."""


class Channel:
    """Requests from standard input, answers to standard output; what else is printed goes to standard error."""

    def __init__(self) -> None:
        self._replies, sys.stdout = sys.stdout, sys.stderr
        self.request: Request | None = self._next()

    def _next(self) -> Request | None:
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def answer(self, found: dict[str, Any]) -> Request | None:
        """Sends an answer; the next request."""
        self._replies.write(json.dumps(found) + '\n')
        self._replies.flush()
        self.request = self._next()
        return self.request


class Watch:
    """Wall-clock and CPU seconds while it runs."""

    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0
        self.start()

    def start(self) -> None:
        """Goes on."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        """Stands still."""
        self.seconds, self.cpu = self.seconds + time.perf_counter() - self._wall, self.cpu + time.process_time() - self._cpu
        return {'seconds': self.seconds, 'cpu': self.cpu}


class Pace:
    """A hook: answers after every `count` steps, until another request comes."""

    def __init__(self, channel: Channel):
        assert channel.request is not None
        self._channel, self._request, self._left, self._watch = channel, channel.request, channel.request['count'], Watch()

    def __call__(self, step: int, state: Any, terms: Any) -> None:
        """Counts a step."""
        self._left -= 1
        if self._left:
            return
        jax.block_until_ready(state)
        if self._channel.answer(self._watch.stop()) != self._request:
            raise EnoughError
        self._left, self._watch = self._request['count'], Watch()


class Until:
    """A hook: evaluates every `every` steps, off the clock, until the target is reached, and answers."""

    def __init__(self, channel: Channel, run: Any):
        assert channel.request is not None
        self._channel, self._request, self._run, self._watch = channel, channel.request, run, Watch()
        self._most = min(self._request.get('most', run.total_steps), run.total_steps)

    def __call__(self, step: int, state: Any, terms: Any) -> None:
        """Counts a step."""
        if step % self._request['every'] and step < self._most:
            return
        jax.block_until_ready(state)
        spent = self._watch.stop()
        feed, count = self._run.evaluation_feeds['test']
        reached = self._run.evaluator(state.evaluation_variables, feed, count)['accuracy'] >= self._request['target']
        if reached or step >= self._most:
            self._channel.answer({**spent, 'steps': step, 'reached': reached})
            raise EnoughError
        self._watch.start()


def serve_run(experiment_of: Callable[[Request], Experiment]) -> None:
    """Answers until standard input ends; each kind of request has a run of its own."""
    channel, steps = Channel(), loop._steps

    def paced(run: Any, step: Any, state: Any, hooks: list[Any]) -> Any:
        assert channel.request is not None
        last = Pace(channel) if channel.request['do'] == 'steps' else Until(channel, run)
        return steps(run, step, state, [*hooks, last])

    loop._steps = paced
    while (request := channel.request) is not None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                loop.train(experiment_of(request), folder)
                raise RuntimeError(f'the run was over before the request {request} was')
            except EnoughError:
                pass
