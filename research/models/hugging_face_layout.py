"""How a tensor of Hugging Face lies beside the leaves of ours that it holds, and what a family of their models is.

Shape letters: D model, H heads, G key and value heads, K head size, F hidden.

A pair moves numbers and never computes with them, so HF -> ours -> HF is equal bit for bit:

    [pair, _] = dense('attention/query', 'self_attn.q_proj', (64,), (4, 16))
    pair.pack([kernel])         # (64, 4, 16) -> (64, 64) -> transposed, because torch's Linear holds (out, in)
    pair.unpack(tensor)         # [(64, 4, 16)]
"""

import dataclasses
import math
import re
from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np
from flax import linen as nn

from research.core.errors import UsageError

Fields = dict[str, Any]  # of a module of ours
Config = dict[str, Any]  # what a config.json says
Shape = tuple[int, ...]

# hidden_act of theirs -> activation of ours, where 'gelu' is the tanh approximation. Of several the first is written.
ACTIVATIONS = {
    'gelu_new': 'gelu',
    'gelu_pytorch_tanh': 'gelu',
    'gelu': 'gelu_exact',
    'relu': 'relu',
    'relu2': 'relu2',
    'silu': 'silu',
    'swish': 'silu',
    'tanh': 'tanh',
}
GATED = {'silu': 'swiglu', 'swish': 'swiglu', 'gelu_pytorch_tanh': 'geglu', 'gelu_new': 'geglu'}  # with a gate
UNGATED = tuple(dict.fromkeys(ACTIVATIONS.values()))


@dataclasses.dataclass(frozen=True)
class Pair:
    """One tensor of theirs, and the leaves of ours that it holds.

    Attributes:
      ours: names of our leaves; more than one where a tensor is fused, as GPT-2's query, key and value.
      theirs: name of their tensor.
      shapes: shape of each leaf.
      flat: each leaf's shape as it enters their tensor: heads merged. Fused leaves are joined along the last axis.
      axes: the permutation from the joined array to their tensor.
    """

    ours: tuple[str, ...]
    theirs: str
    shapes: tuple[Shape, ...]
    flat: tuple[Shape, ...]
    axes: Shape

    @property
    def shape(self) -> Shape:
        """The shape of their tensor."""
        joined = (*self.flat[0][:-1], sum(shape[-1] for shape in self.flat))
        return tuple(joined[axis] for axis in self.axes)

    def pack(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
        """Their tensor, contiguous: safetensors writes the bytes of a transposed view in the wrong order."""
        parts = [np.asarray(leaf).reshape(flat) for leaf, flat in zip(leaves, self.flat, strict=True)]
        return np.ascontiguousarray(np.concatenate(parts, axis=-1).transpose(self.axes))

    def unpack(self, tensor: np.ndarray) -> list[np.ndarray]:
        """Our leaves; views of their tensor where that is possible."""
        joined = tensor.transpose(np.argsort(self.axes))
        borders = np.cumsum([shape[-1] for shape in self.flat])[:-1]
        parts = np.split(joined, borders, axis=-1)
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]


Groups = dict[str, list[Pair]]  # 'body' is always there; of any other group a model has all or nothing


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family of Hugging Face models says what a module of ours is.

    Attributes:
      name: its `model_type`.
      module: our class.
      prefix: what the names of the body's tensors begin with; a bare model leaves it out.
      heads: what the names of all other tensors begin with.
      defaults: what a key of config.json means where it is missing.
      expects: for keys of config.json the only value that our layers compute.
      needs: for fields of ours the values that the family has.
      ignored: regular expressions for tensors that hold nothing that is learned, or something a second time.
      fields: our fields from their config with its defaults.
      config: their config from our fields; the data add 'image', (height, width, channels).
      groups: their tensors from their config.
    """

    name: str
    module: type[nn.Module]
    prefix: str
    heads: tuple[str, ...]
    defaults: Config
    expects: Config
    needs: dict[str, Container[Any]]
    ignored: tuple[str, ...]
    fields: Callable[[Config], Fields]
    config: Callable[[Fields], Config]
    groups: Callable[[Config], Groups]

    def full_name(self, tensor: str) -> str:
        """The name of a tensor with its prefix and in today's spelling."""
        old = {'LayerNorm.gamma': 'LayerNorm.weight', 'LayerNorm.beta': 'LayerNorm.bias'}  # files made from TensorFlow's
        for end, new in old.items():
            tensor = tensor.removesuffix(end) + new if tensor.endswith(end) else tensor
        return tensor if tensor.startswith((self.prefix, *self.heads)) else self.prefix + tensor

    def is_ignored(self, tensor: str) -> bool:
        """Whether the tensor of that full name is not needed."""
        return any(re.fullmatch(pattern, tensor) for pattern in self.ignored)


def ours_for(table: dict[str, str], key: str, config: Config) -> str:
    """What `table` has for `key` of a config.json.

    Raises:
      UsageError: it has nothing for it.
    """
    if config[key] not in table:
        raise UsageError(f'config.json: {key}={config[key]!r} has no counterpart here', f'known: {", ".join(table)}')
    return table[config[key]]


def theirs_for(table: dict[str, str], ours: str) -> str:
    """The first of their names for a value of ours."""
    return next(theirs for theirs, value in table.items() if value == ours)


def sizes(fields: Fields) -> tuple[int, int, int, int]:
    """H, G, K and F of our fields, with their defaults."""
    heads, width = fields['heads'], fields['width']
    kv_heads, size = fields.get('kv_heads') or heads, fields.get('head_size') or width // heads
    return heads, kv_heads, size, fields['hidden'] or 4 * width


def dense(
    ours: str | tuple[str, ...],
    theirs: str,
    inputs: Shape,
    outputs: Shape,
    *,
    bias: bool = True,
    transposed: bool = True,
) -> list[Pair]:
    """The pairs of a dense layer, or of several fused in one: kernel (*inputs, *outputs) and bias (*outputs).

    `transposed`: theirs is torch's Linear, (out, in); False: it is GPT-2's Conv1D, (in, out).
    """
    names = (ours,) if isinstance(ours, str) else ours
    number, merged = len(names), math.prod(outputs)
    kernels, biases = (tuple(f'{name}/{leaf}' for name in names) for leaf in ('kernel', 'bias'))
    shapes, flat = ((*inputs, *outputs),) * number, ((math.prod(inputs), merged),) * number
    pairs = [Pair(kernels, f'{theirs}.weight', shapes, flat, (1, 0) if transposed else (0, 1))]
    return [*pairs, Pair(biases, f'{theirs}.bias', (outputs,) * number, ((merged,),) * number, (0,))] if bias else pairs


def norm(ours: str, theirs: str, width: int, *, bias: bool = True) -> list[Pair]:
    """The pairs of a LayerNorm, or without `bias` of an RMSNorm."""
    scale = same(f'{ours}/scale', f'{theirs}.weight', (width,))
    return [scale, same(f'{ours}/bias', f'{theirs}.bias', (width,))] if bias else [scale]


def same(ours: str, theirs: str, shape: Shape, axes: Shape | None = None) -> Pair:
    """The pair of one leaf that has the axes of their tensor, or after the permutation `axes`."""
    return Pair((ours,), theirs, (shape,), (shape,), tuple(range(len(shape))) if axes is None else axes)
