"""Import and export of Hugging Face models, against plain numpy that reads their tensors; and that mutants are noticed."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from research.core import leaves
from research.core.errors import UsageError
from research.core.registry import component
from research.models import hugging_face, presets
from research.models.cnn import CNN
from research.models.hugging_face_layout import dense
from research.models.transformer import Decoder, Encoder
from research.models.vit import ViT
from tests.models import hugging_face_numpy as reference
from tests.models.hugging_face_cases import BARE, BERT, CASES, GPT2, LLAMA, SCALING, VIT, inputs_of, tensors_of

TOLERANCE, NOTICED = 1e-4, 1e-2


def saved(folder, config):
    """`folder` with a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def imported(folder, config, tensors):
    """Our class, fields and leaves of a model."""
    family, whole = hugging_face.read_config(saved(folder, config))
    return *hugging_face.read_fields(folder), hugging_face.to_ours(family, whole, tensors)


def forward(module, fields, weights, config):
    """Outputs of ours, of a bare BERT the features."""
    inputs, mask = inputs_of(config)
    changes = {'num_outputs': 0} if config['architectures'] == ['BertModel'] else {}
    more = {'segments': mask} if config['model_type'] == 'bert' else {}
    network = module(**{**fields, 'dropout': 0.0, **changes})
    return np.asarray(network.apply({'params': leaves.nested(weights)}, inputs, **more), np.float64)


def expected(config, tensors):
    """Outputs of the reference."""
    family = {'llama': reference.llama, 'gpt2': reference.gpt2, 'bert': reference.bert, 'vit': reference.vit}
    bare = config['architectures'] == ['BertModel']
    wide = {f'bert.{k}' if bare else k: v.astype(np.float64) for k, v in tensors.items()}
    inputs, mask = inputs_of(config)
    more = (mask,) if config['model_type'] == 'bert' else ()
    return family[config['model_type']](wide, config, inputs, *more)


def difference(found, wanted, config):
    """The largest difference where there are tokens."""
    _, mask = inputs_of(config)
    where = np.ones(found.shape, bool) if found.ndim == 2 else (mask > 0)[..., None] & np.ones(found.shape, bool)
    assert np.isfinite(found).all()
    return np.abs(found - wanted)[where].max()


@pytest.mark.parametrize('case', CASES)
def test_an_imported_model_computes_what_numpy_computes(case, tmp_path):
    config = CASES[case]
    tensors = tensors_of(config)
    found, wanted = forward(*imported(tmp_path, config, tensors), config), expected(config, tensors)
    assert found.shape == wanted.shape
    assert wanted.std() > 0.5
    assert difference(found, wanted, config) < TOLERANCE


def swap(weights, one, other):
    """Two leaves of every layer exchanged."""
    layer = [name for name in weights if name.endswith(one)]
    pairs = {name: name.replace(one, other) for name in layer}
    return {**weights, **{a: weights[b] for a, b in pairs.items()}, **{b: weights[a] for a, b in pairs.items()}}


def untransposed(weights, end):
    """The square kernels of that name as if nobody had transposed them."""
    result = dict(weights)
    for name in (name for name in weights if name.endswith(end)):
        kernel = weights[name]
        matrix = kernel.reshape(kernel.shape[0], -1) if end == 'query/kernel' else kernel.reshape(-1, kernel.shape[-1])
        assert matrix.shape[0] == matrix.shape[1]
        result[name] = matrix.T.reshape(kernel.shape)
    return result


def interleaved(weights, size):
    """Query and key as if the pairs to be turned were (2i, 2i + 1), and not (i, i + K/2)."""
    order = np.arange(size).reshape(2, -1).T.reshape(-1)
    turned = [name for name in weights if name.endswith(('query/kernel', 'key/kernel'))]
    return {name: leaf[..., np.argsort(order)] if name in turned else leaf for name, leaf in weights.items()}


