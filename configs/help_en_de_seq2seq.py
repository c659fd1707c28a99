"""Translation from English into German, from scratch, on the help of LibreOffice: 35,900 pairs of sentences and headings.

    python -m bench.data fetch help_en_de
    python launch.py --config=configs/help_en_de_seq2seq.py

The help repeats itself: equal sentences never lie on both sides of a split, but similar ones do, so BLEU here says nothing of
free text. Targets longer than 64 tokens (6.5 % of them) are cut in training and
in the references.

Test BLEU 12.3 (four beams; references as cut; sacrebleu 2.6, 13a), perplexity 18.6, n = 1 seed (0), so without a standard
deviation: `python -m bench.accuracy --config=configs/help_en_de_seq2seq.py --seeds=1`; conditions in BENCHMARKS.md.
"""

from research.core.schema import default_config


def get_config(vocabulary: int = 4096, epochs: int = 6):
    """The config.

    Args:
      vocabulary: byte-level BPE tokens, one vocabulary for both languages.
      epochs: passes over 34,505 pairs.
    """
    config = default_config()
    config.data.source = 'help_en_de'
    config.data.tokenizer = {'name': 'bpe', 'vocabulary_size': vocabulary}
    config.data.transforms = ['pairs(source_length=64, target_length=64)', 'buckets(lengths=(8, 16, 32, 64))']
    config.data.validation, config.data.test = 0.01, 0.03
    config.data.batch_size = 64
    config.data.evaluation_batch_size = 64
    config.model = {
        'name': 'encoder_decoder', 'depth': 2, 'width': 128, 'heads': 4, 'positions': 'rotary', 'norm': 'rms', 'bias': False,
        'dropout': 0.1,
    }  # fmt: skip
    config.task = 'seq2seq(metrics=("perplexity", "bleu"), beams=4)'
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule = {'name': 'cosine', 'warmup': '10%'}
    config.optimizer.clip = 'global_norm(max_norm=1.0)'
    config.train.duration = f'{epochs} epochs'
    config.evaluate.every = '25%'
    config.evaluate.limit = 256
    return config
