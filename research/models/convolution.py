"""Convolutions as matrix products, for XLA's CPU compiler. On a GPU or TPU they are XLA's own.

Shape letters: B batch, H height, W width, C input channels, F output channels, M rows of a product.

    nn.Conv(64, (3, 3), conv_general_dilated=convolution)      # the same values and gradients as nn.Conv(64, (3, 3)), to 1e-5

Inside a loop XLA's own convolutions have neither threads nor vectors on a CPU (jax 0.10.2: up to 80 times slower), and a loop
over microbatches is what keeps a step in the cache (`train/microbatches.py`). Elsewhere they are slow where there are many
channels. Two forms take their place:

* *Minimal filtering* F(2x2, 3x3) (Winograd, 1980; Lavin and Gray, 2015, section 4.1, whose names of matrices are used here)
  for 3 x 3 kernels with stride 1: the 36 products that 2 x 2 outputs take become 16, each of all tiles at once.
* *Patches* for all others: what the kernel sees at each place, as the rows of one product.

Both work on (H, W, B, C), whose rows and columns are cut out and put together in runs of B * C numbers. Both gradients are
written down: those of slices would be sums of padded images.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from research.models import lowering

Rows = list[jax.Array]
Pads = Sequence[tuple[int, int]]

LAST = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # channels last, of two dimensions; below of one
LAST_OF_ONE = ((0, 2, 1), (2, 1, 0), (0, 2, 1))
FEW = 8  # input channels below which patches are taken as they are
MANY = 32  # channels, in and out, from which filtering is faster than XLA's own form outside of loops too
LARGE = (
    2**22
)  # tiles * channels in * channels out, below which that does not make up for the second or so that it takes to compile


def convolution(lhs: jax.Array, rhs: jax.Array, strides: Sequence[int], padding: Any, **options: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`, in the form that is fast where it is traced.

    Args:
      lhs: (B, H, W, C), or (B, W, C).
      rhs: (h, w, C, F), or (w, C, F).
      strides: of the window.
      padding: 'SAME', 'VALID' or pairs.
      **options: as flax gives them. Groups, dilations, other layouts and types than float32 are left to XLA.
    """
    if not lowering.on_cpu() or not _is_plain(lhs, rhs, options) or not (lowering.in_loop() or _is_worth_it(lhs, rhs, strides)):
        return jax.lax.conv_general_dilated(lhs, rhs, strides, padding, **options)
    pads: Any = padding
    if isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(lhs.shape[1:-1], rhs.shape[:-2], strides, padding)
    if lhs.ndim == 3:
        return _of_images(lhs[:, None], rhs[None], (1, *strides), ((0, 0), *pads))[:, 0]
    return _of_images(lhs, rhs, tuple(strides), pads)


def _is_plain(lhs: jax.Array, rhs: jax.Array, options: dict[str, Any]) -> bool:
    """Whether this is a dense convolution of float32 images with the channels last."""
    numbers = options.get('dimension_numbers')
    dilations = (*(options.get('lhs_dilation') or ()), *(options.get('rhs_dilation') or ()))
    return (
        numbers is not None
        and (tuple(numbers) == LAST or tuple(numbers) == LAST_OF_ONE)
        and all(dilation == 1 for dilation in dilations)
        and options.get('feature_group_count', 1) == 1
        and options.get('precision') is None
        and lhs.dtype == rhs.dtype == jnp.float32
        and 0 not in lhs.shape
    )


def _is_worth_it(x: jax.Array, kernel: jax.Array, strides: Sequence[int]) -> bool:
    """Whether the form here is better outside of loops too: a mere product, or filtering of many channels at many places.

    Not if the batch is divided: rows of products are (H, W, B), of which XLA can only give whole copies to every device.
    """
    *places, channels, features = kernel.shape
    if lowering.is_divided():
        return False
    if set(places) == {1}:
        return True
    tiles = math.prod(x.shape[:-1]) // 4
    can_gain = min(channels, features) >= MANY and tiles * channels * features >= LARGE
    return _can_filter(kernel, strides) and can_gain


def _can_filter(kernel: jax.Array, strides: Sequence[int]) -> bool:
    return kernel.shape[:-2] == (3, 3) and tuple(strides) == (1, 1) and kernel.shape[2] >= FEW