MUTANTS = {
    'rope': lambda fields, weights: (fields, interleaved(weights, fields['head_size'])),
    'rope theta': lambda fields, weights: ({**fields, 'rotary_theta': 10000.0}, weights),
    'rope scaling': lambda fields, weights: ({**fields, 'rotary_scaling': None}, weights),
    'swapped projection': lambda fields, weights: (fields, swap(weights, 'key/kernel', 'value/kernel')),
    'swapped gate': lambda fields, weights: (fields, swap(weights, 'gate/kernel', 'up/kernel')),
    'missing transpose, query': lambda fields, weights: (fields, untransposed(weights, 'query/kernel')),
    'missing transpose, out': lambda fields, weights: (fields, untransposed(weights, 'out/kernel')),
    'gelu': lambda fields, weights: (
        {**fields, 'activation': {'gelu': 'gelu_exact', 'gelu_exact': 'gelu'}[fields['activation']]},
        weights,
    ),
    'epsilon': lambda fields, weights: ({**fields, 'norm_eps': {1e-5: 1e-6, 1e-12: 1e-6}[fields['norm_eps']]}, weights),
    'norm position': lambda fields, weights: ({**fields, 'norm_position': 'pre'}, weights),
    'types': lambda fields, weights: (
        fields,
        {k: v[::-1] if k == 'segment_type/embedding' else v for k, v in weights.items()},
    ),
}
ALL = ('swapped projection', 'missing transpose, query', 'missing transpose, out', 'epsilon')
APPLY = {
    'llama': (*ALL, 'rope', 'rope theta', 'swapped gate'),
    'llama tied, stretched': ('rope', 'rope scaling'),
    'gpt2': (*ALL, 'gelu'),
    'bert classifier': (*ALL, 'gelu', 'types'),
    'bert masked': (*ALL, 'gelu'),
    'vit': (*ALL, 'gelu'),
}


@pytest.mark.parametrize(('case', 'mutant'), [(case, mutant) for case, mutants in APPLY.items() for mutant in mutants])
def test_a_mutant_is_noticed(case, mutant, tmp_path):
    config = CASES[case]
    tensors = tensors_of(config)
    module, fields, weights = imported(tmp_path, config, tensors)
    found = forward(module, *MUTANTS[mutant](fields, weights), config)
    assert difference(found, expected(config, tensors), config) > NOTICED


def test_a_fused_projection_in_another_order_is_noticed(tmp_path):
    tensors = tensors_of(GPT2)
    wanted = expected(GPT2, tensors)
    for name in [name for name in tensors if 'c_attn' in name]:
        query, key, value = np.split(tensors[name], 3, axis=-1)
        tensors[name] = np.concatenate([value, key, query], axis=-1)
    assert difference(forward(*imported(tmp_path, GPT2, tensors), GPT2), wanted, GPT2) > NOTICED


@pytest.mark.parametrize('case', CASES)
def test_there_and_back_again_is_equal_bit_for_bit(case, tmp_path):
    config = CASES[case]
    tensors = tensors_of(config)
    first = next(iter(tensors))
    tensors[first].flat[:3] = [np.nan, -0.0, np.inf]
    family, whole = hugging_face.read_config(saved(tmp_path, config))
    ours = hugging_face.to_ours(family, whole, tensors)
    back = hugging_face.to_theirs(family, whole, ours)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].tobytes() == np.ascontiguousarray(tensor).tobytes(), name
        assert back[name].shape == tensor.shape
        assert back[name].flags.c_contiguous


@pytest.mark.parametrize('case', CASES)
def test_names_and_shapes_are_those_of_our_module(case, tmp_path):
    config = CASES[case]
    module, fields, weights = imported(tmp_path, config, tensors_of(config))
    inputs, _ = inputs_of(config)
    changes = {'num_outputs': 0} if config['architectures'] == ['BertModel'] else {}
    fresh = jax.eval_shape(module(**{**fields, **changes}).init, jax.random.key(0), inputs)['params']
    assert {k: v.shape for k, v in leaves.flat(fresh).items()} == {k: v.shape for k, v in weights.items()}


@pytest.mark.parametrize('case', CASES)
def test_our_fields_written_as_a_config_are_read_as_the_same_fields(case, tmp_path):
    config = CASES[case]
    module, fields = hugging_face.read_fields(saved(tmp_path, config))
    fields |= {'num_outputs': 0} if config['architectures'] == ['BertModel'] else {}
    image = (*config['image_size'], 3) if config['model_type'] == 'vit' else None
    family, written = hugging_face.family_of(module(**fields), image)
    assert family.name == config['model_type']
    assert written['architectures'] == config['architectures']
    assert hugging_face.read_fields(saved(tmp_path / 'again', written)) == (module, fields)
    known = {k: v for k, v in config.items() if k not in ('id2label', 'n_inner')}
    assert {k: written[k] for k in known} == known


def test_layers_that_scan_stacked_are_exported_one_by_one(tmp_path):
    tensors = tensors_of(LLAMA)
    family, whole = hugging_face.read_config(saved(tmp_path, LLAMA))
    ours = hugging_face.to_ours(family, whole, tensors)
    _, fields = hugging_face.read_fields(tmp_path)
    module = Decoder(**{**fields, 'scan': True})
    fresh = jax.eval_shape(module.init, jax.random.key(0), inputs_of(LLAMA)[0])['params']
    stacked = {
        name: np.stack([ours[name.replace('/layers/', f'/layers_{i}/')] for i in range(2)])
        if '/layers/' in name
        else ours[name]
        for name in leaves.flat(fresh)
    }
    back = hugging_face.to_theirs(family, whole, stacked)
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)
    assert difference(forward(Decoder, {**fields, 'scan': True}, stacked, LLAMA), expected(LLAMA, tensors), LLAMA) < TOLERANCE


