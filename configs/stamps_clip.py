"""CLIP from scratch on the captioned pictures of Tux Paint: 550 pairs to train on, which is very little.

    python -m bench.data fetch stamps
    python launch.py --config=configs/stamps_clip.py
    python launch.py --config=configs/stamps_clip.py:loss=siglip

On 153 test pictures whose captions training never saw, n = 3 seeds, standard deviations in brackets: recall at 1, 5 and 10 of
captions for a picture 0.044 (0.032), 0.129 (0.038), 0.248 (0.024), of pictures for a caption 0.046 (0.013), 0.155 (0.029),
0.301 (0.011); by chance about 0.007, 0.033, 0.065. Zero-shot accuracy over the 16 kinds is 0.033 (0.007), below chance (1/16).
loss=siglip: 0.031 (0.008), 0.107 (0.042), 0.200 (0.076); 0.052 (0.007), 0.176 (0.057), 0.294 (0.051); zero-shot 0.061 (0.050).
The model learns the training pairs by heart. `python -m bench.accuracy --config=configs/stamps_clip.py --seeds=3`; conditions
in BENCHMARKS.md.

Do not set config.train.accumulate: the other pairs of the batch are what the loss compares with.
"""

from research.core.schema import default_config


def get_config(loss: str = 'clip', epochs: int = 60):
    """The config.

    Args:
      loss: 'clip' or 'siglip'.
      epochs: passes over the 550 training pairs.
    """
    config = default_config()
    config.data.source = 'stamps'
    config.data.tokenizer = 'wordpiece(vocabulary_size=1000)'
    config.data.transforms = ['pad(length=16, text="caption")']
    config.data.batch_size = 128
    config.data.evaluation_batch_size = 64
    config.data.placement = 'device'
    config.data.augment = ['pad_crop(padding=4, mode="reflect")', 'flip']
    config.model = {
        'name': loss,
        'image': 'vit(patch=8, width=96, depth=3, heads=4, head="gap")',
        'text': 'encoder(width=96, depth=2, heads=4, pooling="mean", max_length=64)',
    }
    config.task = {'name': 'contrastive', 'loss_function': loss, 'embedding': 64, 'metrics': ['retrieval', 'zero_shot']}
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule = {'name': 'cosine', 'warmup': '5%'}
    config.train.duration = f'{epochs} epochs'
    return config
