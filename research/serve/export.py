"""`--mode=export`: a trained run as a folder that other programs load.

    python launch.py --mode=export --workdir=runs/docs_gpt                      # -> runs/docs_gpt/export/hf
    python launch.py --mode=export --workdir=RUN --config.export.state=best --config.export.directory=DIR

The folder holds config.json, model.safetensors, the tokenizer's files and generation_config.json (texts) or
preprocessor_config.json (images), so `transformers.AutoModelForCausalLM.from_pretrained(DIR)` and vLLM take it as it is. The
weights are those that evaluation uses: averaged where the run kept an average, an adapter merged. What was written is read back
and compared bit for bit.
"""

import pathlib
from typing import Any

import numpy as np

from research.core import files
from research.core.errors import StorageError, UsageError
from research.core.schema import Experiment
from research.data.build import build_splits
from research.data.source import DataSpec
from research.models import hugging_face
from research.models.hugging_face_layout import Config
from research.serve import tokenizer_files
from research.train import build, pretrained, weights
from research.train.open_run import recorded

MARKER = 'fulcrum_export.json'  # says that a folder is an export, what of, and which files it wrote
ROLES_IN_CONFIG = ('bos', 'eos', 'pad')


def report(workdir: pathlib.Path, overrides: list[str], trust: bool) -> None:
    """Exports the run and says what was written."""
    folder, said = export_run(workdir, overrides, trust)
    print(f'{workdir}: {said["source"]}')
    print(f'{folder}: {said["architecture"]}, {said["parameters"]:,} parameters, read back and equal bit for bit')
    print(f'files: {", ".join(said["files"])}')


def export_run(workdir: pathlib.Path, overrides: list[str], trust: bool = False) -> tuple[pathlib.Path, dict[str, Any]]:
    """Writes the export that `config.export` asks for; returns its folder, and what `fulcrum_export.json` in it says.

    Args:
      workdir: the run directory.
      overrides: 'key=value' changes of the recorded config, such as 'export.state=best'.
      trust: see `recorded`.

    Raises:
      UsageError: there is no such run, no Hugging Face family has its model, or the folder belongs to something else.
      StorageError: what was read back is not what was written.
    """
    directory, experiment = recorded(workdir, overrides, trust, 'an export')
    chosen = experiment.export
    folder = pathlib.Path(chosen.directory) if chosen.directory else directory.path / 'export' / chosen.format
    if chosen.state == 'best' and not directory.best.is_dir():
        raise UsageError(
            f'{directory.path} keeps no best state', "use export.state='newest', or train with config.checkpoint.best"
        )
    _, spec = build_splits(experiment.data)
    leaves, source = weights.read_run(directory.path, '--workdir', state=chosen.state)
    config, tensors = describe(experiment, spec, leaves)
    check_target(folder)
    written = write(folder, config, tensors, experiment, spec)
    compare(folder, leaves)
    number = sum(leaf.size for leaf in leaves.values())
    said = {'source': source, 'architecture': config['architectures'][0], 'parameters': number, 'files': written}
    files.write_json(folder / MARKER, {**said, 'run': str(directory.path.resolve()), 'config': str(experiment.name)})
    return folder, said


def check_target(folder: pathlib.Path) -> None:
    """Makes room in `folder`: what an earlier export wrote is removed, and nothing else.

    Raises:
      UsageError: it holds something that is no export.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise UsageError(f'{folder} is not empty and holds no export', 'give another --config.export.directory')
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MARKER).is_file():
        for name in files.read_json(folder / MARKER)['files']:
            (folder / pathlib.PurePath(name).name).unlink(missing_ok=True)


def describe(experiment: Experiment, spec: DataSpec, leaves: dict[str, np.ndarray]) -> tuple[Config, dict[str, np.ndarray]]:
    """The config.json and the tensors of a run's model.

    Raises:
      UsageError: no family has such a model.
    """
    module = build.make_task(experiment, spec).module
    batch = build.preprocessed(experiment, build.abstract_batch(spec, 1))
    image = tuple(batch['image'].shape[1:]) if 'image' in batch else None
    family, config = hugging_face.family_of(module, image)
    tensors = hugging_face.to_theirs(family, {**family.defaults, **config}, leaves)
    said = {**config, **_labels(config, spec), **_token_ids(spec), 'dtype': 'float32', 'torch_dtype': 'float32'}
    return {key: value for key, value in said.items() if key != 'num_labels'}, tensors


def _labels(config: Config, spec: DataSpec) -> Config:
    """The names of the classes, for a model that tells classes apart."""
    if 'Classification' not in config['architectures'][0]:
        return {}
    names = dict(enumerate(spec.class_names or [f'LABEL_{i}' for i in range(config['num_labels'])]))
    return {'id2label': {str(i): name for i, name in names.items()}, 'label2id': {name: i for i, name in names.items()}}


def _token_ids(spec: DataSpec) -> Config:
    """The special tokens that config.json names; null where there is none, since a missing key means another model's."""
    if spec.tokenizer is None:
        return {}
    return {f'{role}_token_id': getattr(spec.tokenizer, role) for role in ROLES_IN_CONFIG}


