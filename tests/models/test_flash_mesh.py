"""Splash attention over a mesh whose 'model' axis does not divide the heads: they are whole on each of its devices."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from research.models import flash


@pytest.mark.parametrize(('heads', 'kv_heads'), [(4, 1), (3, 3)])
def test_heads_that_the_axis_does_not_divide_are_not_cut(heads, kv_heads):
    generator = np.random.default_rng(0)
    shapes = ((2, 128, heads, 16), (2, 128, kv_heads, 16), (2, 128, kv_heads, 16))
    query, key, value = (generator.normal(size=shape).astype(np.float32) for shape in shapes)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda *x: flash.splash(*x, causal=True, interpret=True))(query, key, value)
    exact = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation='xla')
    np.testing.assert_allclose(found, exact, atol=2e-5)
