"""A language model of 1.24 billion parameters with the architecture of Llama 3.2 1B, trained from scratch on token files.

    python launch.py --config=configs/llama_1b.py:dir=data/tokens,tokenizer=llama-3.2/tokenizer.json

The folder holds train.bin and val.bin, the tokenizer's ids as uint32, documents ended by its <|end_of_text|>. AdamW (0.9, 0.95)
with decay 0.1, 2,000 steps of warm-up to 3e-4, cosine to a tenth, gradients clipped at 1 (Touvron et al., 2023, section 2.3),
batches of one million tokens in rows of 2,048, and 20 tokens for each parameter (Hoffmann et al., 2022, table 3): 25 billion,
1.9e20 FLOPs by 6 N D. Llama 3.2 itself was pruned and distilled from larger models and saw 9 trillion tokens: this is its
shape, not its recipe. Parameters and their state are cut over the devices; layers are one compiled loop.
Result: not measured here (neither the data nor the hardware are at hand).
"""

from research.core.schema import default_config


def get_config(dir: str = 'data/tokens', tokenizer: str = 'llama-3.2/tokenizer.json', accumulate: int = 8):  # noqa: A002
    """The config.

    Args:
      dir: the folder of train.bin and val.bin.
      tokenizer: the tokenizer.json that made them.
      accumulate: microbatches of a step, a divisor of 512.
    """
    config = default_config()
    config.data.source = {'name': 'tokens_memmap', 'dir': dir, 'length': 2048, 'dtype': 'uint32'}
    config.data.tokenizer = {'name': 'huggingface', 'path': tokenizer}
    config.data.validation = config.data.test = 0.0
    config.data.batch_size = 512
    config.data.evaluation_batch_size = 64
    config.model = 'llama_1b(scan=True, remat="dots", max_length=2048)'
    config.task = 'language(chunk=256)'
    config.optimizer.name = 'adamw'
    config.optimizer.b2 = 0.95
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule = {'name': 'cosine', 'final': 0.1, 'warmup': '2000 steps'}
    config.optimizer.clip = 'global_norm(max_norm=1.0)'
    config.train.duration = '25e9 tokens'
    config.train.accumulate = accumulate
    config.train.precision = 'bfloat16'
    config.parallel.fsdp = True
    config.evaluate.every = '1000 steps'
    config.evaluate.limit = 4096
    config.evaluate.final = ('validation',)
    config.checkpoint.every = '1000 steps'
    return config
