"""Convolutions as matrix products: the values and gradients of XLA's own, the forms that are chosen, and what they save."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from research.models import convolution, layers, lowering

NUMBERS = jax.lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ('NHWC', 'HWIO', 'NHWC'))
OF_ONE = jax.lax.conv_dimension_numbers((1, 1, 1), (1, 1, 1), ('NWC', 'WIO', 'NWC'))


def arrays(*shapes):
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.normal(size=shape).astype(np.float32)) for shape in shapes]


def value_and_gradients(function, *arguments):
    """The value, and both gradients of its product with random numbers."""
    found, pull = jax.vjp(function, *arguments)
    (weights,) = arrays(found.shape)
    return found, *pull(weights)


def in_loop(function):
    """`function` as the body of a loop has it."""

    def inside(*arguments, **options):
        with lowering.inside_loop():
            return function(*arguments, **options)

    return inside


def primitives(function, *arguments):
    """The names of all operations of a function."""

    def names(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for value in equation.params.values():
                if isinstance(inner := getattr(value, 'jaxpr', value), jax.extend.core.Jaxpr):
                    yield from names(inner)

    return set(names(jax.make_jaxpr(lambda *arguments: function(*arguments))(*arguments).jaxpr))  # traced anew


@pytest.mark.parametrize('loop', [False, True])
@pytest.mark.parametrize(
    ('image', 'kernel', 'strides', 'padding'),
    [
        ((3, 32, 32, 3), (3, 3, 3, 32), (1, 1), 'VALID'),  # the three of the reference network
        ((3, 14, 14, 32), (3, 3, 32, 64), (1, 1), 'VALID'),
        ((3, 6, 6, 64), (3, 3, 64, 64), (1, 1), 'VALID'),
        ((2, 9, 12, 32), (3, 3, 32, 40), (1, 1), 'SAME'),  # rows that are no whole tiles
        ((2, 9, 11, 8), (3, 3, 8, 5), (1, 1), 'VALID'),
        ((2, 5, 3, 33), (3, 3, 33, 32), (1, 1), 'VALID'),  # one tile, half empty
        ((2, 8, 8, 16), (3, 3, 16, 24), (2, 2), 'SAME'),
        ((2, 13, 10, 3), (7, 7, 3, 8), (2, 2), ((3, 3), (3, 3))),
        ((2, 7, 9, 12), (2, 3, 12, 6), (3, 2), ((1, 0), (2, 1))),
        ((2, 8, 8, 10), (1, 1, 10, 7), (1, 1), 'SAME'),
        ((2, 8, 9, 10), (1, 1, 10, 7), (2, 2), 'VALID'),
        ((2, 12, 12, 3), (4, 4, 3, 20), (4, 4), 'VALID'),
        ((1, 6, 6, 1), (5, 5, 1, 4), (1, 1), 'SAME'),
        ((2, 50, 6), (5, 6, 9), (2,), ((2, 2),)),
    ],
)
def test_values_and_gradients_are_those_of_xla(image, kernel, strides, padding, loop):
    x, k = arrays(image, kernel)
    numbers = NUMBERS if len(image) == 4 else OF_ONE
    ours = functools.partial(convolution.convolution, strides=strides, padding=padding, dimension_numbers=numbers)
    exact = functools.partial(jax.lax.conv_general_dilated, window_strides=strides, padding=padding, dimension_numbers=numbers)
    found = jax.jit(functools.partial(value_and_gradients, in_loop(ours) if loop else ours))(x, k)
    for one, other in zip(found, jax.jit(functools.partial(value_and_gradients, exact))(x, k), strict=True):
        assert one.shape == other.shape
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(one / scale, other / scale, rtol=0, atol=1e-5)


def test_gradients_of_each_example_and_of_gradients():
    """What private training and meta-learning ask for: vmap over gradients, and a gradient of a gradient."""
    x, k = arrays((4, 1, 6, 6, 8), (3, 3, 8, 8))

    def loss(function, k, x):
        return jnp.sum(jnp.sin(function(x, k, (1, 1), 'VALID', dimension_numbers=NUMBERS)))

    def norm_of_gradient(function, k, x):
        return jnp.sum(jnp.square(jax.grad(functools.partial(loss, function))(k, x)))

    for measure in (loss, norm_of_gradient):
        each = [
            jax.vmap(jax.grad(functools.partial(measure, function)), in_axes=(None, 0))(k, x)
            for function in (in_loop(convolution.convolution), jax.lax.conv_general_dilated)
        ]
        np.testing.assert_allclose(each[0], each[1], rtol=1e-3, atol=1e-4 * float(jnp.abs(each[1]).max()))


def test_xla_keeps_what_it_does_well_and_what_this_does_not_do():
    def forms(image, kernel, **options):
        module = layers.conv(kernel[-1], kernel[:2], use_bias=False, **options)
        x, k = arrays(image, kernel)
        apply = functools.partial(module.apply, {'params': {'kernel': k}})
        return tuple('conv_general_dilated' not in primitives(f, x) for f in (apply, in_loop(apply)))

    assert forms((64, 16, 16, 32), (3, 3, 32, 32)) == (True, True)
    assert forms((2, 8, 8, 32), (3, 3, 32, 32)) == (False, True), 'it would take longer to compile than it saves'
    assert forms((2, 8, 8, 16), (1, 1, 16, 8)) == (True, True)
    assert forms((2, 8, 8, 16), (3, 3, 16, 16)) == (False, True)
    assert forms((2, 8, 8, 3), (5, 5, 3, 16)) == (False, True)
    assert forms((2, 8, 8, 32), (3, 3, 1, 32), feature_group_count=32) == (False, False)
    assert forms((2, 8, 8, 32), (3, 3, 32, 32), kernel_dilation=2) == (False, False)
    assert forms((2, 8, 8, 32), (3, 3, 32, 32), dtype=jnp.bfloat16) == (False, False)


def test_accelerators_keep_the_convolutions_of_xla(monkeypatch):
    x, k = arrays((2, 8, 8, 32), (3, 3, 32, 32))
    apply = in_loop(functools.partial(layers.conv(32, (3, 3), use_bias=False).apply, {'params': {'kernel': k}}))
    assert 'conv_general_dilated' not in primitives(apply, x)
    with lowering.as_written():
        assert 'conv_general_dilated' in primitives(apply, x)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    assert 'conv_general_dilated' in primitives(apply, x)


def test_filtering_needs_four_ninths_of_the_products():
    x, k = arrays((64, 14, 14, 32), (3, 3, 32, 64))
    flops = [
        jax.jit(functools.partial(value_and_gradients, f)).lower(x, k).cost_analysis()['flops']
        for f in (
            functools.partial(convolution.convolution, strides=(1, 1), padding='VALID', dimension_numbers=NUMBERS),
            functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding='VALID', dimension_numbers=NUMBERS),
        )
    ]
    assert 4 / 9 < flops[0] / flops[1] < 0.55, 'four ninths and the transformations'


def test_no_image_is_an_image():
    x, k = arrays((0, 8, 8, 32), (3, 3, 32, 32))
    assert layers.conv(32, (3, 3), use_bias=False).apply({'params': {'kernel': k}}, x).shape == (0, 8, 8, 32)


@pytest.mark.parametrize(('size', 'kernel', 'pool'), [(15, 3, 2), (14, 3, 2), (9, 2, 3), (7, 5, 1)])
def test_what_pooling_cuts_is_not_computed(size, kernel, pool):
    (x,) = arrays((2, size, size, 3))
    module = layers.conv(4, (kernel, kernel), padding='VALID')
    variables = module.init(jax.random.key(0), x)
    whole = layers.max_pool(module.apply(variables, x), pool)
    cropped = module.apply(variables, layers.cropped(x, kernel, pool))
    assert cropped.shape[1] == (size - kernel + 1) // pool * pool
    np.testing.assert_allclose(layers.max_pool(cropped, pool), whole, rtol=1e-5, atol=1e-6)


def test_pooling_on_a_cpu_is_pooling_elsewhere():
    (x,) = arrays((3, 7, 9, 5))
    here = value_and_gradients(lambda x: layers.max_pool(x, 2), x)
    with lowering.as_written():
        there = value_and_gradients(lambda x: layers.max_pool(x, 2), x)
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(here[0], nn.max_pool(x, (2, 2), (2, 2)))
