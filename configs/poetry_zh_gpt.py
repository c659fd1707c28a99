"""A small GPT that writes Tang poetry: 57,600 poems in traditional Chinese, a token a character, packed.

    python -m bench.data fetch poetry_zh
    python launch.py --config=configs/poetry_zh_gpt.py
    python launch.py --config=configs/poetry_zh_gpt.py:dynasty=both

Test perplexity of a character 147.6 with standard deviation 2.4, 2.574 bits per byte of UTF-8 (0.008), n = 3 seeds: `python -m
bench.accuracy --config=configs/poetry_zh_gpt.py --seeds=3`; conditions in BENCHMARKS.md. dynasty=both is not measured here.
"""

from research.core.schema import default_config


def get_config(dynasty: str = 'tang', vocabulary: int = 6000, steps: int = 800):
    """The config.

    Args:
      dynasty: 'tang', 'song' (254,000 poems) or 'both'.
      vocabulary: the characters that are known, most frequent first; the others are one unknown token.
      steps: optimiser steps of about 2,000 characters.
    """
    config = default_config()
    config.data.source = {'name': 'poetry_zh', 'dynasty': None if dynasty == 'both' else dynasty}
    config.data.tokenizer = {'name': 'characters', 'vocabulary_size': vocabulary}
    config.data.transforms = ['pack(length=128)']
    config.data.validation = config.data.test = 0.02
    config.data.batch_size = 16
    config.data.evaluation_batch_size = 64
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
