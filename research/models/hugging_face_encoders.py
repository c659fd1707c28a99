"""BERT and ViT as Hugging Face stores them, beside our `Encoder` and `ViT`.

Shape letters: D model, H heads, K head size, F hidden, V vocabulary, P positions, C channels, N outputs, p side of a patch.

    family   published with                            one of ours is one with
    bert     BERT (Devlin et al., 2019), MiniLM        post-norm, learned positions, a norm of the embedding, and biases
    vit      ViT (Dosovitskiy et al., 2021)            learned positions and a class token, which the head reads

    architecture                     our encoder
    BertModel                        num_outputs=0 (its pooler is ours with pooling='first')
    BertForSequenceClassification    pooling='first'
    BertForTokenClassification       pooling='none'
    BertForMaskedLM                  mask_head=True
    ViTForImageClassification        a ViT with head='token'

For D = 64 and H = 4 the tensor `bert.encoder.layer.0.attention.self.query.weight` (64, 64) is our
`stack/layers_0/attention/query/kernel` (64, 4, 16). An encoder that reads the mean of its tokens has no counterpart.
"""

from typing import Any

from research.core.errors import UsageError
from research.models.hugging_face_layout import (
    ACTIVATIONS,
    UNGATED,
    Config,
    Family,
    Fields,
    Groups,
    Pair,
    Shape,
    dense,
    norm,
    ours_for,
    same,
    sizes,
    theirs_for,
)
from research.models.transformer import Encoder
from research.models.vit import ViT

MASKED = ('BertForMaskedLM', 'BertForPreTraining')


def _num_labels(config: Config) -> int:
    """N, how many classes a head of theirs tells apart."""
    return len(config['id2label']) if config.get('id2label') else config.get('num_labels', 2)


def bert_fields(config: Config) -> Fields:
    """Our fields of a BERT; a bare one is read as a classifier by the first token."""
    architecture = (config.get('architectures') or ['BertModel'])[0]
    return {
        'depth': config['num_hidden_layers'],
        'width': config['hidden_size'],
        'heads': config['num_attention_heads'],
        'hidden': config['intermediate_size'],
        'activation': ours_for(ACTIVATIONS, 'hidden_act', config),
        'norm': 'layer',
        'norm_eps': config['layer_norm_eps'],
        'norm_position': 'post',
        'positions': 'learned',
        'max_length': config['max_position_embeddings'],
        'bias': True,
        'dropout': config['hidden_dropout_prob'],
        'vocabulary_size': config['vocab_size'],
        'segment_types': config['type_vocab_size'],
        'embed_norm': True,
        'pooling': 'none' if architecture in (*MASKED, 'BertForTokenClassification') else 'first',
        'mask_head': architecture in MASKED,
        'num_outputs': config['vocab_size'] if architecture in MASKED else _num_labels(config),
    }


def bert_config(fields: Fields) -> Config:
    """The config.json of an encoder."""
    kinds = {'first': 'BertForSequenceClassification', 'none': 'BertForTokenClassification'}
    if not fields['num_outputs'] and fields['pooling'] != 'first':
        raise UsageError('a BertModel without a head has a pooler, and this encoder has none', "use model.pooling='first'")
    architecture = 'BertForMaskedLM' if fields['mask_head'] else kinds[fields['pooling']]
    labels = {} if fields['mask_head'] else {'num_labels': fields['num_outputs']}
    return {
        'architectures': [architecture if fields['num_outputs'] else 'BertModel'],
        **labels,
        'vocab_size': fields['vocabulary_size'],
        'hidden_size': fields['width'],
        'num_hidden_layers': fields['depth'],
        'num_attention_heads': fields['heads'],
        'intermediate_size': sizes(fields)[3],
        'hidden_act': theirs_for(ACTIVATIONS, fields['activation']),
        'hidden_dropout_prob': fields['dropout'],
        'attention_probs_dropout_prob': 0.0,
        'max_position_embeddings': fields['max_length'],
        'type_vocab_size': fields['segment_types'],
        'layer_norm_eps': fields['norm_eps'],
        'position_embedding_type': 'absolute',
        'is_decoder': False,
        'add_cross_attention': False,
        'tie_word_embeddings': True,
    }


