"""Llama and GPT-2 as Hugging Face stores them, beside our `Decoder`.

Shape letters: D model, H heads, G key and value heads, K head size, F hidden, V vocabulary, P positions.

    family   published with                          a decoder of ours is one with
    llama    Llama 1 to 3 (Touvron et al., 2023)     RMSNorm, rotary positions, a gated activation and no biases
    gpt2     GPT-2 (Radford et al., 2019)            LayerNorm, learned positions, an activation without gate, and biases

For D = 64 and H = 4 the tensor `model.layers.0.self_attn.q_proj.weight` (64, 64) of a Llama is our
`stack/layers_0/attention/query/kernel` (64, 4, 16), and `transformer.h.0.attn.c_attn.weight` (64, 192) of a GPT-2 is that, the
key's and the value's. Both turn the pairs (i, i + K/2) of a head by the rotary angles, so nothing is permuted.
"""

from typing import Any

from research.core.errors import UsageError
from research.models.hugging_face_layout import (
    ACTIVATIONS,
    GATED,
    UNGATED,
    Config,
    Family,
    Fields,
    Groups,
    Pair,
    dense,
    norm,
    ours_for,
    same,
    sizes,
    theirs_for,
)
from research.models.transformer import Decoder

SCALING = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')  # as our rotary_scaling


def llama_fields(config: Config) -> Fields:
    """Our fields of a Llama."""
    return {
        'depth': config['num_hidden_layers'],
        'width': config['hidden_size'],
        'heads': config['num_attention_heads'],
        'kv_heads': config['num_key_value_heads'] or config['num_attention_heads'],
        'head_size': config['head_dim'] or config['hidden_size'] // config['num_attention_heads'],
        'hidden': config['intermediate_size'],
        'activation': ours_for(GATED, 'hidden_act', config),
        'norm': 'rms',
        'norm_eps': config['rms_norm_eps'],
        'positions': 'rotary',
        'max_length': config['max_position_embeddings'],
        **_rotary_fields(config),
        'bias': False,
        'tied': config['tie_word_embeddings'],
        'num_outputs': config['vocab_size'],
    }


