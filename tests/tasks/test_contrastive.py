"""The contrastive task: losses against numpy, several partners, padding, devices, prompts, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec
from scipy.special import log_expit, log_softmax

from research.core import registry
from research.core.errors import UsageError
from research.data.source import DataSpec
from research.data.tokenizers import Bytes
from research.models.two_tower import unit
from research.parallel.mesh import DATA_AXIS
from research.tasks import contrastive
from research.tasks.contrastive import Contrastive
from research.train import step

T, E, V = 8, 5, 264
SPEC = DataSpec(
    {
        'image': ((4, 4, 1), np.dtype(np.float32)),
        'tokens': ((T,), np.dtype(np.int32)),
        'segment': ((T,), np.dtype(np.int32)),
        'label': ((), np.dtype(np.int32)),
    },
    class_names=('a', 'bc', 'd'),
    tokenizer=Bytes(),
)
LOSSES = ['clip', 'siglip']


class Towers(nn.Module):
    """A dense layer for images and the mean embedding of texts, of length 1 each."""

    num_outputs: int
    vocabulary_size: int = V
    initial_bias: float | None = -1.0
    scale: float = 3.0

    def setup(self):
        self.image, self.text = nn.Dense(self.num_outputs), nn.Embed(self.vocabulary_size, self.num_outputs)
        self.log_scale = self.param('log_scale', lambda _: jnp.log(jnp.float32(self.scale)))

    def __call__(self, inputs, train=False, *, texts, segments=None):
        image = self.image(inputs.reshape(len(inputs), -1))
        text = self.encode_text(texts, segments=segments)
        found = {name: unit(x) for name, x in (('image', image), ('text', text))}
        return {**found, 'scale': jnp.exp(self.log_scale), 'bias': jnp.float32(self.initial_bias or 0)}

    def encode_text(self, texts, train=False, *, segments=None):
        weight = jnp.ones(texts.shape) if segments is None else (segments > 0).astype(jnp.float32)
        return jnp.einsum('btd,bt->bd', self.text(texts), weight.astype(self.text.embedding.dtype))


def make(loss_function='clip', model=Towers, data=SPEC, dtype=jnp.float32, **arguments):
    return Contrastive(model=model, data=data, dtype=dtype, loss_function=loss_function, embedding=E, **arguments)


def draw(n=16, captions=16, seed=0):
    """Images, and captions of which some are equal; what lies behind a caption is garbage."""
    rng = np.random.default_rng(seed)
    which = rng.permutation(np.arange(n) % captions)
    written = rng.integers(97, 122, (captions, T))
    segment = (np.arange(T) < 3 + which[:, None] % 3).astype(np.int32)
    return {
        'image': rng.normal(size=(n, 4, 4, 1)).astype(np.float32),
        'tokens': np.where(segment > 0, written[which], rng.integers(0, V, (n, T))).astype(np.int32),
        'segment': segment,
        'label': (which % 3).astype(np.int32),
        'mask': np.ones(n, np.float32),
        'id': np.arange(n, dtype=np.int32),
        'epoch': np.zeros(n, np.int32),
    }, which


def vectors(n=16, seed=1):
    rng = np.random.default_rng(seed)
    image, text = rng.normal(size=(2, n, E))
    return {
        'image': image.astype(np.float32),
        'text': text.astype(np.float32),
        'scale': np.float32(2.0),
        'bias': np.float32(-0.5),
    }


@functools.cache
def variables_of():
    shapes = jax.eval_shape(make().init, jax.random.key(0), draw()[0])
    rng = np.random.default_rng(5)
    drawn = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)
    return {'params': {**drawn['params'], 'log_scale': np.float32(1.1)}}


@functools.partial(jax.jit, static_argnums=0)
def gradient_and_terms(task, variables, batch):
    return step.gradients_of(task)(variables, batch, {})[:2]


def mean(term):
    return float(term[0]) / float(term[1])


def reference(kind, outputs, together, rows=slice(None)):
    """The mean loss by numpy in float64; `together` (n, n) are the pairs that belong together."""
    image, text = (outputs[name][rows].astype(np.float64) for name in ('image', 'text'))
    logits, together = float(outputs['scale']) * image @ text.T + float(outputs['bias']), together[rows][:, rows]
    if kind == 'siglip':
        return -np.sum(log_expit(np.where(together, logits, -logits))) / len(logits)
    share = together / together.sum(1, keepdims=True)
    return -(np.sum(share * log_softmax(logits, 1)) + np.sum(share * log_softmax(logits.T, 1))) / 2 / len(logits)


@pytest.mark.parametrize('kind', LOSSES)
@pytest.mark.parametrize('captions', [16, 5])
@pytest.mark.parametrize('same_caption', [True, False])
def test_loss_against_numpy(kind, captions, same_caption):
    task, (batch, which), outputs = make(kind, same_caption=same_caption), draw(captions=captions), vectors()
    found = jax.jit(task.terms)(outputs, batch)
    together = which[:, None] == which if same_caption else np.eye(16, dtype=bool)
    assert mean(found['loss']) == pytest.approx(reference(kind, outputs, together), rel=1e-5)
    logits = outputs['image'] @ outputs['text'].T
    assert mean(found['accuracy']) == np.mean(together[np.arange(16), logits.argmax(1)])
    assert mean(found['scale']) == pytest.approx(2.0)
    assert {float(weight) for _, weight in found.values()} == {16.0}


def test_the_examples_of_the_module():
    batch = draw(2, 2)[0]
    outputs = {'image': np.eye(2, dtype=np.float32), 'text': np.eye(2, dtype=np.float32), 'scale': 2.0, 'bias': 0.0}
    assert mean(make('clip').terms(outputs, batch)['loss']) == pytest.approx(np.log1p(np.exp(-2)), rel=1e-6)
    opposed = {**outputs, 'scale': 4.0, 'bias': -2.0}
    assert mean(make('siglip').terms(opposed, batch)['loss']) == pytest.approx(2 * np.log1p(np.exp(-2)), rel=1e-6)


@pytest.mark.parametrize('kind', LOSSES)
def test_gradients_against_finite_differences(kind):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        first, second = rng.normal(size=(2, 7, 7))
        together = (np.arange(7) % 5)[:, None] == np.arange(7) % 5
        present = np.arange(7) < 6

        @jax.jit
        def total(x, y):
            return jnp.sum(contrastive.LOSSES[kind](x, y, together & present, present))

        gradient = jax.grad(total, (0, 1))(first, second)
        for i, j in [(0, 0), (0, 5), (3, 2), (5, 6), (6, 1)]:
            bump = np.zeros((7, 7))
            bump[i, j] = 1e-6
            for which, ahead, behind in (
                (0, total(first + bump, second), total(first - bump, second)),
                (1, total(first, second + bump), total(first, second - bump)),
            ):
                np.testing.assert_allclose((ahead - behind) / 2e-6, gradient[which][i, j], atol=1e-7)
        assert not np.asarray(gradient[0][:, 6]).any()  # an example that is not there


@pytest.mark.parametrize('kind', LOSSES)
def test_masked_rows_are_neither_partners_nor_others(kind):
    task, (batch, which), variables = make(kind), draw(captions=5), variables_of()
    keep = np.arange(16) % 3 > 0
    garbage = {'image': np.nan, 'tokens': 7, 'segment': 1, 'label': -9, 'id': 0, 'epoch': 0}
    masked = {
        key: np.where(keep.reshape(-1, *[1] * (value.ndim - 1)), value, garbage.get(key, 0)).astype(value.dtype)
        for key, value in batch.items()
    }
    few = {key: value[keep] for key, value in batch.items()}
    (gradient, found), (want_gradient, want) = (
        gradient_and_terms(task, variables, masked),
        gradient_and_terms(task, variables, few),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (gradient, found), (want_gradient, want))
    assert float(found['loss'][1]) == keep.sum()
    outputs = vectors()
    got = mean(task.terms(outputs, {**batch, 'mask': keep.astype(np.float32)})['loss'])
    assert got == pytest.approx(reference(kind, outputs, which[:, None] == which, np.flatnonzero(keep)), rel=1e-5)


def test_an_empty_batch_has_a_gradient_of_zero():
    batch = draw()[0]
    for kind in LOSSES:
        gradient, found = gradient_and_terms(make(kind), variables_of(), {**batch, 'mask': 0 * batch['mask']})
        assert found['loss'] == (0, 0)
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_the_same_example_twice_belongs_together():
    task, outputs = make('clip', same_caption=False), vectors()
    batch = draw()[0]
    batch['id'][3] = batch['id'][4]
    together = np.eye(16, dtype=bool)
    together[3, 4] = together[4, 3] = True
    assert mean(task.terms(outputs, batch)['loss']) == pytest.approx(reference('clip', outputs, together), rel=1e-5)


@pytest.mark.parametrize('kind', LOSSES)
def test_all_devices_see_the_global_batch(kind, mesh):
    """jit over eight devices and pmap give the loss and the gradient of one device."""
    task, variables, batch = make(kind), variables_of(), draw(captions=5)[0]
    batch['mask'][[2, 9]] = 0
    one = gradient_and_terms(task, variables, batch)
    sharded = jax.device_put(batch, jax.sharding.NamedSharding(mesh, PartitionSpec(DATA_AXIS)))
    many = gradient_and_terms(task, variables, sharded)
    reduced = step.all_reduce(step.gradients_of(task), DATA_AXIS)
    mapped = jax.pmap(lambda v, b: reduced(v, b, {})[:2], axis_name=DATA_AXIS, in_axes=(None, 0), out_axes=None)
    split = {key: value.reshape(8, 2, *value.shape[1:]) for key, value in batch.items()}
    for other in (many, mapped(variables, split)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)


def test_microbatches_are_not_the_whole_batch():
    """What `whole_batch` is for: fewer others in a batch make another, smaller loss."""
    task, variables, batch = make(), variables_of(), draw()[0]
    accumulated = jax.jit(step.accumulate(step.gradients_of(task), 2))(variables, batch, {})[1]
    assert mean(accumulated['loss']) < mean(gradient_and_terms(task, variables, batch)[1]['loss']) - 0.1
    assert task.whole_batch


def test_a_few_steps_bring_images_to_their_captions():
    task, batch, optimizer = make(metrics=('retrieval',)), draw(captions=16)[0], optax.adam(0.1)

    @jax.jit
    def train(variables):
        def body(carry, _):
            variables, state = carry
            gradient, found, _ = step.gradients_of(task)(variables, batch, {})
            gradient = {'params': jax.tree.map(lambda g: g / 16, gradient)}
            updates, state = optimizer.update(gradient, state, variables)
            return (optax.apply_updates(variables, updates), state), found['loss'][0] / 16

        (variables, _), losses = jax.lax.scan(body, (variables, optimizer.init(variables)), length=60)
        return losses, task.metrics['retrieval'].batch(task.predict(variables, batch), batch)

    losses, state = train(variables_of())
    assert losses[0] > 2 and losses[-1] < 0.1
    recall = task.metrics['retrieval'].compute(jax.device_get(state))
    assert recall['image_to_text_recall_at_1'] == recall['text_to_image_recall_at_1'] == 1


def test_captions_may_lie_under_another_key():
    data = without(examples={'caption' if key == 'tokens' else key: value for key, value in SPEC.examples.items()})
    task, batch = make(data=data, texts='caption', metrics=('retrieval',)), draw(captions=5)[0]
    usual, outputs = make(metrics=('retrieval',)).metrics['retrieval'], vectors()
    other = {'caption' if key == 'tokens' else key: value for key, value in batch.items()}
    metric = task.metrics['retrieval']
    found = metric.compute(metric.batch(outputs, other))
    assert found == usual.compute(usual.batch(outputs, batch))
    assert len(set(found.values())) > 1


def test_prompts_are_rows_like_those_of_the_data():
    task = make(metrics=('retrieval', 'zero_shot'), prompt='An {}')
    rows = task.prompts
    np.testing.assert_array_equal(rows['segment'].sum(1), [6, 7, 6])  # with cls and sep
    assert [Bytes().decode(row[real > 0]) for row, real in zip(rows['tokens'], rows['segment'], strict=True)] == [
        'An a',
        'An bc',
        'An d',
    ]
    variables, batch = variables_of(), draw()[0]
    outputs = jax.jit(task.predict)(variables, batch)
    table = variables['params']['text']['embedding']
    want = np.stack([table[row[real > 0]].sum(0) for row, real in zip(rows['tokens'], rows['segment'], strict=True)])
    np.testing.assert_allclose(outputs['classes'], want, rtol=1e-5, atol=1e-5)
    state = task.metrics['zero_shot'].batch(outputs, batch)
    share = np.mean(np.argmax(outputs['image'] @ want.T, 1) == batch['label'])
    assert task.metrics['zero_shot'].compute(state)['zero_shot'] == pytest.approx(share)
    assert make().prompts is None and 'classes' not in jax.eval_shape(make().predict, variables, batch)


def test_bfloat16_gives_float32_outputs():
    task = make(dtype=jnp.bfloat16, metrics=('zero_shot',), prompt='{}')
    outputs = jax.eval_shape(task.predict, variables_of(), draw()[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {np.dtype(np.float32)}
    assert {name: leaf.shape for name, leaf in outputs.items()} == {
        'image': (16, E),
        'text': (16, E),
        'scale': (),
        'bias': (),
        'classes': (3, E),
    }


def test_configs_can_name_it():
    built = registry.component('task', 'contrastive(loss_function="siglip", embedding=5)', 'config.task')
    task = registry.call(built.bound(), model=Towers, data=SPEC, dtype=jnp.float32)
    assert (task.loss_function, task.num_outputs, list(task.metrics)) == ('siglip', 5, ['retrieval'])
    assert task.module.vocabulary_size == 264


def without(**changes):
    return DataSpec(**{'examples': SPEC.examples, 'class_names': SPEC.class_names, 'tokenizer': SPEC.tokenizer, **changes})


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'loss_function': 'clipp'}, "loss_function 'clipp' does not exist\n  fix: did you mean 'clip'"),
        ({'inputs': 'imgae'}, "no 'imgae'\n  fix: did you mean 'image'"),
        ({'texts': 'token'}, "did you mean 'tokens'"),
        (
            {'model': functools.partial(Towers, initial_bias=None), 'loss_function': 'siglip'},
            "needs a bias.*\n.*config.model='siglip'",
        ),
        ({'metrics': ('recall',)}, "metric 'recall' is not for this task\n.*known: retrieval, zero_shot"),
        ({'metrics': ('zero_shot',), 'data': without(class_names=None)}, 'needs class names and a tokenizer'),
        ({'metrics': ('zero_shot',), 'data': without(tokenizer=None)}, 'needs class names and a tokenizer'),
        ({'metrics': ('zero_shot',), 'prompt': 'A thing'}, 'has no place for the name of a class'),
        ({'metrics': ('zero_shot',)}, "'A picture of a.' has more than the 8 tokens of a row"),
        ({'metrics': ('zero_shot',), 'prompt': '{}', 'labels': 'kind'}, "no 'kind'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UsageError, match=message):
        make(**arguments)
    with pytest.raises(UsageError, match='embedding is 0, below 1'):
        Contrastive(model=Towers, data=SPEC, embedding=0)