def test_presets_are_the_models_that_are_published():
    _, gpt2 = hugging_face.family_of(presets.GPT2Small(num_outputs=50257))
    published = {'n_embd': 768, 'n_layer': 12, 'n_head': 12, 'n_positions': 1024, 'vocab_size': 50257}
    published |= {'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True}
    assert {k: gpt2[k] for k in published} == published
    _, llama = hugging_face.family_of(presets.Llama1B(num_outputs=128256))
    published = {'hidden_size': 2048, 'intermediate_size': 8192, 'num_hidden_layers': 16, 'num_attention_heads': 32}
    published |= {'num_key_value_heads': 8, 'head_dim': 64, 'rope_theta': 500000.0, 'rms_norm_eps': 1e-5}
    published |= {'tie_word_embeddings': True, 'max_position_embeddings': 131072, 'hidden_act': 'silu'}
    published |= {'rope_scaling': {**SCALING, 'factor': 32.0, 'original_max_position_embeddings': 8192}}
    assert {k: llama[k] for k in published} == published
    _, bert = hugging_face.family_of(presets.BertBase(num_outputs=2, vocabulary_size=30522))
    published = {'hidden_size': 768, 'num_hidden_layers': 12, 'intermediate_size': 3072, 'hidden_act': 'gelu'}
    published |= {'layer_norm_eps': 1e-12, 'max_position_embeddings': 512, 'type_vocab_size': 2, 'vocab_size': 30522}
    assert {k: bert[k] for k in published} == published


def test_older_spellings_are_read(tmp_path):
    tensors = tensors_of(BERT)
    old = {
        k.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'): v
        for k, v in tensors.items()
    }
    old |= {'bert.embeddings.position_ids': np.arange(24)[None], 'cls.seq_relationship.weight': np.zeros((2, 32))}
    family, whole = hugging_face.read_config(saved(tmp_path, BERT))
    same, read = hugging_face.to_ours(family, whole, tensors), hugging_face.to_ours(family, whole, old)
    assert same.keys() == read.keys()
    assert all(np.array_equal(same[k], read[k]) for k in same)
    new = {k: v for k, v in LLAMA.items() if k not in ('rope_theta', 'rope_scaling', 'head_dim')}
    new['rope_parameters'] = {**SCALING, 'rope_theta': 1000.0}
    one = hugging_face.read_fields(saved(tmp_path / 'new', new))
    assert one == hugging_face.read_fields(saved(tmp_path / 'old', {**LLAMA, 'rope_scaling': SCALING}))
    bare = {k.removeprefix('transformer.'): v for k, v in tensors_of(GPT2).items()}
    bare |= {
        'h.0.attn.bias': np.ones((1, 1, 24, 24)),
        'h.1.attn.masked_bias': np.zeros(()),
        'lm_head.weight': bare['wte.weight'],
    }
    assert 'position/embedding' in imported(tmp_path / 'gpt2', GPT2, bare)[2]


def test_half_precision_is_moved_as_it_is():
    [pair] = dense('a', 'b', (4,), (2, 3), bias=False)
    kernel = np.arange(24).reshape(4, 2, 3).astype(ml_dtypes.bfloat16)
    packed = pair.pack([kernel])
    assert packed.shape == pair.shape == (6, 4)
    assert packed.dtype == kernel.dtype
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(packed, np.einsum('ihk->hki', kernel.astype(np.float32)).reshape(6, 4))
    np.testing.assert_array_equal(pair.unpack(packed)[0], kernel)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model_type': 'mamba'}, "model_type 'mamba' has no counterpart here"),
        ({'attention_bias': True}, 'our layers do not compute attention_bias=True'),
        ({'hidden_act': 'quick_gelu'}, "hidden_act='quick_gelu' has no counterpart here"),
        ({'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, "rope_type='yarn' has no counterpart here"),
        ({'hidden_size': None}, None),
    ],
)
def test_a_model_that_ours_do_not_compute_is_refused(changes, message, tmp_path):
    config = {k: v for k, v in {**LLAMA, **changes}.items() if v is not None}
    with pytest.raises(UsageError, match=message or "config.json has no 'hidden_size'"):
        hugging_face.read_fields(saved(tmp_path, config))


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"model_type": '])
def test_a_folder_without_a_model_is_refused(text, tmp_path):
    with pytest.raises(UsageError, match='says of no model what it is'):
        hugging_face.read_config(tmp_path)
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(UsageError, match='says of no model what it is'):
        hugging_face.read_config(tmp_path)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    family, whole = hugging_face.read_config(saved(tmp_path, LLAMA))
    tensors = tensors_of(LLAMA)
    del tensors['model.layers.1.mlp.up_proj.weight']
    tensors['model.norm.weight'] = np.zeros(31, np.float32)
    tensors['model.layers.0.self_attn.q_proj.bias'] = np.zeros(32, np.float32)
    with pytest.raises(UsageError) as caught:
        hugging_face.to_ours(family, whole, tensors, 'folder')
    assert caught.value.message == (
        'folder: model.layers.1.mlp.up_proj.weight is missing; model.layers.0.self_attn.q_proj.bias is unknown; '
        'model.norm.weight is (31,), expected (32,)'
    )
    half = {k: v for k, v in tensors_of(BERT).items() if k != 'classifier.bias'}
    family, whole = hugging_face.read_config(saved(tmp_path, BERT))
    with pytest.raises(UsageError, match=r'classifier\.bias is missing'):
        hugging_face.to_ours(family, whole, half)
    ours = hugging_face.to_ours(family, whole, tensors_of(BERT))
    with pytest.raises(
        UsageError, match=r'a bert cannot hold these parameters: head/scale has no place; pooler/bias is missing'
    ):
        hugging_face.to_theirs(
            family, whole, {**{k: v for k, v in ours.items() if k != 'pooler/bias'}, 'head/scale': ours['head/bias']}
        )


@pytest.mark.parametrize(
    ('module', 'message'),
    [
        (CNN(10), 'no Hugging Face family computes a CNN'),
        (Decoder(50, positions='sinusoidal'), "llama has no norm='layer'.*gpt2 has no positions='sinusoidal'"),
        (Decoder(50, kv_heads=2), 'gpt2 has no kv_heads=2'),
        (Decoder(50, bias=False, qk_norm=True), 'gpt2 has no bias=False, qk_norm=True'),
        (presets.BertBase(2, vocabulary_size=9, pooling='mean'), "bert has no pooling='mean'"),
        (Encoder(2, vocabulary_size=9), "bert has no norm_position='pre', embed_norm=False, segment_types=0"),
        (presets.BertBase(0, vocabulary_size=9, pooling='none'), 'this encoder has none'),
        (ViT(10, head='gap'), "vit has no head='gap'"),
    ],
)
def test_options_that_no_family_has_are_named(module, message):
    with pytest.raises(UsageError, match=message):
        hugging_face.family_of(module, (32, 32, 3))


def test_pretrained_takes_its_fields_from_the_folder(tmp_path):
    made = component('model', {'name': 'pretrained', 'path': str(saved(tmp_path, BARE)), 'dropout': 0.0}, 'config.model')
    encoder = made.build(num_outputs=7, vocabulary_size=41)
    assert isinstance(encoder, Encoder)
    assert (encoder.num_outputs, encoder.vocabulary_size, encoder.width, encoder.depth) == (7, 41, 32, 2)
    assert (encoder.pooling, encoder.dropout, encoder.norm_eps, encoder.hidden) == ('first', 0.0, 1e-12, 48)
    (tmp_path / '1_Pooling').mkdir()
    (tmp_path / '1_Pooling' / 'config.json').write_text('{"pooling_mode_mean_tokens": true}')
    assert made.build(num_outputs=7, vocabulary_size=41).pooling == 'mean'
    other = hugging_face.pretrained(41, 41, path=str(tmp_path), pooling='none', mask_head=True, scan=True)
    assert (other.pooling, other.mask_head, other.scan, other.dropout) == ('none', True, True, 0.1)
    decoder = hugging_face.pretrained(40, 40, path=str(saved(tmp_path / 'llama', LLAMA)))
    assert (type(decoder), decoder.kv_heads, decoder.rotary_theta) == (Decoder, 2, 1000.0)
    assert isinstance(hugging_face.pretrained(3, path=str(saved(tmp_path / 'vit', VIT))), ViT)
    with pytest.raises(UsageError, match=r'model\.pooling is for encoders'):
        hugging_face.pretrained(40, path=str(tmp_path / 'llama'), pooling='mean')
    with pytest.raises(UsageError, match=r'model\.pathh does not exist'):
        component('model', 'pretrained(pathh="x")', 'config.model')
