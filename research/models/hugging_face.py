"""Models of Hugging Face as models of ours: config.json as fields, tensors as leaves, both ways and without torch.

Shape letters: L depth, D model.

    family, config = read_config('bert-base-uncased')       # the folder; family.name == 'bert'
    family.fields(config)                                   # {'depth': 12, 'width': 768, 'norm_position': 'post', ...}
    leaves = to_ours(family, config, tensors)               # {'stack/layers_0/attention/query/kernel': (768, 12, 64), ...}
    to_theirs(family, config, leaves)                       # the same tensors, bit for bit

The families are in hugging_face_decoders.py (Llama, GPT-2) and hugging_face_encoders.py (BERT, ViT). `pretrained(path=DIR)` is
the model component that takes its fields from DIR/config.json; the weights come by `config.init_from=DIR`, which
train/pretrained.py reads.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from research.core import files
from research.core.errors import UsageError
from research.models.hugging_face_decoders import GPT2, LLAMA
from research.models.hugging_face_encoders import BERT, VIT
from research.models.hugging_face_layout import Config, Family, Fields, Pair
from research.models.transformer import Encoder

FAMILIES = {family.name: family for family in (LLAMA, GPT2, BERT, VIT)}
LISTED = 6  # how many problems a message names


def read_config(folder: files.Path) -> tuple[Family, Config]:
    """The family of the model in `folder`, and what its config.json says, defaults included.

    Raises:
      UsageError: the file cannot be read, or our layers do not compute such a model.
    """
    path = pathlib.Path(folder) / 'config.json'
    try:
        given = files.read_json(path)
        model_type = given['model_type']
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f'{path} says of no model what it is ({error!r})',
            'give a folder with config.json, model.safetensors, tokenizer.json',
        ) from error
    if model_type not in FAMILIES:
        raise UsageError(f'{path}: model_type {model_type!r} has no counterpart here', f'known: {", ".join(FAMILIES)}')
    family = FAMILIES[model_type]
    config = {**family.defaults, **given}
    for key, value in family.expects.items():
        if config.get(key, value) != value:
            raise UsageError(f'{path}: our layers do not compute {key}={config[key]!r}', f'they compute {key}={value!r}')
    return family, config


def read_fields(folder: files.Path) -> tuple[type[nn.Module], Fields]:
    """Our class for the model in `folder`, and its fields. An embedding model that averages its tokens has pooling='mean'."""
    family, config = read_config(folder)
    try:
        fields = family.fields(config)
    except KeyError as error:
        raise UsageError(f'{pathlib.Path(folder) / "config.json"} has no {error}', 'fetch the model again') from error
    pooling = pathlib.Path(folder) / '1_Pooling' / 'config.json'  # of the library sentence-transformers
    if pooling.is_file() and files.read_json(pooling).get('pooling_mode_mean_tokens') and family.module is Encoder:
        fields['pooling'] = 'mean'
    return family.module, fields


def to_ours(
    family: Family, config: Config, tensors: Mapping[str, np.ndarray], where: str = 'the model'
) -> dict[str, np.ndarray]:
    """Our leaves, layer by layer ('stack/layers_0/...'), from all tensors of a model.

    Args:
      family: see `read_config`.
      config: see `read_config`.
      tensors: by the names in the file, with or without the family's prefix.
      where: what they come from, for messages.

    Raises:
      UsageError: tensors are missing, unknown or of another shape.
    """
    named = {family.full_name(name): tensor for name, tensor in tensors.items()}
    pairs = _present(family, config, lambda pair: pair.theirs in named)
    missing = [pair.theirs for pair in pairs if pair.theirs not in named]
    known = {pair.theirs for pair in pairs}
    problems = [f'{name} is missing' for name in missing]
    problems += [f'{name} is unknown' for name in named if name not in known and not family.is_ignored(name)]
    for pair in pairs:
        if pair.theirs in named and named[pair.theirs].shape != pair.shape:
            problems.append(f'{pair.theirs} is {named[pair.theirs].shape}, expected {pair.shape}')
    _refuse(where, problems, 'the weights and config.json must belong to one model')
    return {name: leaf for pair in pairs for name, leaf in zip(pair.ours, pair.unpack(named[pair.theirs]), strict=True)}


def to_theirs(family: Family, config: Config, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a model from all our leaves, which `scan` may have stacked. The inverse of `to_ours`.

    Raises:
      UsageError: a leaf has no place in such a model, or one is missing.
    """
    leaves = layer_by_layer(leaves)
    pairs = _present(family, config, lambda pair: any(name in leaves for name in pair.ours))
    known = [name for pair in pairs for name in pair.ours]
    problems = [f'{name} has no place' for name in leaves if name not in known]
    problems += [f'{name} is missing' for name in known if name not in leaves]
    _refuse(f'a {family.name} cannot hold these parameters', problems, 'the parameters and the config must belong to one model')
    is_bare = all(pair.theirs.startswith(family.prefix) for pair in pairs) and is_headless(config)
    prefix = family.prefix if is_bare else ''
    return {pair.theirs.removeprefix(prefix): pair.pack([leaves[name] for name in pair.ours]) for pair in pairs}


