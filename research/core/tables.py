"""The components that come with Fulcrum, by kind and name: strings, so that reading them imports nothing."""

TABLES: dict[str, dict[str, str]] = {
    'source': {
        'digits': 'research.data.sources.digits:digits',
        'idx': 'research.data.sources.idx:idx',
        'fashion_mnist': 'research.data.sources.fashion_mnist:fashion_mnist',
        'tfds': 'research.data.sources.tfds:tfds',
        'image_folder': 'research.data.sources.image_folder:image_folder',
        'npz': 'research.data.sources.npz:npz',
        'table': 'research.data.sources.table:table',
    },
    'augmentation': {
        'flip': 'research.data.augment:flip',
        'pad_crop': 'research.data.augment:pad_crop',
        'cutout': 'research.data.augment:cutout',
        'random_erasing': 'research.data.augment:random_erasing',
        'colour_jitter': 'research.data.colour:colour_jitter',
        'randaugment': 'research.data.randaugment:randaugment',
        'mixup': 'research.data.mixing:mixup',
        'cutmix': 'research.data.mixing:cutmix',
        'normalise': 'research.data.augment:normalise',
    },
    'model': {
        'cnn': 'research.models.cnn:CNN',
        'mlp': 'research.models.mlp:MLP',
    },
    'task': {
        'classify': 'research.tasks.classify:Classify',
        'regress': 'research.tasks.regress:Regress',
    },
    'optimizer': {
        'sgd': 'research.optim.optimizers:sgd',
        'momentum': 'research.optim.optimizers:momentum',
        'nesterov': 'research.optim.optimizers:nesterov',
        'adam': 'research.optim.optimizers:adam',
        'adamw': 'research.optim.optimizers:adamw',
        'nadamw': 'research.optim.optimizers:nadamw',
        'lion': 'research.optim.optimizers:lion',
        'adafactor': 'research.optim.optimizers:adafactor',
        'lamb': 'research.optim.optimizers:lamb',
        'muon': 'research.optim.optimizers:muon',
    },
    'schedule': {
        'constant': 'research.optim.schedules:constant',
        'inverse_time': 'research.optim.schedules:inverse_time',
        'cosine': 'research.optim.schedules:cosine',
        'linear': 'research.optim.schedules:linear',
        'polynomial': 'research.optim.schedules:polynomial',
        'step': 'research.optim.schedules:step',
        'rsqrt': 'research.optim.schedules:rsqrt',
        'warmup_stable_decay': 'research.optim.schedules:warmup_stable_decay',
        'one_cycle': 'research.optim.schedules:one_cycle',
    },
    'clip': {
        'global_norm': 'research.optim.clip:global_norm',
        'block_norm': 'research.optim.clip:block_norm',
        'value': 'research.optim.clip:value',
        'adaptive': 'research.optim.clip:adaptive',
    },
}

# Fields of class components that the program fills in (a dataclass has no positional-only parameters).
SUPPLIED = {'model': {'num_outputs', 'parent', 'name'}, 'task': {'model', 'data', 'dtype'}}
