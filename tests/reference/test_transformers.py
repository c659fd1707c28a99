"""Import and export against the library transformers itself: loading reports, logits, greedy tokens, tokenizers, mutants.

Needs requirements/reference.txt (torch and transformers, 2 GB); without it everything here is skipped.
"""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ['HF_HUB_OFFLINE'] = '1'
torch = pytest.importorskip('torch', reason='torch is not installed: requirements/reference.txt')
transformers = pytest.importorskip('transformers', reason='transformers is not installed: requirements/reference.txt')

from safetensors.numpy import save_file  # noqa: E402 - after the skip

from research.core import leaves  # noqa: E402
from research.models import hugging_face, presets  # noqa: E402
from research.models.transformer import Decoder  # noqa: E402
from research.models.vit import ViT  # noqa: E402
from research.train.pretrained import read_folder  # noqa: E402
from tests.models.hugging_face_cases import BERT, CASES, GPT2, LLAMA, VIT, inputs_of, tensors_of  # noqa: E402
from tests.models.test_hugging_face import APPLY, MUTANTS, NOTICED, TOLERANCE, difference, forward, imported  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')  # those of other people's libraries


def write(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    return folder


def load(folder):
    """The model of transformers in evaluation mode; asserts that its loading report is empty."""
    architecture = json.loads((folder / 'config.json').read_text())['architectures'][0]
    model, report = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    return model.eval()


def outputs(model, config):
    """What transformers computes: logits, or for a bare BERT its pooled features."""
    inputs, mask = inputs_of(config)
    with torch.no_grad():
        if config['model_type'] == 'vit':
            found = model(pixel_values=torch.tensor(inputs).permute(0, 3, 1, 2))
        else:
            found = model(input_ids=torch.tensor(inputs).long(), attention_mask=torch.tensor(mask))
    return (found.logits if 'logits' in found else found.pooler_output).numpy().astype(np.float64)


@pytest.mark.parametrize('case', CASES)
def test_theirs_imported_gives_their_logits(case, tmp_path):
    config = CASES[case]
    model = load(write(tmp_path / 'first', config, tensors_of(config)))
    model.save_pretrained(tmp_path / 'theirs')  # their own names, config and file
    module, fields = hugging_face.read_fields(tmp_path / 'theirs')
    found, wanted = forward(module, fields, read_folder(tmp_path / 'theirs'), config), outputs(model, config)
    assert wanted.std() > 0.5
    assert difference(found, wanted, config) < TOLERANCE


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_and_shards_are_imported(dtype, tmp_path):
    model = load(write(tmp_path / 'first', LLAMA, tensors_of(LLAMA))).to(dtype)
    model.save_pretrained(tmp_path / 'theirs', max_shard_size='8KB')
    assert len(list((tmp_path / 'theirs').glob('model-*.safetensors'))) > 2
    module, fields = hugging_face.read_fields(tmp_path / 'theirs')
    found = forward(module, fields, read_folder(tmp_path / 'theirs'), LLAMA)
    assert difference(found, outputs(load(tmp_path / 'theirs'), LLAMA), LLAMA) < TOLERANCE


SIZE = {'depth': 2, 'width': 32, 'heads': 4}
LLAMA_LIKE = {**SIZE, 'norm': 'rms', 'positions': 'rotary', 'bias': False}
BERT_LIKE = {**SIZE, 'vocabulary_size': 40, 'max_length': 24}
OURS = {
    'llama': Decoder(40, kv_heads=2, hidden=48, activation='swiglu', tied=False, rotary_theta=1000.0, scan=True, **LLAMA_LIKE),
    'llama stretched': Decoder(40, head_size=16, activation='geglu', rotary_scaling=(4.0, 1.0, 4.0, 16.0), **LLAMA_LIKE),
    'gpt2': Decoder(40, max_length=64, scan=True, **SIZE),
    'gpt2 untied, relu': Decoder(40, max_length=64, tied=False, activation='relu', hidden=48, **SIZE),
    'bert classifier': presets.BertBase(3, **BERT_LIKE),
    'bert masked': presets.BertBase(40, pooling='none', mask_head=True, **BERT_LIKE),
    'bert tokens': presets.BertBase(3, pooling='none', **BERT_LIKE),
    'bert bare': presets.BertBase(0, **BERT_LIKE),
    'vit': ViT(3, patch=4, activation='gelu_exact', norm_eps=1e-12, **SIZE),
}


def fresh(module, config):
    """Random parameters of a module of ours, far from their initialisation."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs_of(config)[0])['params']
    rng = np.random.default_rng(0)

    def draw(name, shape):
        if name.endswith('scale'):
            return 1 + 0.3 * rng.normal(size=shape)
        if name.endswith('final_norm/bias'):
            return 0.02 * rng.normal(size=shape)  # small, and positions large: that greedy texts do not repeat one token
        scale = {'head': 8.0, 'position': 6.0}.get(name.split('/')[0], 1.5)
        return scale * rng.normal(size=shape) * (0.2 if len(shape) < 2 or 'embedding' in name else np.prod(shape[:-1]) ** -0.5)

    return {name: draw(name, leaf.shape).astype(np.float32) for name, leaf in leaves.flat(shapes).items()}


def exported(folder, module, config):
    """The folder that our code writes for a module with random parameters; and these."""
    image = (*config['image_size'], 3) if config['model_type'] == 'vit' else None
    family, written = hugging_face.family_of(module, image)
    weights = fresh(module, config)
    return write(folder, written, hugging_face.to_theirs(family, {**family.defaults, **written}, weights)), weights


def like(name):
    """The case whose inputs a module of ours reads."""
    config = {'llama': LLAMA, 'gpt2': GPT2, 'bert': BERT, 'vit': VIT}[name.split(' ')[0]]
    return {**config, 'architectures': ['BertModel'] if name == 'bert bare' else config['architectures']}


def run(module, weights, config):
    """The outputs of ours."""
    inputs, mask = inputs_of(config)
    more = {'segments': mask} if config['model_type'] == 'bert' else {}
    return np.asarray(module.apply({'params': leaves.nested(weights)}, inputs, **more), np.float64)


@pytest.mark.parametrize('name', OURS)
def test_ours_exported_gives_our_logits(name, tmp_path):
    config = like(name)
    folder, weights = exported(tmp_path, OURS[name], config)
    found, wanted = outputs(load(folder), config), run(OURS[name], weights, config)
    assert wanted.std() > 0.3
    assert difference(found, wanted, config) < TOLERANCE


@pytest.mark.parametrize('name', [name for name in OURS if name.startswith(('llama', 'gpt2'))])
def test_greedy_tokens_are_equal_over_32_steps(name, tmp_path):
    module = OURS[name]
    folder, weights = exported(tmp_path, module, like(name))
    prompt = inputs_of(like(name))[0][:, :16]
    model = load(folder)
    more = {'do_sample': False, 'max_new_tokens': 32, 'min_new_tokens': 32, 'pad_token_id': 0, 'eos_token_id': None}
    wanted = model.generate(torch.tensor(prompt).long(), attention_mask=torch.ones(prompt.shape), **more).numpy()
    variables = {'params': leaves.nested(weights)}
    step = jax.jit(lambda tokens, at: jnp.argmax(module.apply(variables, tokens)[:, at - 1], -1))
    found = np.zeros((3, 48), np.int32)
    found[:, :16] = prompt
    for at in range(16, 48):
        found[:, at] = step(found, at)
    assert len(np.unique(found[:, 16:])) > 4
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(('case', 'mutant'), [(case, mutant) for case, mutants in APPLY.items() for mutant in mutants])
def test_a_mutant_is_noticed_by_transformers(case, mutant, tmp_path):
    config = CASES[case]
    model = load(write(tmp_path / 'theirs', config, tensors_of(config)))
    module, fields, weights = imported(tmp_path / 'ours', config, tensors_of(config))
    found = forward(module, *MUTANTS[mutant](fields, weights), config)
    assert difference(found, outputs(model, config), config) > NOTICED
