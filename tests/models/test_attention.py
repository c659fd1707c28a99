"""Attention and positions against plain numpy; splash attention, simulated, against XLA's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from research.core.errors import UsageError
from research.models import attention, flash, layers
from research.models.attention import Attention, attend, choose, rotate, rotation, sinusoidal

# Tests compile much and compute little: the compiler need not optimise.
OPTIONS = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
jit = functools.partial(jax.jit, compiler_options=OPTIONS)


def by_hand(query, key, value, visible):
    """Attention in float64, head by head; `visible` (B, T, S); a query that sees nothing gives NaN."""
    found = np.full(query.shape, np.nan)
    for b, t, h in np.ndindex(*query.shape[:3]):
        keys = np.flatnonzero(visible[b, t])
        group = h // (query.shape[2] // key.shape[2])
        scores = key[b, keys, group].astype(np.float64) @ query[b, t, h].astype(np.float64) / query.shape[-1] ** 0.5
        weights = np.exp(scores - scores.max(initial=-np.inf))
        found[b, t, h] = weights / weights.sum() @ value[b, keys, group] if len(keys) else np.nan
    return found


def arrays(*shapes, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.fixture(params=['auto', 'xla'])
def implementation(request):
    return request.param


@pytest.mark.parametrize('kv_heads', [4, 2, 1])
@pytest.mark.parametrize('causal', [False, True])
def test_attention_is_the_formula(kv_heads, causal, implementation):
    query, key, value = arrays((2, 5, 4, 6), (2, 5, kv_heads, 6), (2, 5, kv_heads, 6))
    segments = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])
    visible = np.tril(np.ones((5, 5), bool)) if causal else np.ones((5, 5), bool)
    attend = jit(functools.partial(attention.attend, implementation=implementation), static_argnames='causal')
    plain = attend(query, key, value, causal=causal)
    np.testing.assert_allclose(plain, by_hand(query, key, value, np.broadcast_to(visible, (2, 5, 5))), rtol=1e-4, atol=1e-6)
    visible = visible & (segments[:, :, None] == segments[:, None])
    packed = attend(query, key, value, causal=causal, query_segments=segments, key_segments=segments)
    np.testing.assert_allclose(packed, by_hand(query, key, value, visible), rtol=1e-4, atol=1e-6)


def test_cross_attention_and_a_cache_are_the_formula(implementation):
    query, key, value = arrays((2, 3, 4, 6), (2, 5, 2, 6), (2, 5, 2, 6))
    attend = jit(functools.partial(attention.attend, implementation=implementation))
    query_segments, key_segments = np.array([[1, 1, 1], [1, 1, 0]]), np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    found = attend(query, key, value, query_segments=query_segments, key_segments=key_segments)
    expected = by_hand(query, key, value, query_segments[:, :, None] == key_segments[:, None])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    slots = np.array([[1, 2, 3], [0, 1, 2]])
    found = attend(query, key, value, slots=slots)
    np.testing.assert_allclose(found, by_hand(query, key, value, np.arange(5) <= slots[:, :, None]), rtol=1e-4, atol=1e-6)


def test_a_query_that_sees_nothing_is_finite_and_so_are_gradients():
    query, key, value = arrays((1, 2, 2, 4), (1, 3, 2, 4), (1, 3, 2, 4))
    segments = np.array([[1, 0]]), np.array([[2, 2, 2]])

    def total(query, key, value):
        return attend(query, key, value, query_segments=segments[0], key_segments=segments[1]).sum()

    value, gradients = jit(jax.value_and_grad(total, (0, 1, 2)))(query, key, value)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in gradients)


def test_softmax_is_float32_for_bfloat16():
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in arrays((1, 64, 1, 8), (1, 64, 1, 8), (1, 64, 1, 8)))
    found = jit(attend)(query, key, value)
    expected = by_hand(*(np.asarray(x, np.float64) for x in (query, key, value)), np.ones((1, 64, 64), bool))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=0.01)


def test_rotation_is_multiplication_by_complex_numbers():
    x, positions = arrays((2, 5, 3, 8))[0], np.array([[0, 1, 2, 3, 4], [7, 3, 100, 0, 5000]])
    turned = np.exp(1j * positions[:, :, None, None] * 100.0 ** (-np.arange(4) / 4)) * (x[..., :4] + 1j * x[..., 4:])
    found = rotate(x, rotation(jnp.asarray(positions), 8, theta=100.0))
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_rotated_products_depend_on_the_distance_only():
    query, key = arrays((1, 1, 1, 16), (1, 1, 1, 16))
    turned = [
        float(np.sum(rotate(query, rotation(jnp.array([[p]]), 16)) * rotate(key, rotation(jnp.array([[p - 3]]), 16))))
        for p in (3, 10, 500)
    ]
    np.testing.assert_allclose(turned, turned[0], rtol=1e-3)
    other = np.sum(rotate(query, rotation(jnp.array([[3]]), 16)) * rotate(key, rotation(jnp.array([[1]]), 16)))
    assert abs(other - turned[0]) > 1e-2


def llama3_frequencies(size, theta, factor, low, high, original):
    """The case distinction of Llama 3.1, one frequency after the other."""
    for i in range(0, size, 2):
        frequency = theta ** (-i / size)
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            yield frequency
        elif wavelength > original / low:
            yield frequency / factor
        else:
            smooth = (original / wavelength - low) / (high - low)
            yield (1 - smooth) * frequency / factor + smooth * frequency


def test_llama3_scaling_is_the_case_distinction():
    cosine, sine = rotation(jnp.array([[1]]), 64, 500000.0, (32.0, 1.0, 4.0, 8192.0))
    expected = np.array(list(llama3_frequencies(64, 500000.0, 32.0, 1.0, 4.0, 8192.0)))
    np.testing.assert_allclose(np.arctan2(sine, cosine)[0, 0], expected, rtol=1e-4)
    assert not np.allclose(expected, 500000.0 ** (-np.arange(0, 64, 2) / 64), rtol=0.1)


def test_the_sinusoidal_code_is_the_formula():
    code = np.asarray(sinusoidal(jnp.array([[0, 1, 9]]), 6))
    for place, position in enumerate([0, 1, 9]):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            np.testing.assert_allclose(code[0, place, [2 * i, 2 * i + 1]], [np.sin(angle), np.cos(angle)], atol=1e-6)


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_norms_are_the_formulas_with_float32_statistics(dtype):
    x = np.asarray(jnp.asarray(np.random.default_rng(0).normal(300, 1, (4, 32)), dtype), np.float64)  # a mean that cancels
    for kind in ('layer', 'rms'):
        module = layers.make_norm(kind, 1e-5)
        found, _ = module.init_with_output(jax.random.key(0), jnp.asarray(x, dtype))
        centred = x - x.mean(-1, keepdims=True) if kind == 'layer' else x
        expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        assert found.dtype == jnp.result_type(dtype, jnp.float32)  # the fresh scale is float32; a task casts it
        np.testing.assert_allclose(
            np.asarray(found, np.float64), expected, rtol=2e-3 if dtype == np.float32 else 0.02, atol=1e-4
        )


def test_the_module_is_projections_around_the_formula():
    module = Attention(width=12, heads=4, kv_heads=2, head_size=6, qk_norm=True, init_std=0.5, out_std=0.5)
    x = arrays((2, 5, 12))[0]
    angles = rotation(jnp.arange(5)[None], 6)
    variables = jit(module.init)(jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: leaf + arrays(leaf.shape)[0] / 10, variables)
    p = jax.tree.map(np.asarray, variables['params'])

    def projected(name):
        return np.einsum('btd,dhk->bthk', x, p[name]['kernel']) + p[name]['bias']

    def normalised(y, name):
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * p[name]['scale']

    query, key = (np.asarray(rotate(normalised(projected(n), f'{n}_norm'), angles)) for n in ('query', 'key'))
    found = by_hand(query, key, projected('value'), np.broadcast_to(np.tril(np.ones((5, 5), bool)), (2, 5, 5)))
    expected = np.einsum('bthk,hkd->btd', found, p['out']['kernel']) + p['out']['bias']
    found = jit(functools.partial(module.apply, causal=True))(variables, x, rotation=angles)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_auto_is_the_lowering_for_a_cpu_and_the_rest_is_refused():
    query, key = jnp.zeros((1, 256, 2, 64), jnp.bfloat16), jnp.zeros((1, 256, 1, 64), jnp.bfloat16)
    assert choose('auto', query, key, masked=True) == 'cpu'
    for name, message in [('cudnn', 'needs a GPU, and jax runs on cpu'), ('flash', 'needs a TPU, and jax runs on cpu')]:
        with pytest.raises(UsageError, match=f"attention='{name}' {message}\n.*use attention='auto' or 'xla'"):
            choose(name, query, key, masked=True)
    with pytest.raises(UsageError, match=r"attention 'flush' does not exist\n.*did you mean 'flash'"):
        choose('flush', query, key, masked=True)


class Gpu:
    """A device with a compute capability."""

    def __init__(self, capability):
        self.compute_capability = capability


def test_auto_takes_the_flash_kernels_where_they_are_possible(monkeypatch):
    query = jnp.zeros((1, 256, 2, 64), jnp.bfloat16)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(jax, 'local_devices', lambda: [Gpu('9.0')])
    assert choose('auto', query, query, masked=True) == 'cudnn'
    assert choose('auto', query[:, :255], query[:, :255], masked=True) == 'xla'
    assert choose('auto', query[:, :255], query[:, :255], masked=False) == 'cudnn'
    assert choose('auto', query.astype(jnp.float32), query.astype(jnp.float32), masked=False) == 'xla'
    assert choose('auto', query[..., :20], query[..., :20], masked=False) == 'xla'
    monkeypatch.setattr(jax, 'local_devices', lambda: [Gpu('7.5')])
    assert choose('auto', query, query, masked=True) == 'xla'
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    assert choose('auto', query, query, masked=True) == 'xla'  # eight devices, and no mesh that says how they share the work
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    assert choose('auto', query, query, masked=True) == 'flash'
    assert choose('auto', query[:, :200], query[:, :200], masked=True) == 'xla'


def packed(length):
    """Two rows of documents; the second ends with padding."""
    segments = np.sort(np.random.default_rng(0).integers(1, 4, (2, length)))
    segments[1, -length // 4 :] = 0
    return jnp.asarray(segments, jnp.int32)


def value_and_gradients(call, query, key, value, segments, weights, causal):
    """The result of an attention and its gradients, both only where there is text."""
    real = (segments > 0)[..., None, None]

    def total(query, key, value):
        found = call(query, key, value, causal=causal, query_segments=segments, key_segments=segments)
        return jnp.sum(jnp.where(real, found * weights, 0)), jnp.where(real, found, 0)

    (_, found), gradients = jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(query, key, value)
    return found, *gradients


@pytest.mark.parametrize('causal', [False, True])
def test_splash_attention_is_that_of_other_platforms(causal, implementation):
    query, key, value = arrays((2, 256, 4, 16), (2, 256, 2, 16), (2, 256, 2, 16))
    rest = (packed(256), arrays((2, 256, 4, 16), seed=1)[0], causal)
    splash = functools.partial(flash.splash, interpret=True)
    other = functools.partial(attend, implementation=implementation)
    ours, theirs = (value_and_gradients(call, query, key, value, *rest) for call in (splash, other))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert np.abs(theirs[1]).max() > 0.1


def test_splash_attention_is_shared_over_a_mesh():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
    query, key, value = arrays((2, 128, 4, 16), (2, 128, 2, 16), (2, 128, 2, 16))
    rest = (packed(128), arrays((2, 128, 4, 16), seed=1)[0], True)
    with jax.set_mesh(mesh):
        ours = value_and_gradients(functools.partial(flash.splash, interpret=True), query, key, value, *rest)
    for a, b in zip(ours, value_and_gradients(attend, query, key, value, *rest), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert len(ours[0].sharding.device_set) == 4
