"""`--mode=export`: what a folder holds, read again by numpy and by the library tokenizers, and what is refused."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from safetensors import safe_open
from safetensors.numpy import load_file

from research.core import config_file, schema
from research.core.errors import StorageError, UsageError
from research.data.build import build_splits
from research.data.source import ArraySource, DataSet
from research.data.tokenizer_training import bpe, byte, characters, token_ids, wordpiece
from research.models import hugging_face
from research.serve import export, tokenizer_files
from research.serve.export import export_run
from research.train import build, partial, pretrained, weights
from research.train.loop import train
from tests.models import hugging_face_numpy as reference

SENTENCES = [
    'A frog sat on the pond, and sang.',
    'Où est la grenouille?  Là-bas…',
    'THE QUICK brown fox;\n\tjumps over 12 lazy dogs.',
    '日本語 and emoji 🐸 too',
    ' leading and trailing ',
    '',
]
TOPICS = {'animals': ('frog', 'fox', 'dog'), 'food': ('bread', 'cheese', 'soup')}


def topics() -> DataSet:
    """Sentences about two topics: a component that is not Fulcrum's own."""
    rows = [(f'{n}: the {word} number {n}', i) for i, words in enumerate(TOPICS.values()) for word in words for n in range(20)]
    texts, labels = np.array([text for text, _ in rows], object), np.array([label for _, label in rows], np.int32)
    return DataSet('topics', {'all': ArraySource({'text': texts, 'label': labels})}, tuple(TOPICS))


def experiment_of(source, model, task, **changes):
    """A run of four steps."""
    config = schema.default_config()
    config.name = 'test'
    config.data.source, config.model, config.task = source, model, task
    config.data.batch_size = config.data.evaluation_batch_size = 16
    config.train.duration = '4 steps'
    config.checkpoint.every = '2 steps'
    config.log.tensorboard = config.log.model_table = False
    config.evaluate.final = ('validation',)
    config.parallel.devices = 1
    plain = json.loads(config.to_json())
    for path, value in changes.items():
        config_file.override(plain, path.replace('__', '.'), value)
    return schema.resolve(plain)


@pytest.fixture(scope='module')
def language_run(tmp_path_factory):
    """A byte-level Llama with stacked layers and an average."""
    folder = tmp_path_factory.mktemp('language')
    (folder / 'texts').mkdir()
    for i in range(30):
        (folder / 'texts' / f'{i:02}.txt').write_text(f'{SENTENCES[i % 5]} number {i}, ' * 8, encoding='utf-8')
    size = 'depth=2, width=16, heads=4, kv_heads=2, scan=True'
    model = f'decoder({size}, norm="rms", positions="rotary", activation="swiglu", bias=False)'
    source = {'name': 'text_files', 'path': str(folder / 'texts')}
    sections = {'data__tokenizer': 'byte', 'data__transforms': 'windows(length=32)', 'train__ema': '0.5'}
    train(experiment_of(source, model, 'language', checkpoint__best='validation/loss', **sections), folder / 'run', quiet=True)
    return folder / 'run'


@pytest.fixture(scope='module')
def topics_run(tmp_path_factory):
    """A classifier of texts, from a source that is not Fulcrum's own."""
    folder = tmp_path_factory.mktemp('topics') / 'run'
    model = 'bert_base(depth=1, width=16, heads=4, max_length=24, dropout=0.1)'
    sections = {'data__tokenizer': 'wordpiece(vocabulary_size=80)', 'data__transforms': 'pad(length=16)'}
    train(experiment_of('tests.serve.test_export:topics', model, 'classify(inputs="tokens")', **sections), folder, quiet=True)
    return folder


@pytest.fixture(scope='module')
def digits_run(tmp_path_factory):
    """A ViT on the digits, with inputs that are normalised."""
    folder = tmp_path_factory.mktemp('digits') / 'run'
    model = 'vit(patch=4, width=16, depth=1, heads=4, activation="gelu_exact", norm_eps=1e-12)'
    sections = {'data__preprocess': 'normalise(mean=0.3, std=0.4)'}
    train(experiment_of('digits', model, 'classify', **sections), folder, quiet=True)
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text())


