"""Layer-wise learning rates: lower layers, which hold what is general, move less (Howard & Ruder 2018, "ULMFiT", section 3.2).

Shape letters: L layers.

A leaf's rate is multiplied by decay^(number of layers above it): what stands above all layers (head, final norm, pooler) by
1, the top layer by decay, the lowest by decay^L, and embeddings, which are layer 0, by decay^(L + 1), as in ELECTRA and BEiT
(Clark et al. 2020; Bao et al. 2022). With a decay of 0.5 and two layers:

    head/kernel 1    stack/layers_1/... 0.5    stack/layers_0/... 0.25    embed/embedding 0.125

Layers are known by their names: `layers_3`, `layers` (stacked by nn.scan: one factor per entry of the leading axis), and
`stage_2_block_0` of residual networks, numbered through. Where there are several stacks (two towers, encoder and decoder), each
leaf counts in the stack it shares the longest path with, and what belongs to all counts in the deepest.
"""

import itertools
import re
from typing import Any

import jax
import numpy as np

from research.core import leaves
from research.core.errors import UsageError

LAYER = re.compile(r'((?:.*/)?)(?:layers_(\d+)(?:_forward|_backward)?|stage_(\d+)_block_(\d+)|layers)/.*')
BELOW = re.compile(
    r'(.*/)?(\w*embed\w*|\w*position\w*|patch|class_token|segment_type|stem\w*|convolutions_\d+|numeric|category)(/.*)?'
)

Number = tuple[int, ...]  # (index,), or (stage, block)
Stacks = dict[str, list[Number]]  # by the path before the layers' names: their numbers from the lowest to the highest


def multipliers(params: Any, decay: float) -> Any:
    """The factor on each leaf's learning rate, a tree like `params`: a number, or float32 (L, 1, ...) for stacked layers.

    Raises:
      UsageError: no leaf has the name of a layer.
    """
    if decay == 1:
        return jax.tree.map(lambda leaf: 1.0, params)
    stacks = stacks_of(leaves.flat(params))
    if not stacks:
        raise UsageError(
            f'optimizer.layer_decay={decay} needs layers that are called layers_0, layers_1, ...',
            f'set optimizer.rate_rules instead; the leaves are {", ".join(leaves.names(params)[:8])}',
        )
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _multiplier(leaves.name(path), leaf.ndim, stacks, decay), params)


def stacks_of(flat: dict[str, Any]) -> Stacks:
    """The stacks of layers among named leaves. Where only some layers have leaves, layers_11 is the twelfth all the same."""
    found: dict[str, set[Number]] = {}
    for leaf, array in flat.items():
        if match := LAYER.fullmatch(leaf):
            number = _number(match)
            numbers = [number] if len(number) == 2 else [(i,) for i in range(number[0] + 1 if number else array.shape[0])]
            found.setdefault(match[1], set()).update(numbers)
    return {stack: sorted(numbers) for stack, numbers in found.items()}


def _number(match: re.Match[str]) -> Number:
    """The number in a layer's name; () for stacked layers."""
    return tuple(int(group) for group in match.groups()[1:] if group is not None)


def _multiplier(leaf: str, rank: int, stacks: Stacks, decay: float) -> float | np.ndarray:
    """decay^(number of layers above the leaf)."""
    match = LAYER.fullmatch(leaf)
    if match is None:
        return decay ** (len(stacks[_home(leaf, stacks)]) + 1) if BELOW.fullmatch(leaf) else 1.0
    numbers, number = stacks[match[1]], _number(match)
    if number:
        return decay ** (len(numbers) - numbers.index(number))
    factors = decay ** np.arange(len(numbers), 0, -1, dtype=np.float32)  # (L,)
    return factors.reshape(-1, *[1] * (rank - 1))  # (L, 1, ...)


def _home(leaf: str, stacks: Stacks) -> str:
    """The stack that shares the longest path with a leaf outside all of them; of several, the deepest."""

    def shared(stack: str) -> int:
        pairs = zip(stack.split('/'), leaf.split('/'), strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    return max(stacks, key=lambda stack: (shared(stack), len(stacks[stack])))