def write(
    folder: pathlib.Path, config: Config, tensors: dict[str, np.ndarray], experiment: Experiment, spec: DataSpec
) -> list[str]:
    """Writes all files, config.json last: a folder without it is no model. Returns their names."""
    from safetensors.numpy import save_file  # imported late: most runs need it never

    save_file(tensors, folder / pretrained.SINGLE, metadata={'format': 'pt'})
    written = [pretrained.SINGLE]
    if spec.tokenizer is not None:
        written += tokenizer_files.write(spec.tokenizer, folder, _roles(config, experiment))
    if config['architectures'][0].endswith(('ForCausalLM', 'LMHeadModel')):
        files.write_json(folder / 'generation_config.json', _token_ids(spec))
        written.append('generation_config.json')
    if config['model_type'] == 'vit':
        files.write_json(folder / 'preprocessor_config.json', image_processing(experiment, config))
        written.append('preprocessor_config.json')
    files.write_json(folder / 'config.json', config)
    return [*written, 'config.json']


def _roles(config: Config, experiment: Experiment) -> tokenizer_files.Roles:
    """How the model uses the tokenizer."""
    is_bert = config['model_type'] == 'bert'
    component = experiment.data.tokenizer
    path = None if component is None else component.arguments.get('path')
    source = None if path is None else pathlib.Path(path) if pathlib.Path(path).is_dir() else pathlib.Path(path).parent
    return tokenizer_files.Roles(
        encloses=is_bert,
        max_length=config['n_positions'] if 'n_positions' in config else config['max_position_embeddings'],
        inputs=('input_ids', *(('token_type_ids',) if is_bert else ()), 'attention_mask'),
        chat_template=None if source is None else tokenizer_files.chat_template(source),
    )


def image_processing(experiment: Experiment, config: Config) -> dict[str, Any]:
    """The preprocessor_config.json that does to an image what the run's preprocessing did.

    Raises:
      UsageError: it did something that transformers' processing of images cannot.
    """
    unknown = [str(component) for component in experiment.data.preprocess if component.name != 'normalise']
    if unknown or len(experiment.data.preprocess) > 1:
        raise UsageError(
            f'data.preprocess={", ".join(map(str, experiment.data.preprocess))} cannot be exported', "only 'normalise' can"
        )
    numbers = experiment.data.preprocess[0].arguments if experiment.data.preprocess else {'std': 1 / 255}
    size = config['image_size'] if isinstance(config['image_size'], list) else [config['image_size']] * 2
    channels = range(config['num_channels'])

    def by_channel(name: str, default: float) -> list[float]:
        value = numbers.get(name, default)
        return list(value) if isinstance(value, (tuple, list)) else [value for _ in channels]

    return {
        'image_processor_type': 'ViTImageProcessor',
        'do_resize': True,
        'size': {'height': size[0], 'width': size[1]},
        'do_rescale': True,
        'rescale_factor': 1 / 255,
        'do_normalize': True,
        'image_mean': by_channel('mean', 0.0),
        'image_std': by_channel('std', 1.0),
    }


def compare(folder: pathlib.Path, leaves: dict[str, np.ndarray]) -> None:
    """Reads the written folder and compares it with what was to be written.

    Raises:
      StorageError: they differ.
    """
    found = pretrained.read_folder(folder)
    expected = hugging_face.layer_by_layer(leaves)
    different = [name for name in expected if name not in found or _bits(found[name]) != _bits(expected[name])]
    if different or len(found) != len(expected):
        raise StorageError(f'{folder} does not hold what was written: {different[:3]}', 'see the disk, and export again')


def _bits(array: np.ndarray) -> bytes:
    """The bytes of an array: NaN equals NaN, and 0 is not -0."""
    return np.ascontiguousarray(array).tobytes()