def logits_of(run, folder):
    """Three training examples of a run, and its module's outputs for them with the parameters that a folder holds."""
    experiment = schema.resolve(read(run, 'run.json')['config'])
    splits, spec = build_splits(experiment.data)
    task = build.make_task(experiment, spec)
    block = splits['train'][np.arange(3)]
    preprocess = build.build_augmentation(experiment.data.preprocess)
    batch = preprocess(jax.random.split(jax.random.key(0), 3), {**block, 'mask': np.ones(3, np.float32)})
    target = jax.eval_shape(task.init, jax.random.key(0), batch)['params']
    params, report = partial.load_into(target, pretrained.read_folder(folder), (('.*', True),))
    assert not (report.missing or report.unexpected or report.misshaped)
    arguments = task.arguments(batch)
    return block, np.asarray(task.module.apply({'params': params}, arguments.pop('inputs'), **arguments))


def test_a_language_model_is_written_whole(language_run):
    folder, said = export_run(language_run, [])
    assert folder == language_run / 'export' / 'hf'
    names = {path.name for path in folder.iterdir()}
    assert names == {
        'config.json',
        'fulcrum_export.json',
        'generation_config.json',
        'model.safetensors',
        'special_tokens_map.json',
        'tokenizer.json',
        'tokenizer_config.json',
    }
    config = read(folder, 'config.json')
    assert config['architectures'] == ['LlamaForCausalLM']
    assert (config['vocab_size'], config['num_key_value_heads'], config['bos_token_id']) == (264, 2, 257)
    assert (config['eos_token_id'], config['pad_token_id'], config['dtype']) == (258, 256, 'float32')
    assert read(folder, 'generation_config.json') == {'bos_token_id': 257, 'eos_token_id': 258, 'pad_token_id': 256}
    with safe_open(folder / 'model.safetensors', framework='numpy') as file:
        assert file.metadata() == {'format': 'pt'}
    assert said['architecture'] == 'LlamaForCausalLM'
    assert said['parameters'] == sum(tensor.size for tensor in load_file(folder / 'model.safetensors').values())
    assert {*said['files'], 'fulcrum_export.json'} == names


def test_what_is_written_computes_in_numpy_what_the_run_computes(language_run, topics_run, digits_run):
    folder, _ = export_run(language_run, [])
    tensors = {k: v.astype(np.float64) for k, v in load_file(folder / 'model.safetensors').items()}
    block, found = logits_of(language_run, folder)
    wanted = reference.llama(tensors, read(folder, 'config.json'), block['tokens'][:, :-1])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    folder, _ = export_run(topics_run, [], trust=True)
    tensors = {k: v.astype(np.float64) for k, v in load_file(folder / 'model.safetensors').items()}
    block, found = logits_of(topics_run, folder)
    np.testing.assert_allclose(
        found, reference.bert(tensors, read(folder, 'config.json'), block['tokens'], block['segment']), atol=1e-5
    )
    folder, _ = export_run(digits_run, [])
    tensors = {k: v.astype(np.float64) for k, v in load_file(folder / 'model.safetensors').items()}
    block, found = logits_of(digits_run, folder)
    how = read(folder, 'preprocessor_config.json')
    images = (block['image'] * how['rescale_factor'] - how['image_mean']) / how['image_std']
    np.testing.assert_allclose(found, reference.vit(tensors, read(folder, 'config.json'), images), atol=1e-5)


