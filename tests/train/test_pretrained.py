"""Reading the weights of a Hugging Face folder: one file, shards, half precision, and every way in which it can be broken."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from research.core.errors import UsageError
from research.models import hugging_face
from research.train.pretrained import INDEX, SINGLE, is_hugging_face, read_folder, read_tensors
from tests.models.hugging_face_cases import BERT, GPT2, LLAMA, tensors_of


def write(folder, config=LLAMA, tensors=None):
    """A folder with a model in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    save_file(tensors_of(config) if tensors is None else tensors, folder / SINGLE, metadata={'format': 'pt'})
    return folder


def write_shards(folder, config=LLAMA):
    """The same model in two files with their index."""
    write(folder, config)
    (folder / SINGLE).unlink()
    tensors = tensors_of(config)
    names = sorted(tensors)
    shards = {'model-00001-of-00002.safetensors': names[::2], 'model-00002-of-00002.safetensors': names[1::2]}
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / shard)
    places = {name: shard for shard, own in shards.items() for name in own}
    (folder / INDEX).write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': places}))
    return folder


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
        assert one[name].dtype == other[name].dtype


@pytest.mark.parametrize('config', [LLAMA, GPT2, BERT], ids=lambda c: c['model_type'])
def test_one_file_and_shards_hold_the_same(config, tmp_path):
    family, whole = hugging_face.read_config(write(tmp_path / 'one', config))
    found = read_folder(tmp_path / 'one')
    assert_equal(found, hugging_face.to_ours(family, whole, tensors_of(config)))
    assert_equal(found, read_folder(write_shards(tmp_path / 'many', config)))
    assert is_hugging_face(tmp_path / 'one')
    assert not is_hugging_face(tmp_path)


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floating_types_become_float32(dtype, tmp_path):
    halves = {name: tensor.astype(dtype) for name, tensor in tensors_of(GPT2).items()}
    found = read_folder(write(tmp_path, GPT2, halves))
    assert {leaf.dtype for leaf in found.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(found['embed/embedding'], halves['transformer.wte.weight'].astype(np.float32))
    up = halves['transformer.h.1.mlp.c_fc.weight'].astype(np.float32)
    np.testing.assert_array_equal(found['stack/layers_1/feed_forward/up/kernel'], up)


def test_float32_stays_in_the_file_until_it_is_used(tmp_path):
    def origin(array):
        while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
            array = array.base
        return type(array)

    found = read_folder(write(tmp_path))
    assert {origin(leaf) for leaf in found.values()} == {np.memmap}
    with pytest.raises(ValueError, match='read-only'):
        found['embed/embedding'][0, 0] = 1.0


def test_buffers_that_are_no_weights_may_have_any_type(tmp_path):
    tensors = tensors_of(BERT)
    plain = read_folder(write(tmp_path / 'plain', BERT, tensors))
    more = {**tensors, 'bert.embeddings.position_ids': np.arange(24)[None]}
    assert_equal(plain, read_folder(write(tmp_path / 'more', BERT, more)))
    buffers = {'transformer.h.0.attn.bias': np.ones((1, 1, 24, 24), bool)}
    assert len(read_folder(write(tmp_path / 'gpt2', GPT2, tensors_of(GPT2) | buffers))) == 4 + 2 * 16


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(LLAMA))
    with pytest.raises(UsageError, match=r'holds neither model\.safetensors nor'):
        read_folder(tmp_path)
    (tmp_path / 'pytorch_model.bin').write_bytes(b'\x80\x02c__builtin__\nprint\n')
    with pytest.raises(UsageError, match=r'pytorch_model\.bin is pickled: reading it can run any code'):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    'damage',
    [
        lambda data: b'',
        lambda data: data[:5],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:8] + b'x' + data[9:],
        lambda data: (2**60).to_bytes(8, 'little') + data[8:],
        lambda data: data.replace(b'"F32"', b'"F64"', 1),
    ],
)
def test_a_damaged_file_is_refused_by_name(damage, tmp_path):
    path = write(tmp_path) / SINGLE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=r'model\.safetensors is no intact safetensors file'):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ('dtype', 'message'),
    [
        (ml_dtypes.float8_e4m3fn, r'model\.safetensors: model\.norm\.weight is F8_E4M3'),
        (np.int8, 'stack/final_norm/scale is int8'),
    ],
)
def test_quantised_weights_are_refused_by_name(dtype, message, tmp_path):
    tensors = tensors_of(LLAMA)
    tensors['model.norm.weight'] = tensors['model.norm.weight'].astype(dtype)
    with pytest.raises(UsageError, match=message):
        read_folder(write(tmp_path, LLAMA, tensors))


def test_a_broken_index_is_refused(tmp_path):
    folder = write_shards(tmp_path / 'model')
    save_file({'model.norm.weight': np.ones(32, np.float32)}, tmp_path / 'elsewhere.safetensors')
    text = (folder / INDEX).read_text()

    def with_index(change):
        index = json.loads(text)
        (folder / INDEX).write_text(json.dumps(change(index) or index))
        return pytest.raises(UsageError)

    with with_index(lambda index: index['weight_map'].update({'model.norm.weight': '../elsewhere.safetensors'})) as caught:
        read_tensors(folder)
    assert "names '../elsewhere.safetensors', which is no file beside it" in caught.value.message
    with with_index(
        lambda index: index['weight_map'].update({'model.norm.weight': 'model-00003-of-00002.safetensors'})
    ) as caught:
        read_tensors(folder)
    assert 'which is no file beside it' in caught.value.message
    with with_index(lambda index: index['weight_map'].update({'more': 'model-00001-of-00002.safetensors'})) as caught:
        read_tensors(folder)
    assert "00001-of-00002.safetensors has no 'more', which model.safetensors.index.json puts there" in caught.value.message
    with with_index(lambda index: ['a list']) as caught:
        read_tensors(folder)
    assert 'is damaged' in caught.value.message


def test_a_model_and_a_config_that_differ_are_refused(tmp_path):
    write(tmp_path, {**LLAMA, 'num_hidden_layers': 1}, tensors_of(LLAMA))
    with pytest.raises(UsageError, match=r'model\.layers\.1\.\S+ is unknown.*; and \d+ more'):
        read_folder(tmp_path)
