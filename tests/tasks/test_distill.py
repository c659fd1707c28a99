"""Distillation: the loss and its gradient by the formula, for examples and for tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from research.core.errors import UsageError
from research.data.source import DataSpec
from research.tasks.classify import Classify
from research.tasks.distill import Distill, Teacher, divergence
from research.tasks.language import Language
from tests.tasks.tiny_text import Mixing, V, close, packed, spec_of

B, F, K = 6, 4, 3
SPEC = DataSpec({'image': ((F,), np.dtype(np.float32)), 'label': ((), np.dtype(np.int32))}, class_names=('a', 'b', 'c'))


class Linear(nn.Module):
    """Logits that are linear in the inputs."""

    num_outputs: int

    @nn.compact
    def __call__(self, inputs, train=False):
        return nn.Dense(self.num_outputs, name='head', bias_init=nn.initializers.normal(1.0))(inputs)


def distill(temperature=2.0, weight=0.5, **more):
    """A linear student of a linear teacher."""
    given = {'model': Linear, 'data': SPEC, 'teacher': 'run', **more}
    return Distill(restore=lambda path: Teacher(Linear, dict), temperature=temperature, weight=weight, **given)


def batch_of(seed=0):
    """Six examples, of which two are masked and hold what must not be seen."""
    draw = np.random.default_rng(seed)
    image, label = draw.normal(size=(B, F)).astype(np.float32), draw.integers(0, K, B).astype(np.int32)
    mask = np.float32([1, 1, 0, 1, 1, 0])
    image[mask == 0], label[mask == 0] = np.nan, 99
    return {'image': image, 'label': label, 'mask': mask, 'id': np.arange(B), 'epoch': np.zeros(B)}


def variables_of(task, batch, seed=0):
    """Fresh variables of the student, and a teacher of another key in its place."""
    variables = jax.jit(task.init)(jax.random.key(seed), batch)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(variables['teacher']))  # filled in later, see `constants`
    return {**variables, 'teacher': jax.jit(task.teacher_task.init)(jax.random.key(seed + 1), batch)}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x):
    return np.log(softmax(x))


def numpy_logits(params, x):
    return x @ np.asarray(params['head']['kernel'], np.float64) + np.asarray(params['head']['bias'], np.float64)


@pytest.mark.parametrize(('temperature', 'weight'), [(2.0, 0.5), (1.0, 1.0), (4.0, 0.9), (3.0, 0.0)])
def test_loss_and_gradient_are_those_of_the_formula(temperature, weight):
    task, batch = distill(temperature, weight), batch_of()
    variables = variables_of(task, batch)
    state = {'teacher': variables['teacher']}

    def total(params):
        terms, new = task.loss({'params': params, **state}, batch, {}, train=True)
        return terms['loss'][0], (terms, new)

    gradient, (terms, new) = jax.jit(jax.grad(total, has_aux=True))(variables['params'])
    close(new['teacher'], variables['teacher'], rtol=0, atol=0)
    keep = batch['mask'] > 0
    x, labels = np.float64(batch['image'][keep]), batch['label'][keep]
    student, taught = (numpy_logits(v, x) for v in (variables['params'], variables['teacher']['params']))
    p, q = softmax(taught / temperature), softmax(student / temperature)
    kl = (p * (np.log(p) - np.log(q))).sum(-1)
    hard = -log_softmax(student)[np.arange(4), labels]
    np.testing.assert_allclose(terms['loss'][0], (1 - weight) * hard.sum() + weight * temperature**2 * kl.sum(), rtol=1e-5)
    assert terms['loss'][1] == terms['soft_loss'][1] == terms['hard_loss'][1] == 4
    np.testing.assert_allclose(terms['soft_loss'][0], temperature**2 * kl.sum(), rtol=1e-5)
    np.testing.assert_allclose(terms['hard_loss'][0], hard.sum(), rtol=1e-5)
    # d KL / d logits = (q - p) / t, so t^2 of it is t (q - p); of cross-entropy it is softmax - one-hot.
    by_logits = (1 - weight) * (softmax(student) - np.eye(K)[labels]) + weight * temperature * (q - p)
    np.testing.assert_allclose(gradient['head']['kernel'], x.T @ by_logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient['head']['bias'], by_logits.sum(0), rtol=1e-4, atol=1e-5)


def test_the_example_of_the_docstring():
    found = divergence(jnp.array([2 * np.log(3), 0.0]), jnp.zeros(2), 2.0)
    np.testing.assert_allclose(found, 0.1308, atol=5e-5)
    assert divergence(jnp.array([5.0, -3.0]), jnp.array([5.0, -3.0]), 2.0) == 0


def test_evaluation_is_that_of_the_inner_task():
    task, batch = distill(), batch_of()
    variables = variables_of(task, batch)
    inner, whole = task.inner, {'params': variables['params']}
    terms, state = task.loss(variables, batch, {}, train=False)
    assert set(terms) == {'loss', 'accuracy'}
    close(terms, inner.loss(whole, batch, {}, train=False)[0], rtol=0, atol=0)
    np.testing.assert_array_equal(task.predict(variables, batch), inner.predict(whole, batch))
    assert set(state) == {'teacher'}
    assert set(task.metrics) == {'accuracy'}
    assert isinstance(inner, Classify)
    assert task.module is inner.module


TEXT = {'data': spec_of('tokens', 'segment', 'position', length=9), 'model': Mixing}


def text_task(task='research.tasks.language:Language', chunk=0, **more):
    inner = f'{task}(chunk={chunk})'
    wide = Teacher(functools.partial(Mixing, width=24), dict)
    return Distill(**TEXT, teacher='run', restore=lambda path: wide, task=inner, **more)


def test_tokens_are_taught_one_by_one():
    task, batch = text_task(temperature=3.0, weight=0.25), packed(n=4, length=9)
    batch['mask'] = np.float32([1, 0, 1, 1])
    variables = variables_of(task, batch)
    terms, _ = jax.jit(task.loss, static_argnames='train')(variables, batch, {}, train=True)
    language = Language(**TEXT)
    student, taught = (
        np.float64(jax.jit(lambda v, task=task: task.apply(v, batch, None, train=False)[0])(v))
        for task, v in ((language, {'params': variables['params']}), (task.teacher_task, variables['teacher']))
    )
    assert student.shape == taught.shape == (4, 8, V)
    targets, weights = (np.asarray(x) for x in language.targets(batch))
    assert 0 < weights.sum() < 3 * 8
    p, q = softmax(taught / 3), softmax(student / 3)
    kl = (p * (np.log(p) - np.log(q))).sum(-1)
    hard = -np.take_along_axis(log_softmax(student), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(terms['soft_loss'][0], 9 * (kl * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(terms['loss'][0], (0.75 * hard * weights + 0.25 * 9 * kl * weights).sum(), rtol=1e-5)
    assert terms['loss'][1] == terms['soft_loss'][1] == weights.sum()


def test_in_chunks_it_is_the_same():
    whole, chunked = text_task(), text_task(chunk=3)
    batch = packed(n=4, length=9)
    variables = variables_of(whole, batch)

    def gradient(task):
        def total(params):
            terms, _ = task.loss({**variables, 'params': params}, batch, {}, train=True)
            return terms['loss'][0], terms

        return jax.jit(jax.grad(total, has_aux=True))(variables['params'])

    close(gradient(chunked), gradient(whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'temperature': 0.0}, 'temperature=0.0, weight=0.5 is out of range'),
        ({'weight': 1.5}, 'weight=1.5 is out of range'),
        ({'task': 'clasify'}, "did you mean 'classify'"),
        ({'task': 'distill(teacher="x")'}, 'which gives no logits'),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UsageError, match=message):
        distill(**changes)


def test_tasks_whose_loss_is_not_that_of_their_outputs_are_refused():
    """FixMatch's own loss would be left out; with class weights hard and soft loss would have two kinds of mean."""
    with pytest.raises(UsageError, match=r"would leave out the loss of the task 'fixmatch'"):
        distill(task='fixmatch', data=dataclasses.replace(SPEC, examples={**SPEC.examples, 'labelled': ((), np.float32)}))
    with pytest.raises(UsageError, match=r'weighs classes, and the teacher weighs all examples alike'):
        distill(task='classify(class_weights=(1.0, 1.0, 50.0))')
