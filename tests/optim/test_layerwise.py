"""Layer-wise learning rates: the factor of every leaf by its name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import leaves
from research.core.errors import UsageError
from research.models.encoder_decoder import EncoderDecoder
from research.models.resnet import ResNet20
from research.models.rnn import RNN
from research.models.transformer import Decoder
from research.models.vit import ViT
from research.optim import build, layerwise, optimizers

TOKENS = jnp.zeros((1, 4), jnp.int32)


def params_of(module, inputs, **more):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), inputs, **more))['params']


def decoder(**options):
    return params_of(Decoder(num_outputs=5, depth=3, width=8, heads=2, max_length=4, **options), TOKENS)


def factors(params, decay=0.5):
    """The factors by the first two words of the names; leaves that share them must share their factor."""
    found: dict[str, float] = {}
    for name, factor in leaves.flat(layerwise.multipliers(params, decay)).items():
        assert found.setdefault('/'.join(name.split('/')[:2]), factor) == factor
    return found


def test_a_decoder():
    below, above = {'embed/embedding': 0.0625, 'position/embedding': 0.0625}, {'stack/final_norm': 1, 'head/kernel': 1}
    layers = {'stack/layers_0': 0.125, 'stack/layers_1': 0.25, 'stack/layers_2': 0.5}
    assert factors(decoder(tied=False)) == {**below, **layers, **above}


def test_layers_that_a_scan_stacks_have_one_factor_each():
    found = leaves.flat(layerwise.multipliers(decoder(scan=True), 0.5))
    kernel = found['stack/layers/attention/query/kernel']
    assert kernel.shape == (3, 1, 1, 1)
    assert kernel.dtype == np.float32
    for name, factor in found.items():
        if 'layers' in name:
            np.testing.assert_array_equal(factor.ravel(), [0.125, 0.25, 0.5])
    assert found['embed/embedding'] == 0.0625


def test_other_families():
    images = jnp.zeros((1, 8, 8, 3))
    found = factors(params_of(ViT(num_outputs=3, patch=4, width=8, depth=2, heads=2, head='token'), images))
    below = dict.fromkeys(('class_token', 'patch/kernel', 'patch/bias', 'position/embedding'), 0.125)
    above = {'stack/final_norm': 1, 'head/kernel': 1, 'head/bias': 1}
    assert found == {**below, **above, 'stack/layers_0': 0.25, 'stack/layers_1': 0.5}
    found = factors(params_of(ResNet20(num_outputs=3, stages=(2, 1)), images))
    assert {k: v for k, v in found.items() if 'conv' in k or k.startswith(('stem', 'head'))} == {
        'stem/kernel': 0.0625, 'stem_norm/bias': 0.0625, 'stem_norm/scale': 0.0625,
        'stage_0_block_0/conv_1': 0.125, 'stage_0_block_0/conv_2': 0.125,
        'stage_0_block_1/conv_1': 0.25, 'stage_0_block_1/conv_2': 0.25,
        'stage_1_block_0/conv_1': 0.5, 'stage_1_block_0/conv_2': 0.5, 'head/bias': 1, 'head/kernel': 1,
    }  # fmt: skip
    found = factors(params_of(RNN(num_outputs=3, vocabulary_size=5, hidden=(4, 4), bidirectional=True), TOKENS))
    assert found['stack/layers_0_backward'] == found['stack/layers_0_forward'] == 0.25
    assert (found['stack/layers_1_forward'], found['embed/embedding'], found['head/kernel']) == (0.5, 0.125, 1)


def test_each_of_several_stacks_counts_for_itself_and_what_they_share_in_the_deepest():
    model = EncoderDecoder(num_outputs=5, depth=1, decoder_depth=3, width=8, heads=2, max_length=4)
    found = factors(params_of(model, TOKENS, targets=TOKENS))
    assert (found['encoder/layers_0'], found['decoder/layers_0'], found['decoder/layers_2']) == (0.5, 0.125, 0.5)
    assert found['embed/embedding'] == found['position/embedding'] == 0.0625
    towers = {'image': {'patch': {'kernel': 0}, 'stack': {'layers_0': {'x': 0}}}, 'text': {'stack': {'layers_1': {'x': 0}}}}
    towers = jax.tree.map(lambda x: np.zeros(2), towers)
    found = leaves.flat(layerwise.multipliers(towers, 0.5))
    assert found == {'image/patch/kernel': 0.25, 'image/stack/layers_0/x': 0.5, 'text/stack/layers_1/x': 0.5}


@pytest.mark.parametrize('name', ['convolutions_0/kernel', 'numeric/weight', 'category/embedding_1', 'segment_type/embedding'])
def test_what_feeds_the_layers_is_below_them(name):
    params = leaves.nested({name: np.zeros((2, 2)), 'stack/layers_0/up/kernel': np.zeros((2, 2))})
    assert leaves.flat(layerwise.multipliers(params, 0.5)) == {name: 0.25, 'stack/layers_0/up/kernel': 0.5}


def test_without_names_of_layers_it_is_refused():
    with pytest.raises(UsageError, match=r'layer_decay=0.5 needs layers that are called layers_0'):
        layerwise.multipliers({'Dense_0': {'kernel': np.zeros((2, 2))}}, 0.5)
    assert layerwise.multipliers({'Dense_0': {'kernel': np.zeros((2, 2))}}, 1.0) == {'Dense_0': {'kernel': 1.0}}


@pytest.mark.parametrize('scan', [False, True])
def test_the_update_is_the_product_of_rule_layer_and_learning_rate(scan):
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), decoder(scan=scan))
    rules = (('.*/query/kernel', 3.0), ('position/.*', None), ('.*', 2.0))
    chain = build.build(params, optimizers.sgd, lambda step: jnp.float32(0.1), rate_rules=rules, layer_decay=0.5)
    updates, _ = chain.update(params, chain.init(params), params)
    found = leaves.flat(updates)
    query, scale = ([0.3 * 0.125, 0.3 * 0.25, 0.3 * 0.5], [0.2 * 0.125, 0.2 * 0.25, 0.2 * 0.5])
    for i in range(3):
        pick = (
            (lambda name, i=i: found[f'stack/layers/{name}'][i])
            if scan
            else lambda name, i=i: found[f'stack/layers_{i}/{name}']
        )
        np.testing.assert_allclose(pick('attention/query/kernel'), -query[i], rtol=1e-6)
        np.testing.assert_allclose(pick('attention_norm/scale'), -scale[i], rtol=1e-6)
    np.testing.assert_allclose(found['embed/embedding'], -0.2 * 0.0625, rtol=1e-6)
    np.testing.assert_allclose(found['stack/final_norm/scale'], -0.2, rtol=1e-6)
    assert not found['position/embedding'].any()
