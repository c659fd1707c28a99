"""GPT-2 with 124 million parameters on OpenWebText, by the recipe of nanoGPT (config/train_gpt2.py at commit 3adf61e).

    python launch.py --config=configs/gpt2_124m.py:dir=data/openwebtext

The folder holds train.bin and val.bin as nanoGPT's data/openwebtext/prepare.py writes them: GPT-2's tokens as uint16, 17 GB.
Batches of 480 x 1024 tokens (0.49 million), AdamW (0.9, 0.95) with decay 0.1, 2,000 steps of warm-up to 6e-4, cosine to 6e-5
at step 600,000, no dropout, no biases. nanoGPT reports a validation loss of about 2.85 after four days on eight A100.
Result: not measured here (neither the data nor the hardware are at hand).
"""

from research.core.schema import default_config


def get_config(dir: str = 'data/openwebtext', accumulate: int = 5):  # noqa: A002  the source's word
    """The config.

    Args:
      dir: the folder of train.bin and val.bin.
      accumulate: microbatches of a step, a divisor of 480; 5 on eight devices leaves 12 rows to each, as nanoGPT has.
    """
    config = default_config()
    config.data.source = {'name': 'tokens_memmap', 'dir': dir, 'length': 1024}
    config.data.tokenizer = 'token_ids(vocabulary_size=50304, eos=50256)'  # 50,257 rounded up to a multiple of 64
    config.data.validation = config.data.test = 0.0
    config.data.batch_size = 480
    config.data.evaluation_batch_size = 96
    config.model = 'gpt2_124m(bias=False)'
    config.task = 'language(metrics=("perplexity",), chunk=256)'
    config.optimizer.name = 'adamw'
    config.optimizer.b2 = 0.95
    config.optimizer.learning_rate = 6e-4
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule = {'name': 'cosine', 'final': 0.1, 'warmup': '2000 steps'}
    config.optimizer.clip = 'global_norm(max_norm=1.0)'
    config.train.duration = '600000 steps'
    config.train.accumulate = accumulate
    config.train.precision = 'bfloat16'
    config.evaluate.every = '2000 steps'
    config.evaluate.limit = 20000
    config.evaluate.final = ('validation',)
    config.checkpoint.every = '2000 steps'
    return config
