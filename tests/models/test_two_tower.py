"""CLIP and SigLIP towers: against their parts, unit vectors, the learned scale, sizes, partition rules, mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import leaves, registry
from research.core.errors import UsageError
from research.models import two_tower
from research.models.transformer import Encoder
from research.models.two_tower import CLIP, SigLIP, TwoTower, at_most, unit
from research.models.vit import ViT

IMAGE = {'patch': 4, 'width': 16, 'depth': 1, 'heads': 2}
TEXT = {'width': 16, 'depth': 1, 'heads': 2, 'pooling': 'mean', 'max_length': 8}


def spell(name, arguments):
    return f'{name}({", ".join(f"{key}={value!r}" for key, value in arguments.items())})'


def model(kind=CLIP, **arguments):
    towers = {'image': spell('vit', IMAGE), 'text': spell('encoder', TEXT)}
    return kind(**{'num_outputs': 6, 'vocabulary_size': 30, **towers, **arguments})


def draw(images=4, texts=5):
    rng = np.random.default_rng(0)
    image = rng.random((images, 8, 8, 3)).astype(np.float32)
    tokens = rng.integers(1, 30, (texts, 8)).astype(np.int32)
    segments = (np.arange(8) < rng.integers(2, 9, texts)[:, None]).astype(np.int32)
    return image, tokens, segments


def drawn(module, seed=3):
    """Random variables, without compiling an initialisation; the scale and the bias as they begin."""
    image, tokens, segments = draw()
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), image, texts=tokens, segments=segments))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: (0.5 * rng.normal(size=s.shape)).astype(s.dtype), shapes)['params']
    first = {'log_scale': np.log(module.initial_scale), 'bias': module.initial_bias}
    return {'params': {name: np.float32(first[name]) if name in first else leaf for name, leaf in params.items()}}


def count(module, image, texts):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), image, texts=texts))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_the_example_of_the_module_is_true():
    module = TwoTower(num_outputs=64, vocabulary_size=264)
    assert count(module, jnp.ones((1, 64, 64, 3)), jnp.ones((1, 24), jnp.int32)) == 1_404_545


def test_each_tower_is_its_model_then_a_projection_of_length_one():
    module = model()
    variables = drawn(module)
    image, tokens, segments = draw()
    found = jax.jit(module.apply)(variables, image, texts=tokens, segments=segments)
    p = variables['params']
    features = {
        'image': ViT(0, **IMAGE).apply({'params': p['image_tower']}, image),
        'text': Encoder(0, vocabulary_size=30, **TEXT).apply({'params': p['text_tower']}, tokens, segments=segments),
    }
    for name, feature in features.items():
        projected = np.asarray(feature, np.float64) @ p[f'{name}_projection']['kernel']
        np.testing.assert_allclose(
            found[name], projected / np.linalg.norm(projected, axis=1, keepdims=True), rtol=1e-4, atol=1e-5
        )
    assert found['image'].shape == (4, 6) and found['text'].shape == (5, 6)
    for name, method, arguments in (
        ('image', 'encode_image', {}),
        ('text', 'encode_text', {'segments': segments}),
    ):
        alone = jax.jit(lambda v, x, m=method, a=arguments: module.apply(v, x, method=m, **a))(
            variables, image if name == 'image' else tokens
        )
        np.testing.assert_allclose(alone, found[name], rtol=1e-5, atol=1e-6)


def test_padding_of_a_text_does_not_matter():
    module = model()
    variables, (_, tokens, segments) = drawn(module), draw()
    encode = jax.jit(lambda t: module.apply(variables, t, segments=segments, method='encode_text'))
    np.testing.assert_array_equal(encode(tokens), encode(np.where(segments > 0, tokens, 29)))
    assert np.abs(encode(tokens) - encode(np.where(segments > 0, 29, tokens))).max() > 1e-3


def test_scale_and_bias_begin_as_published():
    image, tokens, segments = draw()
    for kind, scale, bias in ((CLIP, 1 / 0.07, 0.0), (SigLIP, 10.0, -10.0)):
        module = model(kind)
        variables = drawn(module)
        found = jax.jit(module.apply)(variables, image, texts=tokens, segments=segments)
        assert (float(found['scale']), float(found['bias'])) == (pytest.approx(scale, rel=1e-6), bias)
        assert ('bias' in variables['params']) == (kind is SigLIP)


def test_the_scale_is_held_at_100_but_can_come_back():
    slope = jax.jit(jax.vmap(jax.grad(lambda x, sign: sign * at_most(x, 100.0))))
    x, sign = jnp.float32([99, 99, 101, 101]), jnp.float32([1, -1, 1, -1])
    # Descent follows the negative slope: down from 101 it may go, up it may not.
    np.testing.assert_array_equal(slope(x, sign), [1, -1, 1, 0])
    np.testing.assert_array_equal(jax.vmap(lambda v: at_most(v, 100.0))(x), [99, 99, 100, 100])


def test_unit_vectors_in_float32():
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    got = unit(jnp.asarray(x, jnp.bfloat16))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-6)
    assert np.isfinite(jax.grad(lambda v: unit(v)[0, 0])(jnp.zeros((1, 3)))).all()


def test_partition_rules_cover_both_towers():
    module = model()
    image, tokens, _ = draw()
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), image, texts=tokens))
    specs = leaves.match(two_tower.PARTITION_RULES, shapes, allow_unused=True)['params']
    for tower in ('image_tower', 'text_tower'):
        assert specs[tower]['stack']['layers_0']['attention']['query']['kernel'] == (None, 'model', None)
        assert specs[tower]['stack']['layers_0']['feed_forward']['down']['kernel'] == ('model', None)
    assert specs['text_tower']['embed']['embedding'] == ('model', None)
    assert specs['image_projection']['kernel'] == specs['log_scale'] == ()
    convolution = {'image_tower': {'stage_0_block_0': {'conv_0': {'kernel': jnp.ones((3, 3, 4, 4))}}}}
    found = leaves.match(two_tower.PARTITION_RULES, convolution, allow_unused=True)
    assert found['image_tower']['stage_0_block_0']['conv_0']['kernel'] == (None, None, None, 'model')


def test_configs_can_name_them():
    for name, kind in (('clip', CLIP), ('siglip', SigLIP)):
        built = registry.component('model', {'name': name, 'image': spell('vit', IMAGE)}, 'config.model')
        module = registry.call(built.bound(), num_outputs=6, vocabulary_size=30, cardinalities=())
        assert isinstance(module, kind) and module.vocabulary_size == 30 and module.image == spell('vit', IMAGE)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'image': 'vitt'}, "model 'vitt' does not exist\n  fix: did you mean 'vit"),
        ({'text': 'encoder(widht=16)'}, "config.model.text.widht does not exist.*\n.*'width'"),
        (
            {'text': 'encoder(width=16, depth=1, heads=2, max_length=8)'},
            r'config.model.text=.* gives \(5, 8, 16\), not features',
        ),
        ({'vocabulary_size': 0}, 'vocabulary_size=0'),
    ],
)
def test_mistakes(arguments, message):
    image, tokens, _ = draw()
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(lambda: model(**arguments).init(jax.random.key(0), image, texts=tokens))


OWN = """
import flax.linen as nn

class Headed(nn.Module):
    num_outputs: int

    @nn.compact
    def __call__(self, inputs, train=False):
        return nn.Dense(self.num_outputs)(inputs.reshape(len(inputs), -1))
"""


def test_a_tower_of_ones_own_that_always_has_a_head_is_refused(tmp_path, monkeypatch):
    (tmp_path / 'own_tower.py').write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"image='own_tower:Headed' gives .*, not features.*\n.*num_outputs=0"):
        jax.eval_shape(lambda: model(image='own_tower:Headed').init(jax.random.key(0), draw()[0], texts=draw()[1]))


def test_an_mlp_is_a_tower_too():
    module = model(image='mlp(hidden=(12,))')
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), draw()[0], texts=draw()[1]))['params']
    assert shapes['image_projection']['kernel'].shape == (12, 6)
