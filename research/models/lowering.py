"""How products and sums are written for XLA's CPU compiler. Only by `on_cpu` here, and in flash.py, does a model choose by
platform: by that where it is traced. (convolution.py has the convolutions.)

Shape letters: B batch, T queries, S keys, H query heads, G key and value heads, K head size.

    nn.Dense(64, dot_general=product)          # the same values as nn.Dense(64)
    x = materialised(x + y)                    # the same values as x + y
    y = gelu(x)                                # the same values as jax.nn.gelu(x, approximate=False)

Habits of XLA on CPU that slow a Transformer's gradient down (jax 0.10.2; `python -m bench.step_profile --without lowering`; the
figures are in BENCHMARKS.md): what several read is fused into each of them, and so computed again, also where they read it
transposed; the gradient of a weight over two axes (B, T) copies both factors; a product of (M, N) and (M, K) over M is slower
than one of (N, M) and (M, K), most of all if N > K; axes of length one cost a copy of the whole product; and a sum over keys
that is fused with what it adds up goes number by number. On a GPU or TPU these functions are what they replace.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental.xla_metadata import set_xla_metadata

_barrier = jax.jit(lambda x: jax.lax.optimization_barrier(x))


_as_written = contextvars.ContextVar('as_written', default=False)
_in_loop = contextvars.ContextVar('in_loop', default=False)
_is_divided = contextvars.ContextVar('is_divided', default=False)


def on_cpu() -> bool:
    """Whether programs that are traced now are compiled for a CPU."""
    return jax.default_backend() == 'cpu' and not _as_written.get()


def as_written() -> contextlib.AbstractContextManager[None]:
    """What is traced within has the form that it has on a GPU or TPU: to count operations that do not depend on the machine."""
    return _true(_as_written)


def in_loop() -> bool:
    """Whether what is traced now is the body of a loop."""
    return _in_loop.get()


def inside_loop() -> contextlib.AbstractContextManager[None]:
    """Says that what is traced within is the body of a loop, where XLA's CPU compiler has no fast convolutions."""
    return _true(_in_loop)


def is_divided() -> bool:
    """Whether what is traced now is one program that XLA divides over several devices."""
    return _is_divided.get()


def divided(over: int) -> contextlib.AbstractContextManager[Any]:
    """Says that what is traced within is one program for `over` devices, among which XLA divides the batch."""
    return _true(_is_divided) if over > 1 else contextlib.nullcontext()


@contextlib.contextmanager
def _true(variable: contextvars.ContextVar[bool]) -> Iterator[None]:
    token = variable.set(True)
    try:
        yield
    finally:
        variable.reset(token)


def materialised(x: jax.Array) -> jax.Array:
    """`x`, written to memory: neither it nor its gradient is computed again by those who read it.

    XLA's CPU compiler drops barriers before it fuses, and fuses across any call that it has inlined, hence a call that it must
    not inline.
    """
    if not on_cpu():
        return x
    with set_xla_metadata(inlineable='false'):
        return _barrier(x)


def known_after(condition: jax.Array, arrays: Any) -> jax.Array:
    """`condition`, a bool, in a form that XLA's CPU compiler can only work out when `arrays`, a tree of floats, are written.

    What is chosen by it comes after them, and may then overwrite what they read; without an order XLA copies that first. It
    lasts as long as XLA does not see that c & (p | c) is c: `tests/test_gates.py` counts the copies. Of an integer XLA sees
    that it equals itself, so that it is not waited for.
    """
    if not on_cpu() or is_divided():
        return condition
    for leaf in jax.tree.leaves(arrays):
        if leaf.size:
            corner = leaf[(0,) * leaf.ndim]
            condition &= (corner == corner) | condition
    return condition


