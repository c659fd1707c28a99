"""A small GPT on a whole dictionary: 126,236 entries of the GNU Collaborative International Dictionary of English, packed.

    python -m bench.data fetch gcide
    python launch.py --config=configs/gcide_gpt.py

Entries of 300 characters in the mean lie side by side in rows of 256 tokens, none of which sees another entry's.

Test perplexity of a token 34.25 with standard deviation 0.29, 1.673 bits per byte (0.004), n = 3 seeds: `python -m
bench.accuracy --config=configs/gcide_gpt.py --seeds=3`; conditions in BENCHMARKS.md.
"""

from research.core.schema import default_config


def get_config(vocabulary: int = 4096, steps: int = 800):
    """The config.

    Args:
      vocabulary: byte-level BPE tokens.
      steps: optimiser steps of about 2,000 tokens; one pass over the training entries are about 5,000.
    """
    config = default_config()
    config.data.source = 'gcide'
    config.data.tokenizer = {'name': 'bpe', 'vocabulary_size': vocabulary}
    config.data.transforms = ['pack(length=256)']
    config.data.validation = config.data.test = 0.01
    config.data.batch_size = 8
    config.data.evaluation_batch_size = 32
    config.model = {
        'name': 'decoder', 'depth': 4, 'width': 128, 'heads': 4, 'positions': 'rotary', 'norm': 'rms', 'bias': False,
    }  # fmt: skip
    config.task = 'language'
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule = {'name': 'cosine', 'warmup': '10%'}
    config.optimizer.clip = 'global_norm(max_norm=1.0)'
    config.train.duration = f'{steps} steps'
    config.evaluate.every = '25%'
    return config
