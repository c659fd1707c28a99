"""Speech recognition from scratch on 0.7 hours of acted Dutch: log-mel features, SpecAugment, a recurrent encoder, CTC.

    python -m bench.data fetch speech_nl
    python launch.py --config=configs/speech_nl_ctc.py

Test character error rate 0.494 with standard deviation 0.001, word error rate 0.970 (0.004), n = 3 seeds: half of the letters
are right and hardly a word is, which is what 0.7 hours without a language model give. `python -m bench.accuracy
--config=configs/speech_nl_ctc.py --seeds=3`; conditions in BENCHMARKS.md.
"""

from research.core.schema import default_config


def get_config(epochs: int = 40):
    """The config; `epochs`: passes over about 1,000 utterances."""
    config = default_config()
    config.data.source = 'speech_nl(sample_rate=8000, max_seconds=5.0)'
    config.data.tokenizer = 'characters'
    config.data.transforms = ['pad(length=112, special=False)', 'buckets(lengths=(14400, 19200, 25600, 40000), along="audio")']
    config.data.batch_size = 8
    config.data.evaluation_batch_size = 32
    config.model = {
        'name': 'audio_encoder',
        'sample_rate': 8000,
        'body': 'rnn',
        'width': 256,
        'depth': 2,
        'channels': 128,
        'strides': (2, 1),
        'dropout': 0.2,
        'frequency_width': 6,
        'time_width': 25,
    }
    config.task = 'ctc'
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 0.001
    config.optimizer.weight_decay = 0.01
    config.optimizer.schedule = {'name': 'cosine', 'warmup': '5%'}
    config.optimizer.clip = 'global_norm(max_norm=1.0)'
    config.train.duration = f'{epochs} epochs'
    config.evaluate.every = '10%'
    return config