def _rotary_fields(config: Config) -> Fields:
    """The rotary positions, spelled as by transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
    rope: dict[str, Any] = {**(config['rope_scaling'] or {}), **(config['rope_parameters'] or {})}
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind not in ('default', 'llama3'):
        raise UsageError(f'config.json: rope_type={kind!r} has no counterpart here', 'known: default, llama3')
    scaling = tuple(float(rope[key]) for key in SCALING) if kind == 'llama3' else None
    return {'rotary_theta': float(rope.get('rope_theta', config['rope_theta'])), 'rotary_scaling': scaling}


def llama_config(fields: Fields) -> Config:
    """The config.json of a decoder."""
    heads, kv_heads, size, hidden = sizes(fields)
    return {
        'architectures': ['LlamaForCausalLM'],
        'vocab_size': fields['num_outputs'],
        'hidden_size': fields['width'],
        'intermediate_size': hidden,
        'num_hidden_layers': fields['depth'],
        'num_attention_heads': heads,
        'num_key_value_heads': kv_heads,
        'head_dim': size,
        'hidden_act': theirs_for(GATED, fields['activation']),
        'max_position_embeddings': fields['max_length'],
        'rms_norm_eps': fields['norm_eps'],
        'attention_bias': False,
        'attention_dropout': 0.0,
        'mlp_bias': False,
        'tie_word_embeddings': fields['tied'],
        **_rope(fields['rotary_theta'], fields['rotary_scaling']),
    }


def _rope(theta: float, scaling: tuple[float, ...] | None) -> Config:
    """The rotary positions as transformers 5 spells them, and beside it as transformers 4 and vLLM do."""
    numbers = {} if scaling is None else {'rope_type': 'llama3', **dict(zip(SCALING, scaling, strict=True))}
    if numbers:
        numbers[SCALING[-1]] = int(numbers[SCALING[-1]])
    parameters = {'rope_type': 'default', **numbers, 'rope_theta': theta}
    return {'rope_parameters': parameters, 'rope_theta': theta, 'rope_scaling': numbers or None}


def llama_groups(config: Config) -> Groups:
    """The tensors of a Llama."""
    fields = llama_fields(config)
    width, vocabulary = fields['width'], fields['num_outputs']
    body = [same('embed/embedding', 'model.embed_tokens.weight', (vocabulary, width))]
    for layer in range(fields['depth']):
        body += _llama_layer(f'stack/layers_{layer}', f'model.layers.{layer}', fields)
    body += norm('stack/final_norm', 'model.norm', width, bias=False)
    return {'body': body, 'head': [] if fields['tied'] else dense('head', 'lm_head', (width,), (vocabulary,), bias=False)}


def _llama_layer(ours: str, theirs: str, fields: Fields) -> list[Pair]:
    width, (heads, kv_heads, size, hidden) = fields['width'], sizes(fields)
    dense_layers = (
        ('attention/query', 'self_attn.q_proj', (width,), (heads, size)),
        ('attention/key', 'self_attn.k_proj', (width,), (kv_heads, size)),
        ('attention/value', 'self_attn.v_proj', (width,), (kv_heads, size)),
        ('attention/out', 'self_attn.o_proj', (heads, size), (width,)),
        ('feed_forward/gate', 'mlp.gate_proj', (width,), (hidden,)),
        ('feed_forward/up', 'mlp.up_proj', (width,), (hidden,)),
        ('feed_forward/down', 'mlp.down_proj', (hidden,), (width,)),
    )
    pairs = [pair for a, b, *shape in dense_layers for pair in dense(f'{ours}/{a}', f'{theirs}.{b}', *shape, bias=False)]
    pairs += norm(f'{ours}/attention_norm', f'{theirs}.input_layernorm', width, bias=False)
    return pairs + norm(f'{ours}/feed_forward_norm', f'{theirs}.post_attention_layernorm', width, bias=False)


def gpt2_fields(config: Config) -> Fields:
    """Our fields of a GPT-2."""
    return {
        'depth': config['n_layer'],
        'width': config['n_embd'],
        'heads': config['n_head'],
        'hidden': config['n_inner'] or 4 * config['n_embd'],
        'activation': ours_for(ACTIVATIONS, 'activation_function', config),
        'norm': 'layer',
        'norm_eps': config['layer_norm_epsilon'],
        'positions': 'learned',
        'max_length': config['n_positions'],
        'bias': True,
        'tied': config['tie_word_embeddings'],
        'dropout': config['resid_pdrop'],
        'num_outputs': config['vocab_size'],
    }


def gpt2_config(fields: Fields) -> Config:
    """The config.json of a decoder."""
    return {
        'architectures': ['GPT2LMHeadModel'],
        'vocab_size': fields['num_outputs'],
        'n_positions': fields['max_length'],
        'n_embd': fields['width'],
        'n_layer': fields['depth'],
        'n_head': fields['heads'],
        'n_inner': sizes(fields)[3],
        'activation_function': theirs_for(ACTIVATIONS, fields['activation']),
        'resid_pdrop': fields['dropout'],
        'embd_pdrop': fields['dropout'],
        'attn_pdrop': 0.0,
        'layer_norm_epsilon': fields['norm_eps'],
        'tie_word_embeddings': fields['tied'],
    }


def gpt2_groups(config: Config) -> Groups:
    """The tensors of a GPT-2."""
    fields = gpt2_fields(config)
    width, vocabulary = fields['width'], fields['num_outputs']
    body = [
        same('embed/embedding', 'transformer.wte.weight', (vocabulary, width)),
        same('position/embedding', 'transformer.wpe.weight', (fields['max_length'], width)),
    ]
    for layer in range(fields['depth']):
        body += _gpt2_layer(f'stack/layers_{layer}', f'transformer.h.{layer}', fields)
    body += norm('stack/final_norm', 'transformer.ln_f', width)
    return {'body': body, 'head': [] if fields['tied'] else dense('head', 'lm_head', (width,), (vocabulary,), bias=False)}


def _gpt2_layer(ours: str, theirs: str, fields: Fields) -> list[Pair]:
    width, (heads, _, size, hidden) = fields['width'], sizes(fields)
    fused = tuple(f'{ours}/attention/{name}' for name in ('query', 'key', 'value'))
    return [
        *norm(f'{ours}/attention_norm', f'{theirs}.ln_1', width),
        *dense(fused, f'{theirs}.attn.c_attn', (width,), (heads, size), transposed=False),
        *dense(f'{ours}/attention/out', f'{theirs}.attn.c_proj', (heads, size), (width,), transposed=False),
        *norm(f'{ours}/feed_forward_norm', f'{theirs}.ln_2', width),
        *dense(f'{ours}/feed_forward/up', f'{theirs}.mlp.c_fc', (width,), (hidden,), transposed=False),
        *dense(f'{ours}/feed_forward/down', f'{theirs}.mlp.c_proj', (hidden,), (width,), transposed=False),
    ]


LLAMA = Family(
    name='llama',
    module=Decoder,
    prefix='model.',
    heads=('lm_head.',),
    defaults={
        'num_key_value_heads': None,
        'head_dim': None,
        'hidden_act': 'silu',
        'max_position_embeddings': 2048,
        'rms_norm_eps': 1e-6,
        'rope_theta': 10000.0,
        'rope_scaling': None,
        'rope_parameters': None,
        'tie_word_embeddings': False,
    },
    expects={'attention_bias': False, 'mlp_bias': False},
    needs={
        'norm': ('rms',),
        'norm_position': ('pre',),
        'positions': ('rotary',),
        'activation': ('swiglu', 'geglu'),
        'bias': (False,),
        'qk_norm': (False,),
    },
    ignored=(r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq', r'lm_head\.weight'),
    fields=llama_fields,
    config=llama_config,
    groups=llama_groups,
)

GPT2 = Family(
    name='gpt2',
    module=Decoder,
    prefix='transformer.',
    heads=('lm_head.',),
    defaults={
        'n_inner': None,
        'n_positions': 1024,
        'activation_function': 'gelu_new',
        'resid_pdrop': 0.1,
        'layer_norm_epsilon': 1e-5,
        'tie_word_embeddings': True,
    },
    expects={'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False},
    needs={
        'norm': ('layer',),
        'norm_position': ('pre',),
        'positions': ('learned',),
        'activation': UNGATED,
        'bias': (True,),
        'qk_norm': (False,),
        'kv_heads': (None,),
        'head_size': (None,),
    },
    ignored=(r'transformer\.h\.\d+\.attn\.(bias|masked_bias)', r'lm_head\.weight'),
    fields=gpt2_fields,
    config=gpt2_config,
    groups=gpt2_groups,
)
