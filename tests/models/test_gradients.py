"""Gradients in float64 against finite differences, of the networks that have no such test beside their other ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import resnet
from research.models.audio import AudioEncoder
from research.models.mixer import Mixer
from research.models.resnet import PostActivation, PreActivation
from research.models.stack import LayerOptions, Stack

# Tests compile much and compute little: the compiler need not optimise.
OPTIONS = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
jit = functools.partial(jax.jit, compiler_options=OPTIONS)
CONVOLUTIONS = resnet.basic(34, 2)  # 17 groups of two channels; a projection, too
POST_NORM = LayerOptions(width=8, heads=2, norm_position='post', causal=True)


def check(loss, point):
    """The derivative of `loss` along a random direction at a `point` of float64 is its central difference."""
    generator = np.random.default_rng(1)
    direction = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape), point)
    both = jit(jax.value_and_grad(loss))
    slope = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (both(point)[1], direction)), strict=True))
    ahead, behind = (
        both(jax.tree.map(move, point, direction))[0] for move in (lambda x, d: x + 1e-6 * d, lambda x, d: x - 1e-6 * d)
    )
    assert abs(slope) > 1e-2
    np.testing.assert_allclose((ahead - behind) / 2e-6, slope, rtol=1e-6, atol=1e-7)


def drawn(module, *inputs, **arguments):
    """Variables of normal numbers in float64."""
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **arguments))
    return jax.tree.map(lambda leaf: generator.normal(0.2, 0.5, leaf.shape), shapes)


@pytest.mark.parametrize(
    ('module', 'shapes'),
    [
        (Stack(POST_NORM, depth=1), {'x': (2, 3, 8)}),
        (PostActivation(CONVOLUTIONS, 'group'), {'x': (2, 5, 5, 6)}),
        (PreActivation(CONVOLUTIONS, 'group'), {'x': (2, 5, 5, 6)}),
        (Mixer(3, patch=2, width=6, depth=1, patch_hidden=5, channel_hidden=7), {'inputs': (2, 4, 6, 3)}),
    ],
    ids=['post_norm', 'resnet_v1.5', 'resnet_v2', 'mixer'],
)
def test_gradients_of_weights_and_inputs(module, shapes):
    with jax.enable_x64(True):
        generator = np.random.default_rng(2)
        inputs = {name: generator.normal(size=shape) for name, shape in shapes.items()}
        check(lambda point: jnp.sum(jnp.sin(module.apply(point[0], **point[1]))), (drawn(module, **inputs), inputs))


def front(module, audio, lengths):
    """What the body of an encoder of audio reads."""
    return module.convolve(module.listen(audio, lengths, False), module.front_end.frame_lengths(lengths))


def test_gradients_of_the_convolutions_over_audio():
    """Of their weights: the features are float32 whatever those are."""
    with jax.enable_x64(True):
        module = AudioEncoder(3, sample_rate=8000, mels=6, width=6, heads=1, strides=(2, 1))
        audio, lengths = np.random.default_rng(2).normal(0, 0.1, (2, 900)), np.array([900, 640])
        variables = drawn(module, audio, lengths, method=front)
        assert set(variables['params']) == {'convolutions_0', 'convolutions_1', 'norm'}
        check(lambda variables: jnp.sum(jnp.sin(module.apply(variables, audio, lengths, method=front))), variables)