def bert_groups(config: Config) -> Groups:
    """The tensors of a BERT."""
    fields, width = bert_fields(config), config['hidden_size']
    vocabulary, embeddings = config['vocab_size'], 'bert.embeddings'
    body = [
        same('embed/embedding', f'{embeddings}.word_embeddings.weight', (vocabulary, width)),
        same('position/embedding', f'{embeddings}.position_embeddings.weight', (fields['max_length'], width)),
        same('segment_type/embedding', f'{embeddings}.token_type_embeddings.weight', (fields['segment_types'], width)),
        *norm('embed_norm', f'{embeddings}.LayerNorm', width),
    ]
    for layer in range(fields['depth']):
        body += _bert_layer(f'stack/layers_{layer}', f'bert.encoder.layer.{layer}', fields)
    predictions = 'cls.predictions'
    masked = [
        *dense('head/transform', f'{predictions}.transform.dense', (width,), (width,)),
        *norm('head/norm', f'{predictions}.transform.LayerNorm', width),
        same('head/bias', f'{predictions}.bias', (vocabulary,)),
    ]
    pooler = dense('pooler', 'bert.pooler.dense', (width,), (width,))
    classifier = [] if fields['mask_head'] else dense('head', 'classifier', (width,), (_num_labels(config),))
    return {'body': body, 'pooler': pooler, 'masked': masked if fields['mask_head'] else [], 'classifier': classifier}


def _bert_layer(ours: str, theirs: str, fields: Fields) -> list[Pair]:
    width, (_, _, _, hidden) = fields['width'], sizes(fields)
    return [
        *_attention(ours, f'{theirs}.attention.self', f'{theirs}.attention.output.dense', fields),
        *norm(f'{ours}/attention_norm', f'{theirs}.attention.output.LayerNorm', width),
        *dense(f'{ours}/feed_forward/up', f'{theirs}.intermediate.dense', (width,), (hidden,)),
        *dense(f'{ours}/feed_forward/down', f'{theirs}.output.dense', (hidden,), (width,)),
        *norm(f'{ours}/feed_forward_norm', f'{theirs}.output.LayerNorm', width),
    ]


def _attention(ours: str, theirs: str, out: str, fields: Fields) -> list[Pair]:
    """Query, key and value under the name `theirs`, and the output projection `out`."""
    width, (heads, _, size, _) = fields['width'], sizes(fields)
    names = ('query', 'key', 'value')
    pairs = [p for name in names for p in dense(f'{ours}/attention/{name}', f'{theirs}.{name}', (width,), (heads, size))]
    return pairs + dense(f'{ours}/attention/out', out, (heads, size), (width,))


def vit_fields(config: Config) -> Fields:
    """Our fields of a ViT."""
    return {
        'depth': config['num_hidden_layers'],
        'width': config['hidden_size'],
        'heads': config['num_attention_heads'],
        'hidden': config['intermediate_size'],
        'activation': ours_for(ACTIVATIONS, 'hidden_act', config),
        'norm_eps': config['layer_norm_eps'],
        'positions': 'learned',
        'head': 'token',
        'dropout': config['hidden_dropout_prob'],
        'patch': _square(config['patch_size']),
        'num_outputs': _num_labels(config),
    }


def vit_config(fields: Fields) -> Config:
    """The config.json of a ViT on images of the shape `fields['image']`, (height, width, channels)."""
    height, width, channels = fields['image']
    return {
        'architectures': ['ViTForImageClassification'],
        'hidden_size': fields['width'],
        'num_hidden_layers': fields['depth'],
        'num_attention_heads': fields['heads'],
        'intermediate_size': sizes(fields)[3],
        'hidden_act': theirs_for(ACTIVATIONS, fields['activation']),
        'hidden_dropout_prob': fields['dropout'],
        'attention_probs_dropout_prob': 0.0,
        'layer_norm_eps': fields['norm_eps'],
        'image_size': height if height == width else [height, width],
        'patch_size': fields['patch'],
        'num_channels': channels,
        'qkv_bias': True,
        'num_labels': fields['num_outputs'],
    }


