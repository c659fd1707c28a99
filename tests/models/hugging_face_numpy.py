"""Llama, GPT-2, BERT and ViT in plain numpy, float64, from tensors under Hugging Face's names: the independent reference.

Written from the papers and from what the libraries document; it shares nothing with research/. Linear layers are torch's,
(out, in); GPT-2's are Conv1D, (in, out).
"""

import math

import numpy as np
from scipy.special import erf, softmax


def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def linear(tensors, name, x):
    y = x @ tensors[f'{name}.weight'].T
    return y + tensors[f'{name}.bias'] if f'{name}.bias' in tensors else y


def conv1d(tensors, name, x):
    return x @ tensors[f'{name}.weight'] + tensors[f'{name}.bias']


def layer_norm(tensors, name, x, eps):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return normed * tensors[f'{name}.weight'] + tensors[f'{name}.bias']


def rms_norm(tensors, name, x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * tensors[f'{name}.weight']


def heads(x, number):
    """(B, T, H K) -> (B, H, T, K)."""
    return x.reshape(*x.shape[:2], number, -1).transpose(0, 2, 1, 3)


def attention(query, key, value, mask):
    """(B, H, T, K) each, mask broadcast to (B, H, T, T) -> (B, T, H K)."""
    scores = query @ key.transpose(0, 1, 3, 2) / math.sqrt(query.shape[-1])
    found = softmax(np.where(mask, scores, -1e30), axis=-1) @ value
    return found.transpose(0, 2, 1, 3).reshape(found.shape[0], found.shape[2], -1)


def causal(length):
    return np.tril(np.ones((length, length), bool))


def rotary_frequencies(size, theta, scaling):
    """1 / theta^(2i / K), stretched as Llama 3.1 does: three cases by wavelength."""
    frequencies = 1 / theta ** (np.arange(0, size, 2) / size)
    if scaling is None:
        return frequencies
    long, short = (scaling['original_max_position_embeddings'] / scaling[k] for k in ('low_freq_factor', 'high_freq_factor'))
    result = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < short:
            result.append(frequency)
        elif wavelength > long:
            result.append(frequency / scaling['factor'])
        else:
            low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
            smooth = (scaling['original_max_position_embeddings'] / wavelength - low) / (high - low)
            result.append((1 - smooth) * frequency / scaling['factor'] + smooth * frequency)
    return np.array(result)


def rotate_half(x, angles):
    """The pairs (i, i + K/2) of x (B, H, T, K) turned by angles (T, K/2)."""
    cosine, sine = (np.concatenate([f(angles), f(angles)], -1) for f in (np.cos, np.sin))
    half = x.shape[-1] // 2
    return x * cosine + np.concatenate([-x[..., half:], x[..., :half]], -1) * sine


def llama(tensors, config, tokens):
    x = tensors['model.embed_tokens.weight'][tokens]
    number, groups = config['num_attention_heads'], config['num_key_value_heads']
    frequencies = rotary_frequencies(config['head_dim'], config['rope_theta'], config['rope_scaling'])
    angles = np.arange(tokens.shape[1])[:, None] * frequencies
    for i in range(config['num_hidden_layers']):
        layer = f'model.layers.{i}'
        y = rms_norm(tensors, f'{layer}.input_layernorm', x, config['rms_norm_eps'])
        query = rotate_half(heads(linear(tensors, f'{layer}.self_attn.q_proj', y), number), angles)
        key = rotate_half(heads(linear(tensors, f'{layer}.self_attn.k_proj', y), groups), angles)
        value = heads(linear(tensors, f'{layer}.self_attn.v_proj', y), groups)
        key, value = (np.repeat(z, number // groups, axis=1) for z in (key, value))
        x = x + linear(tensors, f'{layer}.self_attn.o_proj', attention(query, key, value, causal(tokens.shape[1])))
        y = rms_norm(tensors, f'{layer}.post_attention_layernorm', x, config['rms_norm_eps'])
        y = silu(linear(tensors, f'{layer}.mlp.gate_proj', y)) * linear(tensors, f'{layer}.mlp.up_proj', y)
        x = x + linear(tensors, f'{layer}.mlp.down_proj', y)
    x = rms_norm(tensors, 'model.norm', x, config['rms_norm_eps'])
    return x @ tensors['model.embed_tokens.weight' if config['tie_word_embeddings'] else 'lm_head.weight'].T


def gpt2(tensors, config, tokens):
    eps, number = config['layer_norm_epsilon'], config['n_head']
    x = tensors['transformer.wte.weight'][tokens] + tensors['transformer.wpe.weight'][: tokens.shape[1]]
    for i in range(config['n_layer']):
        layer = f'transformer.h.{i}'
        fused = conv1d(tensors, f'{layer}.attn.c_attn', layer_norm(tensors, f'{layer}.ln_1', x, eps))
        query, key, value = (heads(part, number) for part in np.split(fused, 3, axis=-1))
        x = x + conv1d(tensors, f'{layer}.attn.c_proj', attention(query, key, value, causal(tokens.shape[1])))
        y = gelu_new(conv1d(tensors, f'{layer}.mlp.c_fc', layer_norm(tensors, f'{layer}.ln_2', x, eps)))
        x = x + conv1d(tensors, f'{layer}.mlp.c_proj', y)
    return layer_norm(tensors, 'transformer.ln_f', x, eps) @ tensors['transformer.wte.weight'].T


def bert(tensors, config, tokens, mask):
    """What the architecture gives: hidden states and pooled (BertModel), else logits. `mask` (B, T) is 1 for tokens."""
    eps, number = config['layer_norm_eps'], config['num_attention_heads']
    name = 'bert.embeddings'
    x = tensors[f'{name}.word_embeddings.weight'][tokens] + tensors[f'{name}.token_type_embeddings.weight'][0]
    x = layer_norm(tensors, f'{name}.LayerNorm', x + tensors[f'{name}.position_embeddings.weight'][: tokens.shape[1]], eps)
    for i in range(config['num_hidden_layers']):
        layer = f'bert.encoder.layer.{i}'
        parts = [heads(linear(tensors, f'{layer}.attention.self.{n}', x), number) for n in ('query', 'key', 'value')]
        y = linear(tensors, f'{layer}.attention.output.dense', attention(*parts, mask[:, None, None] > 0))
        x = layer_norm(tensors, f'{layer}.attention.output.LayerNorm', x + y, eps)
        y = linear(tensors, f'{layer}.output.dense', gelu(linear(tensors, f'{layer}.intermediate.dense', x)))
        x = layer_norm(tensors, f'{layer}.output.LayerNorm', x + y, eps)
    if 'cls.predictions.bias' in tensors:
        y = gelu(linear(tensors, 'cls.predictions.transform.dense', x))
        y = layer_norm(tensors, 'cls.predictions.transform.LayerNorm', y, eps)
        return y @ tensors[f'{name}.word_embeddings.weight'].T + tensors['cls.predictions.bias']
    if 'bert.pooler.dense.weight' in tensors:
        x = np.tanh(linear(tensors, 'bert.pooler.dense', x[:, 0]))
    return linear(tensors, 'classifier', x) if 'classifier.weight' in tensors else x


def vit(tensors, config, images):
    eps, number, side = config['layer_norm_eps'], config['num_attention_heads'], config['patch_size']
    batch, height, width, channels = images.shape
    patches = images.reshape(batch, height // side, side, width // side, side, channels)
    patches = patches.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, channels * side * side)  # (B, P, C p p)
    kernel = tensors['vit.embeddings.patch_embeddings.projection.weight']
    x = patches @ kernel.reshape(len(kernel), -1).T + tensors['vit.embeddings.patch_embeddings.projection.bias']
    token = np.broadcast_to(tensors['vit.embeddings.cls_token'], (batch, 1, x.shape[-1]))
    x = np.concatenate([token, x], axis=1) + tensors['vit.embeddings.position_embeddings']
    for i in range(config['num_hidden_layers']):
        layer = f'vit.encoder.layer.{i}'
        y = layer_norm(tensors, f'{layer}.layernorm_before', x, eps)
        parts = [heads(linear(tensors, f'{layer}.attention.attention.{n}', y), number) for n in ('query', 'key', 'value')]
        x = x + linear(tensors, f'{layer}.attention.output.dense', attention(*parts, np.ones((1, 1), bool)))
        y = layer_norm(tensors, f'{layer}.layernorm_after', x, eps)
        x = x + linear(tensors, f'{layer}.output.dense', gelu(linear(tensors, f'{layer}.intermediate.dense', y)))
    return linear(tensors, 'classifier', layer_norm(tensors, 'vit.layernorm', x, eps)[:, 0])
