"""Small random models under Hugging Face's names: what tests of import and export begin with.

Nothing is derived from research/: the names and shapes are written out, as the files of published models have them. Embeddings
are small, so that the epsilon of the first normalisation counts; heads are large, so that a wrong activation shows.
"""

import numpy as np

VOCABULARY, LENGTH, LABELS = 40, 20, 3

LLAMA = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': VOCABULARY,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'hidden_act': 'silu',
    'max_position_embeddings': 64,
    'rms_norm_eps': 1e-5,
    'rope_theta': 1000.0,
    'rope_scaling': None,
    'attention_bias': False,
    'mlp_bias': False,
    'tie_word_embeddings': False,
}
SCALING = {
    'rope_type': 'llama3',
    'factor': 4.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 32,
}
GPT2 = {
    'architectures': ['GPT2LMHeadModel'],
    'model_type': 'gpt2',
    'vocab_size': VOCABULARY,
    'n_positions': 24,
    'n_embd': 32,
    'n_layer': 2,
    'n_head': 4,
    'n_inner': None,
    'activation_function': 'gelu_new',
    'layer_norm_epsilon': 1e-5,
    'resid_pdrop': 0.1,
}
BERT = {
    'architectures': ['BertForSequenceClassification'],
    'model_type': 'bert',
    'vocab_size': VOCABULARY,
    'hidden_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'intermediate_size': 48,
    'hidden_act': 'gelu',
    'hidden_dropout_prob': 0.1,
    'max_position_embeddings': 24,
    'type_vocab_size': 2,
    'layer_norm_eps': 1e-12,
    'id2label': {str(i): f'class {i}' for i in range(LABELS)},
}
VIT = {
    'architectures': ['ViTForImageClassification'],
    'model_type': 'vit',
    'hidden_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'intermediate_size': 48,
    'hidden_act': 'gelu',
    'layer_norm_eps': 1e-12,
    'image_size': [8, 12],
    'patch_size': 4,
    'num_channels': 3,
    'id2label': {str(i): f'class {i}' for i in range(LABELS)},
}
BARE = {**BERT, 'architectures': ['BertModel']}
MASKED = {**BERT, 'architectures': ['BertForMaskedLM']}
TOKENS = {**BERT, 'architectures': ['BertForTokenClassification']}

CASES = {
    'llama': LLAMA,
    'llama tied, stretched': {**LLAMA, 'tie_word_embeddings': True, 'rope_scaling': SCALING},
    'gpt2': GPT2,
    'bert classifier': BERT,
    'bert bare': BARE,
    'bert masked': MASKED,
    'bert tokens': TOKENS,
    'vit': VIT,
}


class Tensors(dict):
    """Random tensors, float32, by name."""

    def __init__(self, seed):
        super().__init__()
        self._rng = np.random.default_rng(seed)

    def add(self, name, *shape, scale=1.0, mean=0.0):
        self[name] = (mean + scale * self._rng.normal(size=shape)).astype(np.float32)

    def dense(self, name, inputs, outputs, bias=True, transposed=True, scale=1.0):
        """A weight whose outputs are of size `scale` for inputs of size 1."""
        self.add(f'{name}.weight', *((outputs, inputs) if transposed else (inputs, outputs)), scale=scale * inputs**-0.5)
        if bias:
            self.add(f'{name}.bias', outputs, scale=0.3)

    def norm(self, name, width, bias=True):
        self.add(f'{name}.weight', width, scale=0.3, mean=1.0)
        if bias:
            self.add(f'{name}.bias', width, scale=0.3)


def llama(config, seed=0):
    t, width, hidden, size = Tensors(seed), config['hidden_size'], config['intermediate_size'], config['head_dim']
    inner, groups = config['num_attention_heads'] * size, config['num_key_value_heads'] * size
    t.add('model.embed_tokens.weight', config['vocab_size'], width, scale=3e-3)
    for i in range(config['num_hidden_layers']):
        layer = f'model.layers.{i}'
        for name, inputs, outputs in (('q', width, inner), ('k', width, groups), ('v', width, groups), ('o', inner, width)):
            t.dense(f'{layer}.self_attn.{name}_proj', inputs, outputs, bias=False, scale=2.0 if name in 'qk' else 1.0)
        for name, inputs, outputs in (('gate', width, hidden), ('up', width, hidden), ('down', hidden, width)):
            t.dense(f'{layer}.mlp.{name}_proj', inputs, outputs, bias=False)
        t.norm(f'{layer}.input_layernorm', width, bias=False)
        t.norm(f'{layer}.post_attention_layernorm', width, bias=False)
    t.norm('model.norm', width, bias=False)
    if config['tie_word_embeddings']:
        t['model.norm.weight'] *= 300  # the embedding is small
    else:
        t.dense('lm_head', width, config['vocab_size'], bias=False, scale=5.0)
    return t


