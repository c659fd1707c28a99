"""x"""
from research.core.schema import default_config


def get_config(loss: str = 'clip', epochs: int = 60):
    config = default_config()
    config.data.source = 'stamps'
    config.data.tokenizer = 'byte'
    config.data.transforms = ['pad(length=64, text="caption")']
    config.data.batch_size = 128
    config.data.evaluation_batch_size = 64
    config.data.placement = 'device'
    config.data.augment = ['pad_crop(padding=4, mode="reflect")', 'flip']
    config.model = {'name': loss, 'image': 'vit(patch=8, width=96, depth=3, heads=4, head="gap")', 'text': 'encoder(width=96, depth=2, heads=4, pooling="mean", max_length=64)'}
    config.task = {'name': 'contrastive', 'loss_function': loss, 'embedding': 64, 'metrics': ['retrieval', 'zero_shot']}
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule = {'name': 'cosine', 'warmup': '5%'}
    config.train.duration = f'{epochs} epochs'
    return config
