"""What is written otherwise for XLA's CPU compiler: the same values and gradients, and the compiled form that makes it fast."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from research.models import layers, lowering

CONTRACT = (((1,), (0,)), ((), ()))


def arrays(*shapes):
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


def program(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


@pytest.mark.parametrize(
    ('left', 'right', 'contract'),
    [
        ((2, 3, 5), (5, 7), ((2,), (0,))),
        ((2, 3, 7), (7, 5), ((2,), (0,))),
        ((2, 4, 7), (7, 5), ((2,), (0,))),  # through a transposed copy of the right
        ((2, 3, 6), (6, 6), ((2,), (0,))),  # through one of the left
        ((2, 4, 6), (6, 3, 2), ((2,), (0,))),
        ((2, 3, 5), (5, 4, 2), ((2,), (0,))),
        ((2, 3, 4, 2), (4, 2, 5), ((2, 3), (0, 1))),
        ((3, 5), (7, 5), ((1,), (1,))),  # of another form: as it is
    ],
)
def test_a_product_and_its_gradients_are_those_of_dot_general(left, right, contract):
    x, y = arrays(left, right)

    def loss(product, x, y):
        return jnp.sum(jnp.sin(product(x, y, (contract, ((), ())))))

    for function in (lowering.product, jax.lax.dot_general):
        assert jax.vmap(lambda x: function(x, y, (contract, ((), ()))))(jnp.stack([x, x])).shape[0] == 2  # noqa: B023
    exact = jax.value_and_grad(functools.partial(loss, jax.lax.dot_general), (0, 1))(x, y)
    found = jax.value_and_grad(functools.partial(loss, lowering.product), (0, 1))(x, y)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5), found, exact)
    np.testing.assert_allclose(
        jax.jvp(functools.partial(loss, lowering.product), (x, y), (x, y))[1],  # forward mode works too
        jax.jvp(functools.partial(loss, jax.lax.dot_general), (x, y), (x, y))[1],
        rtol=2e-5,
    )


def test_a_few_rows_are_not_worth_a_transposed_copy():
    """One token of a text that is decoded, against a whole batch in training."""
    for kernel in arrays((64, 16), (64, 64)):
        few, many = (
            program(functools.partial(lowering.product, rhs=kernel, dimension_numbers=CONTRACT), x)
            for x in arrays((1, 64), (64, 64))
        )
        assert ' call(' not in few
        assert ' call(' in many


def test_square_products_of_one_input_share_its_transposed_copy():
    x, query, key = arrays((24, 8), (8, 8), (8, 8))

    def loss(query, key, x):
        x = jnp.cos(x)
        return jnp.sum(jnp.sin(lowering.product(x, query, CONTRACT) * lowering.product(x, key, CONTRACT)))

    text = program(jax.grad(loss, (0, 1)), query, key, x)
    assert len(re.findall(r' = f32\[8,24\]\S+ call\(', text)) == 1
    assert len(re.findall(r' dot\(.*lhs_contracting_dims=\{1\}, rhs_contracting_dims=\{0\}', text)) == 4
    # Of an input or a kernel without a gradient (frozen, or the first layer's) nothing is computed.
    assert ' dot(' not in program(lambda t: jax.jvp(lambda y: lowering.product(x, query, CONTRACT) + y, (x,), (t,))[1], x)
    only = program(lambda t: jax.jvp(lambda y: lowering.product(y, query, CONTRACT), (x,), (t,))[1], x)
    assert only.count(' dot(') == 1, only


def test_gelu_and_its_derivatives_are_those_of_jax():
    x = jnp.linspace(-6, 6, 241)
    exact = functools.partial(jax.nn.gelu, approximate=False)
    ours, theirs = lowering.gelu, exact
    for _ in range(3):  # itself, its slope, and the slope of that
        np.testing.assert_allclose(jax.vmap(ours)(x), jax.vmap(theirs)(x), rtol=2e-6, atol=1e-6)
        ours, theirs = jax.grad(ours), jax.grad(theirs)
    assert jax.jit(jax.grad(lambda x: lowering.gelu(x).sum()))(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize('groups', [4, 2, 1])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_attention_and_its_gradients_are_those_of_jax(groups, dtype):
    query, key, value = (x.astype(dtype) for x in arrays((2, 5, 4, 6), (2, 7, groups, 6), (2, 7, groups, 6)))
    mask = np.random.default_rng(1).random((2, 1, 5, 7)) < 0.5
    mask[0, 0, 2] = False  # a padded query

    def loss(attention, *arguments):
        found = attention(*arguments).astype(jnp.float32)
        return jnp.sum(jnp.where(mask.any(-1)[:, 0, :, None, None], jnp.sin(found), 0)), found

    both = [
        jax.value_and_grad(functools.partial(loss, attention), (0, 1, 2), has_aux=True)(query, key, value)
        for attention in (
            lambda *x: lowering.attention(*x, jnp.asarray(mask)),
            lambda *x: jax.nn.dot_product_attention(*x, mask=jnp.asarray(mask), implementation='xla'),
        )
    ]
    tolerance = {'rtol': 1e-5, 'atol': 1e-6} if dtype == jnp.float32 else {'rtol': 0.05, 'atol': 0.03}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(*map(np.float32, (a, b)), **tolerance), *both)


def test_huge_scores_overflow_nothing():
    query, key, value = arrays((1, 3, 1, 2), (1, 3, 1, 2), (1, 3, 1, 2))
    found, gradient = jax.value_and_grad(lambda q: lowering.attention(q, key, value, None).sum())(query * 1e4)
    assert np.isfinite(found)
    assert np.isfinite(gradient).all()


def test_what_is_materialised_is_computed_once_and_so_is_its_gradient():
    x, kernel = arrays((8, 16), (16, 16))

    def loss(between, x):
        for _ in range(3):
            x = between(x + jnp.tanh(x @ kernel))
        return jnp.sum(x**2)

    plain, kept = (jax.grad(functools.partial(loss, between)) for between in (lambda x: x, lowering.materialised))
    np.testing.assert_allclose(jax.jit(kept)(x), jax.jit(plain)(x), rtol=1e-5)
    assert ' call(' not in program(plain, x)
    assert len(re.findall(r' call\(', program(kept, x))) >= 5  # three sums and their gradients, less what nobody reads


def test_elsewhere_the_functions_are_what_they_replace(monkeypatch):
    monkeypatch.setattr(lowering, 'on_cpu', lambda: False)
    x, y = arrays((2, 3, 7), (7, 5))
    assert lowering.materialised(x) is x
    given = functools.partial(lowering.product, dimension_numbers=(((2,), (0,)), ((), ())))
    assert str(jax.make_jaxpr(given)(x, y)).count('reshape') == 0
    assert 'inlineable' not in jax.jit(jax.vmap(jax.grad(lowering.gelu))).lower(x.reshape(-1)).as_text()


@pytest.mark.parametrize('bias', [True, False])
def test_layer_norm_is_that_of_flax(bias):
    (x,) = arrays((4, 6, 32))
    x = x * 3 + 100  # where the mean of squares less the square of the mean would lose digits
    ours, theirs = layers.LayerNorm(1e-5, bias), nn.LayerNorm(epsilon=1e-5, use_bias=bias, use_fast_variance=False)
    variables = theirs.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)) == jax.tree.map(jnp.shape, variables)
    variables = jax.tree.map(lambda v: v + np.linspace(-1, 1, 32, dtype=np.float32), variables)

    def loss(module, variables, x):
        found = module.apply(variables, x)
        return jnp.sum(jnp.sin(found)), found

    for dtype, tolerance in ((jnp.float32, 2e-5), (jnp.bfloat16, 0.02)):
        given = jax.tree.map(lambda v, to=dtype: v.astype(to), (variables, x))
        found, exact = (
            jax.value_and_grad(functools.partial(loss, module), (0, 1), has_aux=True)(*given) for module in (ours, theirs)
        )
        assert found[0][1].dtype == exact[0][1].dtype == dtype
        close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
        jax.tree.map(lambda a, b, close=close: close(np.float32(a), np.float32(b)), found, exact)