def test_the_weights_are_those_that_are_evaluated(language_run):
    folder, said = export_run(language_run, [])
    wanted, _ = weights.read_run(language_run, 'run')
    assert 'of step 4 ' in said['source']
    assert 'averaged' in said['source']
    found = load_file(folder / 'model.safetensors')
    np.testing.assert_array_equal(found['model.embed_tokens.weight'], wanted['embed/embedding'])
    up = wanted['stack/layers/feed_forward/up/kernel']
    np.testing.assert_array_equal(found['model.layers.1.mlp.up_proj.weight'], up[1].T)


def test_the_best_state_can_be_chosen_and_the_folder_too(language_run, tmp_path):
    folder, said = export_run(language_run, ['export.state=best', f'export.directory={tmp_path / "best"}'])
    assert folder == tmp_path / 'best'
    best = [path.name for path in (language_run / 'best').iterdir() if path.name.isdigit()]
    assert f'of step {best[0]}' in said['source']


def test_a_run_that_kept_no_best_state_is_told(digits_run):
    with pytest.raises(UsageError, match='keeps no best state'):
        export_run(digits_run, ['export.state=best'])


def test_classes_are_named_and_a_strangers_run_is_not_built(topics_run):
    with pytest.raises(UsageError, match='names code outside Fulcrum: tests'):
        export_run(topics_run, [])
    folder, said = export_run(topics_run, [], trust=True)
    config = read(folder, 'config.json')
    assert config['architectures'] == ['BertForSequenceClassification']
    assert config['id2label'] == {'0': 'animals', '1': 'food'}
    assert config['label2id'] == {'animals': 0, 'food': 1}
    assert 'num_labels' not in config
    assert 'generation_config.json' not in said['files']
    told = read(folder, 'tokenizer_config.json')
    assert told['model_input_names'] == ['input_ids', 'token_type_ids', 'attention_mask']
    assert (told['cls_token'], told['sep_token'], told['model_max_length']) == ('[CLS]', '[SEP]', 24)


def test_a_text_gets_the_ids_that_the_model_was_trained_with(topics_run):
    folder, _ = export_run(topics_run, [], trust=True)
    experiment = schema.resolve(read(topics_run, 'run.json')['config'])
    splits, _ = build_splits(experiment.data)
    library = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    texts = set(topics().splits['all'].arrays['text'])
    rows = splits['train'][np.arange(20)]
    written = {tuple(library.encode(text).ids) for text in texts}
    for tokens, segment in zip(rows['tokens'], rows['segment'], strict=True):
        assert tuple(tokens[segment > 0].tolist()) in written


def test_an_export_is_replaced_and_nothing_else_is(language_run, tmp_path):
    folder, _ = export_run(language_run, [f'export.directory={tmp_path / "a"}'])
    (folder / 'my_notes.txt').write_text('mine')
    before = (folder / 'model.safetensors').read_bytes()
    export_run(language_run, [f'export.directory={folder}'])
    assert (folder / 'model.safetensors').read_bytes() == before
    assert (folder / 'my_notes.txt').read_text() == 'mine'
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'config.json').write_text('{}')
    with pytest.raises(UsageError, match='is not empty and holds no export'):
        export_run(language_run, [f'export.directory={tmp_path / "b"}'])
    assert (tmp_path / 'b' / 'config.json').read_text() == '{}'


def test_a_disk_that_lies_is_noticed(language_run, tmp_path, monkeypatch):
    honest = hugging_face.to_theirs

    def lying(*arguments):
        tensors = honest(*arguments)
        tensors['model.norm.weight'] = -tensors['model.norm.weight']
        return tensors

    monkeypatch.setattr(hugging_face, 'to_theirs', lying)
    with pytest.raises(StorageError, match=r"does not hold what was written: \['stack/final_norm/scale'\]"):
        export_run(language_run, [f'export.directory={tmp_path / "a"}'])


def test_the_report_says_what_was_written(language_run, capsys):
    export.report(language_run, [], False)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f'{language_run}: ')
    assert 'parameters of step 4' in printed[0]
    assert 'LlamaForCausalLM, 11,984 parameters, read back and equal bit for bit' in printed[1]
    assert printed[2].endswith('generation_config.json, config.json')