def product(lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, *args: Any, **options: Any) -> jax.Array:
    """`jax.lax.dot_general`, as one product of two matrices where the last axes of `lhs` meet the first of `rhs`.

    The gradients are then such products too, over one axis, which need no copies. That of `rhs` (K, N) is taken transposed
    where K > N, from a transposed copy of `rhs`, and where K = N from one of `lhs`, which query, key and value share. Both pay
    off for K rows or more (not in decoding, which has one).
    """
    (contract_lhs, contract_rhs), batch = dimension_numbers
    count = len(contract_lhs)
    last, first = tuple(range(lhs.ndim - count, lhs.ndim)), tuple(range(count))
    if not on_cpu() or any(batch) or tuple(contract_lhs) != last or tuple(contract_rhs) != first:
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, *args, **options)
    rows, columns = lhs.shape[: lhs.ndim - count], rhs.shape[count:]
    inner = math.prod(rhs.shape[:count])
    lhs, rhs = lhs.reshape(math.prod(rows), inner), rhs.reshape(inner, math.prod(columns))

    def over(lhs: jax.Array, rhs: jax.Array, axis_lhs: int, axis_rhs: int) -> jax.Array:
        return jax.lax.dot_general(lhs, rhs, (((axis_lhs,), (axis_rhs,)), ((), ())), *args, **options)

    # Written down on both sides of a transposition, so that neither it nor its gradient is fused into what surrounds it.
    many = lhs.shape[0] >= inner
    if many and inner > rhs.shape[1]:
        found = over(lhs, materialised(materialised(rhs).T), 1, 1)
    elif many and inner == rhs.shape[1]:
        found = _square(over, materialised(lhs), rhs)
    else:
        found = over(lhs, rhs, 1, 0)
    return found.reshape(*rows, *columns)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _square(over: Any, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """`over(lhs, rhs, 1, 0)`, whose gradient by `rhs` is a product with a transposed copy of `lhs`."""
    return over(lhs, rhs, 1, 0)


@functools.partial(_square.defjvp, symbolic_zeros=True)
def _square_jvp(over: Any, primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    (lhs, rhs), (by_lhs, by_rhs) = primals, tangents
    terms = []
    if not isinstance(by_lhs, SymbolicZero):
        terms.append(over(by_lhs, rhs, 1, 0))
    if not isinstance(by_rhs, SymbolicZero):
        terms.append(over(materialised(lhs.T), by_rhs, 0, 0))
    found = _square(over, lhs, rhs)
    return found, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(found)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x * P(X <= x) of a standard normal X (Hendrycks and Gimpel, 2016): as BERT and PyTorch; flax takes the slower erfc.

    The gradient keeps the slope, which is computed with the value, and nothing else.
    """
    return 0.5 * x * (1 + jax.lax.erf(x / math.sqrt(2)))


@gelu.defjvp
def _gelu_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    if on_cpu():
        with set_xla_metadata(inlineable='false'):
            value, slope = _gelu_and_slope(*primals)
    else:
        value, slope = _gelu_and_slope(*primals)
    return value, slope * tangents[0]


@jax.jit
def _gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    below = 0.5 * (1 + jax.lax.erf(x / math.sqrt(2)))
    return x * below, below + x * jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """What `jax.nn.dot_product_attention` computes, with the heads before the length; (B, T, H, K).

    The queries of the heads that share a key follow each other, so that all products are of four axes. The sum over the keys
    divides the values found and not their weights, so neither pass touches (T, S) for it.

    Args:
      query: (B, T, H, K).
      key: (B, S, G, K).
      value: (B, S, G, K).
      mask: which keys each query sees, broadcastable to (B, 1, T, S); a query that sees none gets the mean of all values.
    """
    batch, length, heads, size = query.shape
    groups, wide = key.shape[2], jnp.promote_types(query.dtype, jnp.float32)
    repeats = heads // groups
    by_batch = functools.partial(jax.lax.dot_general, preferred_element_type=wide)
    query = query.reshape(batch, length, groups, repeats, size).transpose(0, 2, 3, 1, 4)  # (B, G, H/G, T, K)
    query = query.reshape(batch, groups, repeats * length, size)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)  # (B, G, S, K)
    scores = by_batch(query, key, (((3,), (3,)), ((0, 1), (0, 1)))) / math.sqrt(size)  # (B, G, H/G T, S)
    if mask is not None:  # added, so that the gradient needs no second selection
        hidden = jnp.where(mask, 0, -0.7 * jnp.finfo(jnp.float32).max).astype(wide)
        scores = scores + jnp.tile(jnp.broadcast_to(hidden, (*hidden.shape[:2], length, hidden.shape[3])), (1, 1, repeats, 1))
    scores = materialised(scores)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    found = by_batch(weights.astype(value.dtype), value, (((3,), (2,)), ((0, 1), (0, 1))))  # (B, G, H/G T, K)
    # Broadcast before it is written down, so that its gradient is a sum of numbers that are written down too.
    share = materialised(jnp.broadcast_to(1 / weights.sum(-1, keepdims=True), found.shape))
    found = (found * share).astype(value.dtype).reshape(batch, groups, repeats, length, size)
    return found.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)  # (B, T, H, K)
