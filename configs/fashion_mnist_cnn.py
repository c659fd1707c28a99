"""Fashion-MNIST."""

from research.core.schema import default_config


def get_config(recipe: str = 'better', epochs: int = 5):
    """The config; `recipe`: 'reference' or 'better'; `epochs`: passes over the training split."""
    config = default_config()
    config.data.source = 'fashion_mnist'
    config.data.validation = 0.1
    config.model = 'cnn'
    config.train.duration = f'{epochs} epochs'
    if recipe == 'reference':
        config.data.batch_size = 32
        config.optimizer.learning_rate = 1e-3
    else:
        config.data.batch_size = 64
        config.data.augment = 'flip'
        config.optimizer.learning_rate = 3e-3
        config.optimizer.schedule = 'one_cycle'
        config.train.ema = 0.999
    return config
