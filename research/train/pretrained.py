"""The weights in a Hugging Face folder, as leaves of ours: what `config.init_from=DIR` starts from.

    leaves = read_folder('all-MiniLM-L6-v2')        # {'embed/embedding': float32 (30522, 384), 'stack/layers_0/...': ...}

Read are config.json and model.safetensors, or the shards that model.safetensors.index.json lists. float32 stays where it is, in
the file, until it is used; other floating types become float32. Pickled weights (.bin, .pt) are refused: reading them can run
any code.
"""

import json
import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from research.core import files
from research.core.errors import UsageError
from research.models import hugging_face

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
FLOATS = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': jnp.bfloat16}
# Only buffers that are no weights have these.
OTHERS = {'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}


def is_hugging_face(folder: files.Path) -> bool:
    """Whether `folder` holds a model as Hugging Face stores it: a config.json with a model_type."""
    try:
        return 'model_type' in files.read_json(pathlib.Path(folder) / 'config.json')
    except (OSError, ValueError, TypeError):
        return False


def read_folder(folder: files.Path) -> dict[str, np.ndarray]:
    """The parameters in `folder` by our names, layer by layer, float32; without those of a head that ours has not.

    Raises:
      UsageError: the folder holds no model that ours compute, or its files are damaged, pickled or do not belong together.
    """
    family, config = hugging_face.read_config(folder)
    leaves = hugging_face.to_ours(family, config, read_tensors(pathlib.Path(folder)), where=str(folder))
    quantised = sorted(name for name, leaf in leaves.items() if leaf.dtype not in FLOATS.values())
    if quantised:
        found = leaves[quantised[0]].dtype
        raise UsageError(f'{folder}: {quantised[0]} is {found}', 'quantised weights are not read; fetch the model in bfloat16')
    return {name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()}


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of the safetensors files in `folder` by their own names; they stay on disk until they are used."""
    shards = _shards(folder)
    found: dict[str, np.ndarray] = {}
    for shard, expected in shards.items():
        tensors = dict(_read_file(folder / shard))
        missing = sorted(expected - tensors.keys())
        if missing:
            raise UsageError(f'{folder / shard} has no {missing[0]!r}, which {INDEX} puts there', 'fetch the model again')
        found |= tensors
    return found


def _shards(folder: pathlib.Path) -> dict[str, set[str]]:
    """The files of a model, and the tensors that the index promises in each."""
    if (folder / SINGLE).is_file():
        return {SINGLE: set()}
    if (folder / INDEX).is_file():
        try:
            places = files.read_json(folder / INDEX)['weight_map']
            shards = {shard: {name for name in places if places[name] == shard} for shard in sorted(set(places.values()))}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f'{folder / INDEX} is damaged ({error!r})', 'fetch the model again') from error
        for shard in shards:
            if pathlib.PurePath(shard).name != shard or not (folder / shard).is_file():
                raise UsageError(f'{folder / INDEX} names {shard!r}, which is no file beside it', 'fetch the model again')
        return shards
    pickled = sorted(path.name for pattern in ('*.bin', '*.pt', '*.pth', '*.ckpt') for path in folder.glob(pattern))
    if pickled:
        raise UsageError(
            f'{folder / pickled[0]} is pickled: reading it can run any code, so Fulcrum does not',
            f'fetch the {SINGLE} of the same model, or convert the file where you trust it',
        )
    raise UsageError(f'{folder} holds neither {SINGLE} nor {INDEX}', 'give the folder of a Hugging Face model')


def _read_file(path: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one safetensors file, mapped into memory; the library checks its header first."""
    import safetensors  # imported late: most runs need none

    try:
        with safetensors.safe_open(path, framework='numpy'):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise UsageError(f'{path} is no intact safetensors file: {error}', 'fetch it again') from error
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, 'r', offset=8 + length)
    for name, entry in header.items():
        if name != '__metadata__':
            yield name, _tensor(data, entry, f'{path}: {name}')


def _tensor(data: np.memmap, entry: dict, what: str) -> np.ndarray:
    """One tensor of the mapped bytes `data` of a file."""
    dtypes = {**FLOATS, **OTHERS}
    if entry['dtype'] not in dtypes:
        raise UsageError(f'{what} is {entry["dtype"]}', 'quantised weights are not read; fetch the model in bfloat16')
    start, stop = entry['data_offsets']
    return np.asarray(data[start:stop]).view(dtypes[entry['dtype']]).reshape(entry['shape'])
