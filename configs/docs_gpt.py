"""A small GPT on the English text that ships with Python: the second quick start, on a language model's own terms.

    python launch.py --config=configs/docs_gpt.py
    python launch.py --config=configs/docs_gpt.py:tokenizer=bpe

Test perplexity of a byte 8.77 with standard deviation 0.17, 3.134 bits per byte (0.027), n = 5 seeds: `python -m bench.accuracy
--config=configs/docs_gpt.py --seeds=5`. With tokenizer=bpe 2.633 bits per byte (0.031), n = 3: of the same number of tokens,
which hold more text. Conditions in BENCHMARKS.md.
"""

from research.core.schema import choose, default_config

TOKENIZERS = {'byte': 'byte', 'bpe': 'bpe(vocabulary_size=2048)'}


def get_config(tokenizer: str = 'byte', steps: int = 300):
    """The config.

    Args:
      tokenizer: 'byte', or 'bpe' with 2,048 tokens trained on the training texts.
      steps: optimiser steps of 2,048 tokens.
    """
    config = default_config()
    config.data.source = 'python_docs'
    config.data.tokenizer = choose('tokenizer', tokenizer, TOKENIZERS)
    config.data.transforms = ['windows(length=128)']
    config.data.test = 0.1
    config.data.batch_size = 16
    config.data.evaluation_batch_size = 128
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
    config.evaluate.limit = 512
    return config