def test_a_model_of_no_family_is_refused(tmp_path):
    train(experiment_of('digits', 'mlp(hidden=(8,))', 'classify'), tmp_path / 'run', quiet=True)
    with pytest.raises(UsageError, match='no Hugging Face family computes a MLP'):
        export_run(tmp_path / 'run', [])
    assert not (tmp_path / 'run' / 'export').exists()
    with pytest.raises(UsageError, match='an export cannot change what was trained: seed'):
        export_run(tmp_path / 'run', ['seed=3'])
    with pytest.raises(UsageError, match='holds no run'):
        export_run(tmp_path / 'nothing', [])


def test_preprocessing_that_transformers_has_not_is_refused():
    experiment = experiment_of('digits', 'mlp', 'classify', data__preprocess='flip, normalise')
    with pytest.raises(UsageError, match=r'data\.preprocess=flip, normalise cannot be exported'):
        export.image_processing(experiment, {'image_size': 8, 'num_channels': 1})


KINDS = {
    'byte': lambda: byte(SENTENCES),
    'bpe': lambda: bpe(SENTENCES * 3, vocabulary_size=300),
    'wordpiece': lambda: wordpiece(SENTENCES * 3, vocabulary_size=120),
    'characters': lambda: characters(SENTENCES, vocabulary_size=60),
    'characters, lower case': lambda: characters(SENTENCES, vocabulary_size=60, lowercase=True),
}


@pytest.mark.parametrize('kind', KINDS)
def test_a_tokenizer_file_gives_the_same_ids_and_texts(kind, tmp_path):
    tokenizer = KINDS[kind]()
    roles = tokenizer_files.Roles(
        encloses=False, max_length=77, inputs=('input_ids', 'attention_mask'), chat_template='{{ x }}'
    )
    written = tokenizer_files.write(tokenizer, tmp_path, roles)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(written)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    assert library.get_vocab_size() == tokenizer.vocabulary_size
    texts = [*SENTENCES, 'unseen: äöü ∑ 中文\x00\x7f\r\n', 'x' * 50]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert library.encode(text).ids == ids.tolist(), text
        assert library.decode(ids.tolist()) == tokenizer.decode(ids), text
    told = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    special = json.loads((tmp_path / 'special_tokens_map.json').read_text())
    assert (told['model_max_length'], told['chat_template']) == (77, '{{ x }}')
    for role, i in tokenizer_files.special_ids(tokenizer).items():
        name = special['unk_token' if role == 'unknown' else f'{role}_token']
        assert library.token_to_id(name) == i
        assert library.encode(name).ids == [i]


def test_a_text_is_enclosed_as_bert_does_and_a_pair_too(tmp_path):
    tokenizer = wordpiece(SENTENCES * 3, vocabulary_size=120)
    tokenizer_files.write(tokenizer, tmp_path, tokenizer_files.Roles(True, 24, ('input_ids',)))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    [one], [two] = tokenizer.encode(['frog']), tokenizer.encode(['the dogs'])
    assert library.encode('frog').ids == [tokenizer.cls, *one, tokenizer.sep]
    pair = library.encode('frog', 'the dogs')
    assert pair.ids == [tokenizer.cls, *one, tokenizer.sep, *two, tokenizer.sep]
    assert pair.type_ids == [0] * (len(one) + 2) + [1] * (len(two) + 1)


def test_a_chat_template_comes_along(tmp_path):
    assert tokenizer_files.chat_template(tmp_path) is None
    (tmp_path / 'tokenizer_config.json').write_text('{"chat_template": "a"}')
    assert tokenizer_files.chat_template(tmp_path) == 'a'
    (tmp_path / 'chat_template.jinja').write_text('b')
    assert tokenizer_files.chat_template(tmp_path) == 'b'


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"kind 'token_ids' cannot be written as tokenizer\.json"):
        tokenizer_files.to_library(token_ids([], vocabulary_size=9))