def is_headless(config: Config) -> bool:
    """Whether the architecture is the body alone, whose tensors are written without prefix."""
    return any(name.endswith('Model') and not name.endswith('HeadModel') for name in config.get('architectures') or ())


def layer_by_layer(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leaves by name; one that `scan` stacked, 'stack/layers/x' (L, ...), becomes 'stack/layers_0/x' (...) and so on."""
    result: dict[str, np.ndarray] = {}
    for name, leaf in leaves.items():
        before, stacked, after = name.rpartition('/layers/')
        result |= {f'{before}/layers_{i}/{after}': leaf[i] for i in range(len(leaf))} if stacked else {name: leaf}
    return result


def family_of(module: nn.Module, image: tuple[int, ...] | None = None) -> tuple[Family, Config]:
    """The family that a module of ours belongs to, and its config.json.

    Args:
      module: a decoder, an encoder or a ViT.
      image: (height, width, channels) of the images that a ViT reads.

    Raises:
      UsageError: no family has such a model; the message names the fields.
    """
    fields = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
    candidates = [family for family in FAMILIES.values() if isinstance(module, family.module)]
    if not candidates:
        raise UsageError(
            f'no Hugging Face family computes a {type(module).__name__}', 'decoder, encoder and vit can be exported'
        )
    found = {family.name: obstacles(family, fields) for family in candidates}
    for family in candidates:
        if not found[family.name]:
            return family, {'model_type': family.name, **family.config({**fields, 'image': image})}
    listed = '; '.join(f'{name} has no {", ".join(problems)}' for name, problems in found.items())
    raise UsageError(f'no Hugging Face family has this {type(module).__name__}: {listed}', 'train a model with other options')


def obstacles(family: Family, fields: Fields) -> list[str]:
    """What in these fields of ours the family has not, as 'field=value'."""
    plain = dict(fields)
    if fields.get('kv_heads') == fields['heads']:
        plain['kv_heads'] = None
    if fields.get('head_size') == fields['width'] // fields['heads']:
        plain['head_size'] = None
    if not fields.get('mask_head', True):
        plain['tied'] = True  # it says nothing of other heads
    return [f'{name}={plain[name]!r}' for name, allowed in family.needs.items() if plain[name] not in allowed]


def pretrained(
    num_outputs: int,
    vocabulary_size: int = 0,
    *,
    path: str,
    dropout: float | None = None,
    pooling: str | None = None,
    mask_head: bool | None = None,
    scan: bool = False,
    remat: str = 'none',
    attention: str = 'auto',
) -> nn.Module:
    """The decoder, encoder or ViT with the fields of the Hugging Face model in the folder `path`, and fresh weights.

    Set `config.init_from` to the same folder to start from its weights.

    Args:
      num_outputs: size of the last layer; the task says it.
      vocabulary_size: size of the input vocabulary; the tokenizer says it.
      path: a folder with config.json.
      dropout: None: the folder's.
      pooling: of an encoder; None: the folder's.
      mask_head: whether an encoder has BERT's head for masked tokens; None: as the folder's.
      scan: see `Transformer`.
      remat: see `Transformer`.
      attention: see `Transformer`.

    Raises:
      UsageError: the folder holds no model that ours compute, or an argument is for encoders and it holds none.
    """
    module, fields = read_fields(path)
    given: dict[str, Any] = {'dropout': dropout, 'pooling': pooling, 'mask_head': mask_head}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in fields and name != 'dropout':
            raise UsageError(f'model.{name} is for encoders, and {path} holds a {module.__name__}', f'leave model.{name} out')
    if module is Encoder:
        given['vocabulary_size'] = vocabulary_size
    return module(**{**fields, **given, 'num_outputs': num_outputs, 'scan': scan, 'remat': remat, 'attention': attention})


def _present(family: Family, config: Config, is_there: Any) -> list[Pair]:
    """The pairs of the body and of every other group of which a pair is there."""
    groups = family.groups(config)
    return [pair for name, pairs in groups.items() if name == 'body' or any(map(is_there, pairs)) for pair in pairs]


def _refuse(what: str, problems: list[str], fix: str) -> None:
    if problems:
        more = f'; and {len(problems) - LISTED} more' if len(problems) > LISTED else ''
        raise UsageError(f'{what}: {"; ".join(problems[:LISTED])}{more}', fix)
