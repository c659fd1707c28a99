"""What scikit-learn reaches on a table config's own splits: logistic regression and gradient boosting, to compare with ours.

    python -m bench.tables --config=configs/shuttle_faults.py --seeds=5

Each fits the training split of the config (its transforms applied) with default settings, but 1,000 iterations for the logistic
regression; the seed matters to the boosting's early stopping alone. The metrics are those of the config's task, computed by
Fulcrum's own metrics from the log-odds of the class probabilities, for test and validation split.
"""

import argparse
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from research.core import config_file, schema
from research.data.build import build_splits
from research.tasks.metrics import summarise
from research.train import build

FLOOR = 1e-12  # of a probability, before its logarithm


def features(block: dict[str, np.ndarray]) -> np.ndarray:
    """The columns of a block side by side, (B, F + G) float64."""
    return np.concatenate([block[key] for key in ('numeric', 'category') if key in block], axis=1).astype(np.float64)


def models(seed: int) -> dict[str, Any]:
    """The baselines by name."""
    return {
        'logistic regression': LogisticRegression(max_iter=1000),
        'gradient boosting': HistGradientBoostingClassifier(random_state=seed),
    }


def measure(config: str, seed: int) -> dict[str, dict[str, float]]:
    """By baseline its metrics on test and validation, and the seconds that fitting took."""
    experiment = schema.resolve(config_file.load(config))
    splits, spec = build_splits(experiment.data)
    metrics = build.make_task(experiment, spec).metrics
    blocks = {name: source[np.arange(len(source))] for name, source in splits.items()}
    results: dict[str, dict[str, float]] = {}
    for name, model in models(seed).items():
        start = time.perf_counter()
        model.fit(features(blocks['train']), blocks['train']['label'])
        results[name] = {'seconds': time.perf_counter() - start}
        for split in ('validation', 'test'):
            logits = np.log(np.maximum(model.predict_proba(features(blocks[split])), FLOOR)).astype(np.float32)  # (n, K)
            batch = {'label': blocks[split]['label'], 'mask': np.ones(len(logits), np.float32)}
            found = summarise(metrics, jax.device_get({key: metric.batch(logits, batch) for key, metric in metrics.items()}))
            results[name] |= {f'{split} {key}': value for key, value in found.items() if isinstance(value, float)}
    return results


def main(argv: list[str]) -> None:
    """Fits with each seed and prints means and standard deviations as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', required=True)
    parser.add_argument('--seeds', type=int, default=1)
    options = parser.parse_args(argv)
    runs = [measure(options.config, seed) for seed in range(options.seeds)]
    print(f'| n = {len(runs)} | mean | sd |\n|---|---|---|')
    for name, first in runs[0].items():
        for key in first:
            values = [run[name][key] for run in runs]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f'| {name}: {key} | {statistics.fmean(values):.4f} | {deviation:.4f} |')


if __name__ == '__main__':
    main(sys.argv[1:])
