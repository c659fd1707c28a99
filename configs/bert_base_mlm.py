"""BERT base as a masked language model, by the recipe of Devlin et al. 2019, appendix A.2, without next-sentence prediction.

    python launch.py --config=configs/bert_base_mlm.py:dir=data/books_and_wikipedia

The folder holds text files, a document each (the paper's BooksCorpus and English Wikipedia cannot be had as they were).
Batches of 256 rows of 512 tokens, AdamW (0.9, 0.999) at 1e-4 with decay 0.01, 10,000 steps of warm-up, linear to zero at step
1,000,000, dropout 0.1, 15 % of the tokens hidden. Unlike the paper's, rows are packed with documents that do not see each
other, all steps have the full length (the paper: 128 tokens for the first 90 %), and there is no sentence pair to classify,
which Liu et al. 2019, "RoBERTa", section 4.2, found to do no harm. The paper gives no loss on masked tokens.
Result: not measured here (neither the data nor the hardware are at hand).
"""

from research.core.schema import default_config


def get_config(dir: str = 'data/books_and_wikipedia', accumulate: int = 1):  # noqa: A002  the source's word
    """The config.

    Args:
      dir: the folder of text files.
      accumulate: microbatches of a step, a divisor of 256.
    """
    config = default_config()
    config.data.source = {'name': 'text_files', 'path': dir}
    config.data.tokenizer = 'wordpiece(vocabulary_size=30522)'
    config.data.transforms = ['pack(length=511)']  # rows of 512 tokens: nothing is shifted here
    config.data.validation = 0.005
    config.data.test = 0.005
    config.data.batch_size = 256
    config.data.evaluation_batch_size = 256
    config.model = 'bert_base(pooling="none", mask_head=True, dropout=0.1, scan=True)'
    config.task = 'masked'
    config.optimizer.name = 'adamw'
    config.optimizer.eps = 1e-6  # that of the released code, as is the clipping
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.01
    config.optimizer.schedule = {'name': 'linear', 'warmup': '10000 steps'}
    config.optimizer.clip = 'global_norm(max_norm=1.0)'
    config.train.duration = '1000000 steps'
    config.train.accumulate = accumulate
    config.train.precision = 'bfloat16'
    config.evaluate.every = '10000 steps'
    config.evaluate.limit = 8192
    config.checkpoint.every = '10000 steps'
    return config