def vit_groups(config: Config) -> Groups:
    """The tensors of a ViT, under the names that are in the files (transformers 5 has others in memory)."""
    fields = vit_fields(config)
    width, patch, channels = fields['width'], fields['patch'], config['num_channels']
    height, breadth = config['image_size'] if isinstance(config['image_size'], (list, tuple)) else [config['image_size']] * 2
    places, embeddings = 1 + (height // patch) * (breadth // patch), 'vit.embeddings'
    kernel: Shape = (patch, patch, channels, width)
    projection = f'{embeddings}.patch_embeddings.projection'
    positions = Pair(
        ('position/embedding',), f'{embeddings}.position_embeddings', ((places, width),), ((1, places, width),), (0, 1, 2)
    )
    body = [
        same('class_token', f'{embeddings}.cls_token', (1, 1, width)),
        positions,
        same('patch/kernel', f'{projection}.weight', kernel, (3, 2, 0, 1)),
        same('patch/bias', f'{projection}.bias', (width,)),
    ]
    for layer in range(fields['depth']):
        body += _vit_layer(f'stack/layers_{layer}', f'vit.encoder.layer.{layer}', fields)
    body += norm('stack/final_norm', 'vit.layernorm', width)
    return {'body': body, 'classifier': dense('head', 'classifier', (width,), (fields['num_outputs'],))}


def _vit_layer(ours: str, theirs: str, fields: Fields) -> list[Pair]:
    width, (_, _, _, hidden) = fields['width'], sizes(fields)
    return [
        *norm(f'{ours}/attention_norm', f'{theirs}.layernorm_before', width),
        *_attention(ours, f'{theirs}.attention.attention', f'{theirs}.attention.output.dense', fields),
        *norm(f'{ours}/feed_forward_norm', f'{theirs}.layernorm_after', width),
        *dense(f'{ours}/feed_forward/up', f'{theirs}.intermediate.dense', (width,), (hidden,)),
        *dense(f'{ours}/feed_forward/down', f'{theirs}.output.dense', (hidden,), (width,)),
    ]


def _square(patch: Any) -> int:
    """The side of a patch."""
    sides = set(patch) if isinstance(patch, (list, tuple)) else {patch}
    if len(sides) != 1:
        raise UsageError(f'config.json: patch_size={patch} is no square', 'patches of our ViT are squares')
    return sides.pop()


_ENCODER_DEFAULTS = {'hidden_act': 'gelu', 'layer_norm_eps': 1e-12}

BERT = Family(
    name='bert',
    module=Encoder,
    prefix='bert.',
    heads=('cls.', 'classifier.'),
    defaults={
        **_ENCODER_DEFAULTS,
        'max_position_embeddings': 512,
        'type_vocab_size': 2,
        'hidden_dropout_prob': 0.1,
    },
    expects={
        'position_embedding_type': 'absolute',
        'is_decoder': False,
        'add_cross_attention': False,
        'tie_word_embeddings': True,
    },
    needs={
        'norm': ('layer',),
        'norm_position': ('post',),
        'positions': ('learned',),
        'activation': UNGATED,
        'bias': (True,),
        'qk_norm': (False,),
        'embed_norm': (True,),
        'pooling': ('first', 'none'),
        'kv_heads': (None,),
        'head_size': (None,),
        'segment_types': range(1, 1_000_000),
        'tied': (True,),
    },
    ignored=(
        r'bert\.embeddings\.position_ids',
        r'cls\.seq_relationship\..*',  # BERT's second task, which we have not
        r'cls\.predictions\.decoder\..*',  # the embedding, and the bias, once more
    ),
    fields=bert_fields,
    config=bert_config,
    groups=bert_groups,
)

VIT = Family(
    name='vit',
    module=ViT,
    prefix='vit.',
    heads=('classifier.',),
    defaults={**_ENCODER_DEFAULTS, 'hidden_dropout_prob': 0.0, 'image_size': 224, 'patch_size': 16, 'num_channels': 3},
    expects={'qkv_bias': True},
    needs={'positions': ('learned',), 'head': ('token',), 'activation': UNGATED},
    ignored=(r'vit\.pooler\..*', r'vit\.embeddings\.mask_token'),  # neither is used for classification
    fields=vit_fields,
    config=vit_config,
    groups=vit_groups,
)
