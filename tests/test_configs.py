"""Every config resolves, has a docstring with its command, and passes an `eval_shape`d step on data of its shape."""

import dataclasses
import importlib
import pathlib

import jax
import numpy as np
import pytest

from research.core import config_file, fields, schema
from research.core.durations import Facts
from research.core.registry import TABLES, Component, signature
from research.train import build
from tests import specs

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(p for p in ROOT.glob('configs/*.py') if p.stem != '__init__')

# What the data of each config look like: the shape of an example, classes, size of the vocabulary.
DATA = {
    'digits_cnn': specs.image((8, 8, 1), 10),
    'digits_lstm': specs.image((8, 8, 1), 10),
    'cifar10_cnn': specs.image((32, 32, 3), 10),
    'fashion_mnist_cnn': specs.image((28, 28, 1), 10),
    'fashion_vit': specs.image((28, 28, 1), 10),
    'fashion_resnet_fewlabels': specs.image((28, 28, 1), 10, labelled=((), np.float32)),
    'imagenet_vit_s16': specs.image((256, 256, 3), 1000),
    'shuttle_faults': specs.spec({'numeric': ((9,), np.float32), **specs.LABEL}, 2),
    'docs_gpt': specs.windows(128, 264),
    'minilm_finetune': specs.padded(16, 30522, 16),
    'speech_nl_ctc': specs.padded(112, 40, audio=((40000,), np.int16), audio_length=((), np.int32)),
    'gcide_gpt': specs.packed(256, 4096),
    'poetry_zh_gpt': specs.packed(128, 6000),
    'gpt2_124m': specs.windows(1024, 50304),
    'llama_1b': specs.windows(2048, 128256),
    'help_en_de_seq2seq': specs.pairs(64, 64, 4096),
    'bert_base_mlm': specs.packed(511, 30522),
    'stamps_clip': specs.padded(24, 1000, 16, image=((64, 64, 3), np.uint8)),  # 16 there: here a token is a letter
}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_config_resolves_and_tells_its_command(path):
    config = config_file.load(str(path))
    experiment = schema.resolve(config)
    assert experiment.name == path.stem
    assert schema.resolve(fields.to_plain(experiment)) == experiment
    docstring = importlib.import_module(f'configs.{path.stem}').__doc__
    assert f'python launch.py --config=configs/{path.name}' in docstring
    assert 'not measured here' in docstring or 'n = ' in docstring


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_config_passes_an_abstract_step(path, mesh):
    experiment = schema.resolve(config_file.load(str(path)))
    spec = DATA[path.stem]
    task = build.make_task(experiment, spec)
    facts = Facts(experiment.data.batch_size, 1000, 1e9, 100)
    parts = build.make_parts(experiment, task, spec, mesh, build.learning_rate(experiment.optimizer, facts))
    state, terms = jax.eval_shape(parts.step, parts.abstract, parts.batch)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), parts.abstract)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
    assert {'loss', 'gradient_norm'} <= set(terms)


def test_the_reference_program_has_the_parameters_that_keras_gives(mesh):
    experiment = schema.resolve(config_file.load(str(ROOT / 'configs/cifar10_cnn.py')))
    spec = DATA['cifar10_cnn']
    task = build.make_task(experiment, spec)
    batch = build.preprocessed(experiment, build.abstract_batch(spec, 32))
    params = jax.eval_shape(task.init, jax.random.key(0), batch)['params']
    layers = {name: sum(int(np.prod(leaf.shape)) for leaf in layer.values()) for name, layer in params.items()}
    assert layers == {'Conv_0': 896, 'Conv_1': 18496, 'Conv_2': 36928, 'Dense_0': 65600, 'Dense_1': 650}
    assert sum(layers.values()) == 122_570
    assert (experiment.data.batch_size, str(experiment.train.duration), experiment.seed) == (32, '10 epochs', 42)
    assert experiment.optimizer.name == 'adam'
    assert batch['image'].dtype == np.float32


@pytest.mark.parametrize(('kind', 'name'), [(kind, name) for kind, table in TABLES.items() for name in table])
def test_every_component_of_the_tables_exists_and_its_signature_can_be_read(kind, name):
    thing = Component(kind, name, {}).load()
    assert callable(thing)
    assert thing.__doc__
    read = signature(kind, name)
    assert read is not None
    if dataclasses.is_dataclass(thing):
        assert set(read) <= {f.name for f in dataclasses.fields(thing)}
