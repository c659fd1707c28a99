"""What the peers of `bench/input.py` share: padding, and the answers to its requests. Imports neither jax nor Fulcrum.

{"do": "variants"}                                    -> {"variants": ["record", ...], "versions": {...}}
{"do": "use", "variant": "record", "batch": 256}      -> {"shape": [256, 28, 28, 1], "dtype": "uint8"}
{"do": "batches", "count": 100}                       -> {"seconds": 0.61, "cpu": 0.61}
"""

import json
import os
import pathlib
import sys
import time

import numpy as np

PADDING = 4  # pixels on each side
DRAIN = 8  # batches taken before the clock starts: what was read ahead of it would cost nothing; no pipeline holds more
SETTLE_S = 0.3  # after a block: buffers are filled then, and not while another program is timed


def padded(images):
    """(n, H, W, C) -> (n, H + 8, W + 8, C), with zeros."""
    return np.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))


def cpu_seconds(pids):
    """What this process has used, and the living processes `pids`, whose times the system counts in ticks of 10 ms."""
    found = time.process_time()
    for pid in pids:
        fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
        found += (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
    return found


class Loading:
    """Endless batches of the PyTorch loader that `make` gives for the same arguments; knows its worker processes."""

    def __init__(self, make):
        self.make, self.processes = make, ()

    def __call__(self, *arguments):
        """The endless iterator."""
        loader = self.make(*arguments)
        while True:
            batches = iter(loader)
            self.processes = [worker.pid for worker in getattr(batches, '_workers', ())]
            yield from batches


def take(batches, count):
    """The last of the next `count` batches."""
    batch = None
    for _ in range(count):
        batch = next(batches)
    return batch


def serve(variants, versions, pipeline, workers=lambda: ()):
    """Answers requests from standard input on standard output; what is printed meanwhile goes to stderr.

    Args:
      variants: names of pipelines.
      versions: of what is measured.
      pipeline: (variant, batch size) -> endless iterator of (images, labels).
      workers: the ids of processes that work for the pipeline now.
    """
    replies, sys.stdout = sys.stdout, sys.stderr
    batches = iter(())
    for line in sys.stdin:
        request = json.loads(line)
        if request['do'] == 'variants':
            answer = {'variants': list(variants), 'versions': versions}
        elif request['do'] == 'use':
            batches = pipeline(request['variant'], request['batch'])
            images = take(batches, 1)[0]
            answer = {'shape': list(images.shape), 'dtype': str(images.dtype).removeprefix('torch.')}
        else:
            take(batches, DRAIN)
            wall, cpu = time.perf_counter(), cpu_seconds(workers())
            take(batches, request['count'])
            answer = {'seconds': time.perf_counter() - wall, 'cpu': cpu_seconds(workers()) - cpu}
        time.sleep(SETTLE_S)
        replies.write(json.dumps(answer) + '\n')
        replies.flush()


def serve_arrays(path, variants, versions, pipeline, workers=lambda: ()):
    """As `serve`, for pipelines (variant, padded images, labels, batch size) of the arrays of a file."""
    data = np.load(path)
    images, labels = padded(data['image']), data['label']
    serve(variants, versions, lambda variant, size: pipeline(variant, images, labels, size), workers)