def _of_images(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: Pads) -> jax.Array:
    """The convolution of (B, H, W, C) with (h, w, C, F)."""
    height, width = ((x.shape[1 + i] + sum(pads[i]) - kernel.shape[i]) // strides[i] + 1 for i in (0, 1))
    filtering = _can_filter(kernel, strides)
    if filtering:  # whole tiles of 2 x 2 outputs
        pads = tuple((low, high + size % 2) for (low, high), size in zip(pads, (height, width), strict=True))
    if any(map(any, pads)):
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    x = x.transpose(1, 2, 0, 3)  # (H, W, B, C)
    found: jax.Array = filtered(x, kernel) if filtering else patched(x, kernel, strides)
    return found[:height, :width].transpose(2, 0, 1, 3)  # (B, H', W', F)


# Minimal filtering. A grid holds the 4 x 4 places of a tile (or 2 x 2 of its outputs, 3 x 3 of a kernel), each an array of all
# tiles, so that every transformation is a few sums of whole arrays: of its rows, then of its columns.


@jax.custom_vjp
def filtered(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(H, W, B, C) with (3, 3, C, F) -> (H - 2, W - 2, B, F), for even H and W."""
    return _filter(x, kernel)[0]


def _filter(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    height, width, batch, channels = x.shape
    high, wide = height // 2 - 1, width // 2 - 1  # tiles
    tiles = [[x[r : r + 2 * high - 1 : 2, s : s + 2 * wide - 1 : 2].reshape(-1, channels) for s in range(4)] for r in range(4)]
    inputs = _both(_inputs, tiles)  # 4 x 4 of (M, C)
    kernels = _both(_kernels, [list(row) for row in kernel])  # 4 x 4 of (C, F)
    products = [[_times(v, u, 1, 0) for v, u in zip(*rows, strict=True)] for rows in zip(inputs, kernels, strict=True)]
    found = [[y.reshape(high, wide, batch, -1) for y in row] for row in _both(_outputs, products)]
    return _interleaved(found), (inputs, kernels, x.shape)


def _filter_gradients(kept: Any, by_output: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, kernels, (height, width, batch, channels) = kept
    high, wide = height // 2 - 1, width // 2 - 1
    parts = [[by_output[r::2, s::2].reshape(-1, by_output.shape[-1]) for s in (0, 1)] for r in (0, 1)]
    by_product = _both(_by_product, parts)  # 4 x 4 of (M, F)
    by_kernel = [[_times(dm, v, 0, 0).T for v, dm in zip(*rows, strict=True)] for rows in zip(inputs, by_product, strict=True)]
    by_input = [[_times(dm, u, 1, 1).reshape(high, wide, batch, channels) for dm, u in zip(*rows, strict=True)]
                for rows in zip(by_product, kernels, strict=True)]  # fmt: skip
    return _interleaved(_both_overlapping(by_input)), jnp.stack([jnp.stack(row) for row in _both(_by_kernel, by_kernel)])


filtered.defvjp(_filter, _filter_gradients)


def _inputs(d: Rows) -> Rows:
    """B'd."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _by_input(v: Rows) -> Rows:
    """Bv."""
    return [v[0], v[1] - v[2] + v[3], v[1] + v[2] - v[0], -v[3]]


def _kernels(g: Rows) -> Rows:
    """Gg."""
    even = g[0] + g[2]
    return [g[0], (even + g[1]) / 2, (even - g[1]) / 2, g[2]]


def _by_kernel(u: Rows) -> Rows:
    """G'u."""
    both = (u[1] + u[2]) / 2
    return [u[0] + both, (u[1] - u[2]) / 2, both + u[3]]


def _outputs(m: Rows) -> Rows:
    """A'm."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _by_product(y: Rows) -> Rows:
    """Ay."""
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _both(transform: Any, grid: list[Rows]) -> list[Rows]:
    """The transformation of the rows of a grid, then of its columns."""
    columns = [transform(list(column)) for column in zip(*grid, strict=True)]
    return [transform(list(row)) for row in zip(*columns, strict=True)]


def _both_overlapping(grid: list[Rows]) -> list[Rows]:
    """As `_both(_by_input, grid)`, and the tiles, which overlap by two, added up: 2 x 2 of (H / 2, W / 2, B, C)."""
    columns = [_overlapping(_by_input(list(column)), 0) for column in zip(*grid, strict=True)]
    return [_overlapping(_by_input(list(row)), 1) for row in zip(*columns, strict=True)]


def _overlapping(d: Rows, axis: int) -> Rows:
    """Even and odd places along `axis` of tiles of four that begin at every second."""
    none = jnp.zeros_like(jax.lax.slice_in_dim(d[0], 0, 1, axis=axis))
    return [jnp.concatenate([d[i], none], axis) + jnp.concatenate([none, d[i + 2]], axis) for i in (0, 1)]


def _interleaved(grid: list[Rows]) -> jax.Array:
    """2 x 2 arrays (H, W, B, C), of even and odd rows and columns, as one (2 H, 2 W, B, C)."""
    rows = [jnp.stack(row, axis=2) for row in grid]  # (H, W, 2, B, C)
    high, wide, _, *rest = rows[0].shape
    return jnp.stack(rows, axis=1).reshape(2 * high, 2 * wide, *rest)


# Patches. Those of a few channels have their places along the first axis, where each is copied in long runs, those of many
# along the last, which is the better form of the product.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def patched(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...]) -> jax.Array:
    """(H, W, B, C) with (h, w, C, F) -> (H', W', B, F), without padding."""
    return _patch(x, kernel, strides)[0]


def _patch(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...]) -> tuple[jax.Array, Any]:
    size = tuple((x.shape[i] - kernel.shape[i]) // strides[i] + 1 for i in (0, 1))
    few = x.shape[-1] < FEW
    cuts = [_cut(x.transpose(3, 0, 1, 2) if few else x, place, size, strides, few) for place in _places(kernel)]
    flat = kernel.reshape(-1, kernel.shape[-1])  # (hwC, F)
    if few:
        patches = jnp.concatenate(cuts, 0).reshape(len(flat), -1)  # (hwC, M)
    else:
        patches = (jnp.concatenate(cuts, -1) if len(cuts) > 1 else cuts[0]).reshape(-1, len(flat))  # (M, hwC)
    found = _times(patches, flat, 0 if few else 1, 0)
    return found.reshape(*size, x.shape[2], -1), (patches, kernel, x.shape)


def _patch_gradients(strides: tuple[int, ...], kept: Any, by_output: jax.Array) -> tuple[jax.Array, jax.Array]:
    patches, kernel, shape = kept
    features = kernel.shape[-1]
    rows = by_output.reshape(-1, features)  # (M, F)
    by_kernel = _times(patches, rows, 1, 0) if shape[-1] < FEW else _times(rows, patches, 0, 0).T  # (hwC, F)
    by_patch = _times(rows, kernel.reshape(-1, features), 1, 1).reshape(*by_output.shape[:3], -1, shape[-1])
    by_input = jnp.zeros(shape, by_output.dtype)
    for number, place in enumerate(_places(kernel)):
        by_input = by_input + _put_back(by_patch[:, :, :, number], place, shape, strides)
    return by_input, by_kernel.reshape(kernel.shape)


patched.defvjp(_patch, _patch_gradients)


def _places(kernel: jax.Array) -> list[tuple[int, int]]:
    return list(itertools.product(range(kernel.shape[0]), range(kernel.shape[1])))


def _cut(x: jax.Array, place: Sequence[int], size: Sequence[int], strides: Sequence[int], first: bool) -> jax.Array:
    """What one place of the kernel sees of x (H, W, B, C), or (C, H, W, B) if `first`."""
    rows, columns = (slice(p, p + (n - 1) * s + 1, s) for p, n, s in zip(place, size, strides, strict=True))
    return x[:, rows, columns] if first else x[rows, columns]


def _put_back(part: jax.Array, place: Sequence[int], shape: Sequence[int], strides: Sequence[int]) -> jax.Array:
    """The transpose of `_cut`: part (H', W', B, C) in an image of zeros of that shape."""
    pads = [(p, shape[i] - p - (part.shape[i] - 1) * strides[i] - 1, strides[i] - 1) for i, p in enumerate(place)]
    return jax.lax.pad(part, jnp.zeros((), part.dtype), (*pads, (0, 0, 0), (0, 0, 0)))


def _times(lhs: jax.Array, rhs: jax.Array, axis_lhs: int, axis_rhs: int) -> jax.Array:
    """The product of two matrices over those axes."""
    return jax.lax.dot_general(lhs, rhs, (((axis_lhs,), (axis_rhs,)), ((), ())))
