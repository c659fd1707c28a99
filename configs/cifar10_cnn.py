"""The reference program: the CNN of TensorFlow's CIFAR-10 tutorial (122,570 parameters), Adam, batch 32, 10 epochs.

    python launch.py --config=configs/cifar10_cnn.py

Data through TFDS, downloaded at the first run. The tutorial feeds softmax outputs to a loss that expects logits; here the loss
sees logits. Result: not measured here (CIFAR-10 cannot be had without network).
"""

from research.core.schema import default_config


def get_config():
    """The config."""
    config = default_config()
    config.data.source = {'name': 'tfds', 'dataset': 'cifar10'}
    config.data.batch_size = 32
    config.model = 'cnn'
    config.optimizer.name = 'adam'
    config.optimizer.learning_rate = 1e-3
    config.train.duration = '10 epochs'
    config.evaluate.every = '1 epoch'
    config.seed = 42
    return config
