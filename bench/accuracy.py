"""What a config reaches over seeds: mean, standard deviation and range of its metrics, with the conditions of measurement.

    python -m bench.accuracy --config=configs/digits_cnn.py --seeds=5
    python -m bench.accuracy --config=configs/fashion_mnist_cnn.py:recipe=reference --seeds=5 \
        --config.data.source.dir=/usr/share/datasets/fashion-mnist

The seed sets initialisation, order and augmentation; the splits are fixed by the data. Seeds are 0, 1, 2, ...; none is left
out.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
from typing import Any

from bench.report import cpu_name
from research.core import config_file, files, schema
from research.train.loop import train
from research.train.provenance import provenance


def measure(config: str, overrides: list[str], seed: int) -> dict[str, Any]:
    """One run in a temporary folder: its final results, its steps and its seconds."""
    plain = config_file.load(config)
    for override in overrides:
        path, _, text = override.partition('=')
        config_file.override(plain, path, text)
    plain |= {'seed': seed}
    with tempfile.TemporaryDirectory() as folder:
        summary = train(schema.resolve(plain), folder, quiet=True)
    results = {
        f'{split} {name}': value
        for split, values in summary['metrics'].items()
        for name, value in values.items()
        if isinstance(value, float)
    }
    seconds = summary['budget']['seconds']
    return {
        'seed': seed,
        'step': summary['step'],
        **results,
        'train seconds': seconds['train'],
        'seconds': sum(seconds.values()),
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean, sample standard deviation, least and greatest of every measured value."""
    values = {name: [run[name] for run in runs] for name in runs[0] if name != 'seed'}
    return {
        name: {'mean': statistics.fmean(v), 'sd': statistics.stdev(v) if len(v) > 1 else 0.0, 'min': min(v), 'max': max(v)}
        for name, v in values.items()
    }


def table(summary: dict[str, dict[str, float]], count: int) -> str:
    """The summary as a Markdown table."""
    rows = [f'| {name} | {s["mean"]:.4f} | {s["sd"]:.4f} | {s["min"]:.4f} | {s["max"]:.4f} |' for name, s in summary.items()]
    return '\n'.join([f'| n = {count} | mean | sd | min | max |', '|---|---|---|---|---|', *rows])


def main(argv: list[str]) -> None:
    """Runs the seeds, prints the table and its conditions, and writes both as JSON where --output asks for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', required=True)
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--output', type=pathlib.Path)
    overrides = [a.removeprefix('--config.') for a in argv if a.startswith('--config.')]
    options = parser.parse_args([a for a in argv if not a.startswith('--config.')])
    runs = []
    for seed in range(options.seeds):
        runs.append(measure(options.config, overrides, seed))
        print(json.dumps(runs[-1]), flush=True)
    conditions = {k: v for k, v in provenance().items() if k not in ('git', 'argv')} | {'cpu': cpu_name(), 'argv': argv}
    summary = summarise(runs)
    print(table(summary, len(runs)))
    print(json.dumps(conditions))
    if options.output:
        files.write_json(options.output, {'summary': summary, 'runs': runs, 'conditions': conditions})


if __name__ == '__main__':
    main(sys.argv[1:])
