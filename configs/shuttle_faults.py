"""Rare faults in the readings of a space shuttle's sensors: FT-Transformer and MLP on nine columns, 7 % of the rows anomalies.

    python -m bench.data fetch shuttle
    python launch.py --config=configs/shuttle_faults.py
    python launch.py --config=configs/shuttle_faults.py:model=mlp

RESULT
"""

from research.core.schema import default_config

MODELS = {
    'ft_transformer': 'ft_transformer(depth=2, width=32, heads=4, hidden=64, dropout=0.0)',
    'mlp': 'mlp(hidden=(128, 128))',
}
METRICS = ['average_precision', 'recall_at_precision_90', 'recall_at_precision_99', 'auroc', 'accuracy']


def get_config(model: str = 'ft_transformer', epochs: int = 10):
    """The config.

    Args:
      model: 'ft_transformer' or 'mlp'.
      epochs: passes over the 34,315 training readings.
    """
    config = default_config()
    config.data.source = 'shuttle'
    config.data.transforms = ['quantile_normalise']
    config.data.batch_size = 256
    config.data.evaluation_batch_size = 4096
    config.data.placement = 'device'
    config.model = MODELS[model]
    config.task = {'name': 'classify', 'inputs': 'numeric', 'metrics': METRICS}
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = {'name': 'cosine', 'warmup': '5%'}
    config.train.duration = f'{epochs} epochs'
    return config
