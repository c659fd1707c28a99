"""Every family of models under its task: two steps on eight devices equal two steps on one."""

import jax
import numpy as np
import pytest

from research.core import fields, schema
from research.core.durations import Facts
from research.core.errors import UsageError
from research.parallel import mesh as meshes
from research.train import build
from tests import specs

TINY = 'depth=1, width=16, heads=2'
TOWERS = (
    f"clip(image='vit(patch=4, {TINY})', text=\"encoder({TINY}, pooling='mean', max_length=12)\")",
    f"siglip(image='vit(patch=4, {TINY})', text=\"encoder({TINY}, pooling='mean', max_length=12)\")",
)
IMAGE, SMALL = specs.image((16, 16, 3), 5), specs.image((8, 8, 1), 5)
AUDIO = specs.padded(6, 20, audio=((4000,), np.int16), audio_length=((), np.int32))
SOUND = specs.spec({'audio': ((4000,), np.int16), 'audio_length': ((), np.int32), **specs.LABEL}, 5)
TABLE = specs.spec({'numeric': ((5,), np.float32), 'category': ((2,), np.int32), **specs.LABEL}, 2, cardinalities=(3, 4))
TAGS = specs.spec(
    {**dict.fromkeys(('tokens', 'segment', 'tag'), ((12,), np.int32))}, 3, specs.Letters(20), names=('O', 'B-X', 'I-X')
)
CAPTIONS = specs.padded(12, 20, 5, image=((16, 16, 3), np.uint8))
HEAR = 'sample_rate=8000, width=16, dropout=0.0, frequency_masks=0, time_masks=0'

# model, task, data
FAMILIES = {
    'cnn': ("cnn(features=(4,), pool=(2,), padding='SAME')", 'classify', SMALL),
    'resnet v1.5, batch norm': ("resnet(stages=(1, 1), stem='cifar', width=8)", 'classify', IMAGE),
    'resnet v2, group norm': (
        "resnet(stages=(1, 1), stem='imagenet', width=8, block='bottleneck', version='2', norm='group')", 'classify', IMAGE,
    ),
    'vit': (f"vit(patch=4, {TINY}, head='token')", 'classify', IMAGE),
    'vit, scan': ("vit(patch=4, depth=2, width=16, heads=2, scan=True, positions='sincos2d')", 'classify', IMAGE),
    'mixer': ('mixer(patch=4, width=16, depth=1)', 'classify', IMAGE),
    'lstm': ("rnn(cell='lstm', hidden=(8,), bidirectional=True, pooling='mean')", 'classify', SMALL),
    'gru, language': ("rnn(cell='gru', hidden=(8,), pooling='none')", 'language', specs.windows(12, 20)),
    'decoder, packed': (f"decoder({TINY}, max_length=16)", 'language(chunk=4)', specs.packed(12, 20)),
    'decoder, llama, scan': (
        "decoder(depth=2, width=16, heads=4, kv_heads=2, positions='rotary', norm='rms', activation='swiglu', bias=False,"
        ' qk_norm=True, tied=False, scan=True)', 'language', specs.windows(12, 20),
    ),
    'encoder, masked': (
        f"encoder({TINY}, norm_position='post', mask_head=True, segment_types=2, embed_norm=True)",
        'masked', specs.padded(12, 20),
    ),
    'encoder, text': (f"encoder({TINY}, pooling='first')", "classify(inputs='tokens')", specs.padded(12, 20, 5)),
    'encoder, tags': (f"encoder({TINY})", 'tag', TAGS),
    'encoder-decoder': (f"encoder_decoder({TINY})", "seq2seq(metrics=('perplexity',))", specs.pairs(8, 6, 20)),
    'audio, ctc': (f"audio_encoder({HEAR}, body='transformer', depth=1, heads=2)", 'ctc', AUDIO),
    'audio, classes': (f"audio_encoder({HEAR}, body='rnn', depth=1, pooling='mean')", "classify(inputs='audio')", SOUND),
    'mlp, columns': ('mlp(hidden=(8,))', "classify(inputs='numeric')", TABLE),
    'ft-transformer': ('ft_transformer(depth=1, width=16, heads=2, hidden=16)', "classify(inputs='numeric')", TABLE),
    'clip': (TOWERS[0], "contrastive(embedding=8, metrics=('retrieval',))", CAPTIONS),
    'siglip': (TOWERS[1], "contrastive(loss_function='siglip', embedding=8, metrics=('retrieval',))", CAPTIONS),
}  # fmt: skip


def experiment(model, task):
    config = schema.default_config()
    config.model, config.task = model, task
    config.data.batch_size = 16
    config.optimizer.name = 'nesterov'  # linear in the gradient: Adam would turn rounding into steps
    config.optimizer.learning_rate = 0.05
    config.train.duration = '2 steps'
    return schema.resolve(config)


def two_steps(settings, data, devices, start=None):
    """Losses and states of two steps, from the state `start` or a fresh one."""
    mesh = meshes.make_mesh(devices)
    task = build.make_task(settings, data)
    parts = build.make_parts(settings, task, data, mesh, build.learning_rate(settings.optimizer, Facts(16, 100, 1e9, 2)))
    layout = jax.tree.map(lambda leaf: leaf.sharding, parts.abstract)
    start = parts.init() if start is None else jax.device_put(start, layout)
    kept, losses = jax.device_get(start), []
    compiled, state = build.compile_parts(parts, settings, mesh), start
    for seed in range(2):
        batch = jax.device_put(specs.random_batch(data, 16, seed), meshes.batch_sharding(mesh))
        state, terms = compiled(state, batch)
        losses.append(float(terms['loss'][0] / terms['loss'][1]))
    return losses, state, kept


@pytest.mark.parametrize('family', FAMILIES)
def test_two_steps_on_eight_devices_equal_two_steps_on_one(family):
    model, task, data = FAMILIES[family]
    settings = experiment(model, task)
    one, one_state, start = two_steps(settings, data, 1)
    eight, eight_state, _ = two_steps(settings, data, 8, start)
    assert np.isfinite(one).all()
    assert one[0] != one[1]
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one_state.params), jax.tree.leaves(eight_state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_task_that_compares_within_the_batch_refuses_microbatches():
    model, task, data = FAMILIES['clip']
    plain = fields.to_plain(experiment(model, task)) | {'train': {'accumulate': 2, 'duration': '2 steps'}}
    with pytest.raises(UsageError, match='would split the batch within which'):
        two_steps(schema.resolve(plain), data, 1)