def gpt2(config, seed=0):
    t, width = Tensors(seed), config['n_embd']
    t.add('transformer.wte.weight', config['vocab_size'], width, scale=3e-3)
    t.add('transformer.wpe.weight', config['n_positions'], width, scale=3e-3)
    for i in range(config['n_layer']):
        layer = f'transformer.h.{i}'
        t.norm(f'{layer}.ln_1', width)
        t.dense(f'{layer}.attn.c_attn', width, 3 * width, transposed=False, scale=1.5)
        t.dense(f'{layer}.attn.c_proj', width, width, transposed=False)
        t.norm(f'{layer}.ln_2', width)
        t.dense(f'{layer}.mlp.c_fc', width, 4 * width, transposed=False)
        t.dense(f'{layer}.mlp.c_proj', 4 * width, width, transposed=False, scale=5.0)
    t.norm('transformer.ln_f', width)
    t['transformer.ln_f.weight'] *= 1000
    return t


def bert(config, seed=0):
    t, width, hidden = Tensors(seed), config['hidden_size'], config['intermediate_size']
    sizes = {'word': config['vocab_size'], 'position': config['max_position_embeddings'], 'token_type': 2}
    for name, size in sizes.items():
        t.add(f'bert.embeddings.{name}_embeddings.weight', size, width, scale=3e-3)
    t.norm('bert.embeddings.LayerNorm', width)
    for i in range(config['num_hidden_layers']):
        layer = f'bert.encoder.layer.{i}'
        for name in ('query', 'key', 'value'):
            t.dense(f'{layer}.attention.self.{name}', width, width, scale=1.5)
        t.dense(f'{layer}.attention.output.dense', width, width)
        t.norm(f'{layer}.attention.output.LayerNorm', width)
        t.dense(f'{layer}.intermediate.dense', width, hidden)
        t.dense(f'{layer}.output.dense', hidden, width, scale=5.0)
        t.norm(f'{layer}.output.LayerNorm', width)
    head = config['architectures'][0].removeprefix('Bert')
    if head in ('Model', 'ForSequenceClassification'):
        t.dense('bert.pooler.dense', width, width)
    if head in ('ForSequenceClassification', 'ForTokenClassification'):
        t.dense('classifier', width, len(config['id2label']), scale=60.0)
    if head == 'ForMaskedLM':
        t.dense('cls.predictions.transform.dense', width, width)
        t.norm('cls.predictions.transform.LayerNorm', width)
        t['cls.predictions.transform.LayerNorm.weight'] *= 600
        t.add('cls.predictions.bias', config['vocab_size'])
    return t


def vit(config, seed=0):
    t, width, hidden, side = Tensors(seed), config['hidden_size'], config['intermediate_size'], config['patch_size']
    channels, (height, breadth) = config['num_channels'], config['image_size']
    t.add('vit.embeddings.cls_token', 1, 1, width, scale=3e-6)
    t.add('vit.embeddings.position_embeddings', 1, 1 + height // side * (breadth // side), width, scale=3e-6)
    t.add('vit.embeddings.patch_embeddings.projection.weight', width, channels, side, side, scale=1e-6)
    t.add('vit.embeddings.patch_embeddings.projection.bias', width, scale=1e-6)
    for i in range(config['num_hidden_layers']):
        layer = f'vit.encoder.layer.{i}'
        t.norm(f'{layer}.layernorm_before', width)
        for name in ('query', 'key', 'value'):
            t.dense(f'{layer}.attention.attention.{name}', width, width, scale=1.5)
        t.dense(f'{layer}.attention.output.dense', width, width)
        t.norm(f'{layer}.layernorm_after', width)
        t.dense(f'{layer}.intermediate.dense', width, hidden)
        t.dense(f'{layer}.output.dense', hidden, width, scale=5.0)
    t.norm('vit.layernorm', width)
    t.dense('classifier', width, len(config['id2label']), scale=60.0)
    return t


TENSORS = {'llama': llama, 'gpt2': gpt2, 'bert': bert, 'vit': vit}


def tensors_of(config, seed=0):
    """Random tensors for a config.json, as a file would hold them (a bare model without prefix)."""
    tensors = dict(TENSORS[config['model_type']](config, seed))
    return {k.removeprefix('bert.'): v for k, v in tensors.items()} if config['architectures'] == ['BertModel'] else tensors


def inputs_of(config, seed=1):
    """Tokens (3, LENGTH) or images (3, 8, 12, 3), and the mask (3, LENGTH) of an encoder, whose last rows are padded."""
    rng = np.random.default_rng(seed)
    if config['model_type'] == 'vit':
        return rng.normal(size=(3, *config['image_size'], config['num_channels'])).astype(np.float32), None
    tokens = rng.integers(0, config['vocab_size'], (3, LENGTH)).astype(np.int32)
    lengths = np.array([LENGTH, 13, 5]) if config['model_type'] == 'bert' else np.full(3, LENGTH)
    return tokens, (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
