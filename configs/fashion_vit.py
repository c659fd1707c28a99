"""Fashion-MNIST with a small Vision Transformer: 16 patches of 7 x 7 pixels, four blocks of width 64, 205,000 parameters.

    python -m bench.data fetch fashion_mnist        # 31 MB, once
    python launch.py --config=configs/fashion_vit.py
    python launch.py --config=configs/fashion_vit.py:epochs=20,patch=4

Test accuracy 88.00 % with standard deviation 0.14, n = 3 seeds: `python -m bench.accuracy --config=configs/fashion_vit.py
--seeds=3`; conditions in BENCHMARKS.md. patch=4 and 20 epochs are not measured here.
"""

from research.core.schema import default_config


def get_config(epochs: int = 5, patch: int = 7):
    """The config.

    Args:
      epochs: passes over the 53,900 training images.
      patch: side of a patch in pixels, a divisor of 28; 4 gives 49 patches, which cost three times as much.
    """
    config = default_config()
    config.data.source = 'fashion_mnist'
    config.data.batch_size = 64
    config.data.augment = ['flip']
    config.data.preprocess = ['normalise(mean=0.286, std=0.353)']
    config.model = {'name': 'vit', 'patch': patch, 'width': 64, 'depth': 4, 'heads': 4}
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule = {'name': 'cosine', 'warmup': '10%'}
    config.optimizer.clip = 'global_norm(max_norm=1.0)'
    config.train.duration = f'{epochs} epochs'
    config.evaluate.every = '1 epoch'
    return config
