"""FixMatch: its loss against numpy, what must not matter, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from research.core import registry
from research.core.errors import UsageError
from research.data.build import describe
from research.data.few_labels import few_labels
from research.data.source import ArraySource, DataSet, DataSpec
from research.tasks.classify import Classify
from research.tasks.consistency import FixMatch

K, N = 4, 16  # N examples, of which 1 in 4 is labelled: unlabelled=3
SPEC = DataSpec(
    examples={
        'image': ((K,), np.dtype(np.float32)),
        'label': ((), np.dtype(np.int32)),
        'labelled': ((), np.dtype(np.float32)),
    },
    class_names=('a', 'b', 'c', 'd'),
    class_counts=(10, 10, 10, 10),
)


class Logits(nn.Module):
    """Inputs (B, K) are the logits, times a parameter that starts at one."""

    num_outputs: int

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        return inputs * self.param('gain', nn.initializers.ones, (self.num_outputs,)).astype(inputs.dtype)


class Stateful(nn.Module):
    num_outputs: int

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.0)(inputs)
        return nn.Dense(self.num_outputs)(nn.Dropout(0.5, deterministic=not train)(x))


@functools.cache
def fixmatch(model=Logits, **arguments):
    """One task for the same arguments, so that its loss is compiled once."""
    return FixMatch(model=model, data=SPEC, **{'unlabelled': 3, **arguments})


def draw(seed=0):
    rng = np.random.default_rng(seed)
    labelled = np.zeros(N, np.float32)
    labelled[[1, 2, 3, 9]] = 1  # by fours: 3, 0, 1 and 0
    return {
        'image': rng.normal(0, 4, size=(N, K)).astype(np.float32),
        'strong': rng.normal(0, 4, size=(N, K)).astype(np.float32),
        'label': rng.integers(0, K, N).astype(np.int32),
        'labelled': labelled,
        'mask': np.ones(N, np.float32),
    }


def rows(batch, take):
    return {key: value[take] for key, value in batch.items()}


@functools.partial(jax.jit, static_argnums=0)
def gradients_and_terms(task, variables, batch):
    """The gradients of the loss sum by parameters and by both views, and the terms."""

    def total(params, views):
        found, _ = task.loss({'params': params}, {**batch, **views}, {'dropout': jax.random.key(0)}, True)
        return found['loss'][0], found

    views = {name: batch[name] for name in ('image', 'strong')}
    return jax.grad(total, (0, 1), has_aux=True)(variables['params'], views)


GAIN = {'params': {'gain': jnp.ones(K)}}


def log_softmax(x):
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize('arguments', [{}, {'threshold': 0.6, 'unlabelled_weight': 0.5, 'temperature': 2.0}])
def test_the_loss_is_that_of_the_paper(arguments):
    """Mean over the labelled examples plus weight times mean over all, each mean taken by itself."""
    task, batch = fixmatch(**arguments), draw()
    (_, _), terms = gradients_and_terms(task, GAIN, batch)
    weak, strong, labelled = batch['image'], batch['strong'], batch['labelled'] > 0
    log_p = log_softmax(weak / task.temperature)
    sure, pseudo = np.exp(log_p.max(-1)) >= task.threshold, log_p.argmax(-1)
    assert 2 < sure.sum() < N - 2
    supervised = -log_softmax(weak)[np.arange(N), batch['label']][labelled].mean()
    consistency = (-log_softmax(strong)[np.arange(N), pseudo] * sure).mean()
    total, weight = terms['loss']
    assert float(weight) == N
    np.testing.assert_allclose(total / weight, supervised + task.unlabelled_weight * consistency, rtol=1e-5)
    right = pseudo == batch['label']
    hits = log_softmax(weak).argmax(-1) == batch['label']
    want = {
        'accuracy': (hits[labelled].sum(), 4),
        'labelled_share': (4, N),
        'pseudo_share': (sure.sum(), N),
        'pseudo_accuracy': ((right & sure).sum(), sure.sum()),
    }
    assert {name: tuple(map(float, terms[name])) for name in want} == want


def test_the_worked_example_of_the_module():
    """2 of 16 labelled with cross-entropy 0.5 and 0.7, three sure with 0.4, 0.8 and 2.0: the loss is 0.8."""

    def logits(loss, others):  # of cross-entropy `loss` at class 0, all else shared evenly by `others` classes
        p = np.exp(-loss)
        return np.log([p, *[(1 - p) / others] * others, *[1e-30] * (K - 1 - others)])

    weak, strong = np.zeros((N, K)), np.zeros((N, K))
    weak[:2] = [logits(0.5, 3), logits(0.7, 3)]
    weak[2:5], strong[2:5] = logits(1e-6, 3), [logits(loss, 3) for loss in (0.4, 0.8, 2.0)]
    batch = {
        'image': weak.astype(np.float32),
        'strong': strong.astype(np.float32),
        'label': np.where(np.arange(N) < 2, 0, -1).astype(np.int32),
        'labelled': (np.arange(N) < 2).astype(np.float32),
        'mask': np.ones(N, np.float32),
    }
    total, weight = gradients_and_terms(fixmatch(unlabelled=7), GAIN, batch)[1]['loss']
    assert float(total / weight) == pytest.approx(0.8, rel=1e-5)


def test_microbatches_add_up_to_the_whole_however_the_labelled_fall():
    task, batch = fixmatch(threshold=0.6), draw(1)
    whole = gradients_and_terms(task, GAIN, batch)
    parts = [gradients_and_terms(task, GAIN, rows(batch, slice(i, i + 4))) for i in range(0, N, 4)]
    (params, _), terms = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), (params, terms), (whole[0][0], whole[1]))


@pytest.mark.parametrize('garbage', [-1, 999, 2])
def test_labels_of_unlabelled_examples_do_not_matter(garbage):
    task, batch = fixmatch(threshold=0.6), draw()
    want, terms = gradients_and_terms(task, GAIN, batch)
    other = {**batch, 'label': np.where(batch['labelled'] > 0, batch['label'], garbage).astype(np.int32)}
    got, others = gradients_and_terms(task, GAIN, other)
    for trees in (terms, others):
        trees.pop('pseudo_accuracy')  # a diagnosis, which looks at all labels that there are
    jax.tree.map(np.testing.assert_array_equal, (got, others), (want, terms))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((got, others)))


def test_pseudo_accuracy_counts_known_labels_only():
    task, batch = fixmatch(threshold=0.0), draw()
    batch['label'] = np.where(batch['labelled'] > 0, batch['label'], -1).astype(np.int32)
    total, weight = gradients_and_terms(task, GAIN, batch)[1]['pseudo_accuracy']
    hits = batch['image'].argmax(-1) == batch['label']
    assert (float(total), float(weight)) == (hits.sum(), 4)


def test_no_gradient_flows_through_pseudo_labels():
    task, batch = fixmatch(threshold=0.6), draw()
    (_, views), _ = gradients_and_terms(task, GAIN, batch)
    labelled = batch['labelled'] > 0
    p = np.exp(log_softmax(batch['image']))
    np.testing.assert_array_equal(views['image'][~labelled], 0)
    want = 4 * (p - np.eye(K)[batch['label']])[labelled]  # softmax - one-hot, times 1 + unlabelled
    np.testing.assert_allclose(views['image'][labelled], want, rtol=1e-4, atol=1e-5)
    sure = p.max(-1) >= 0.6
    assert 0 < sure.sum() < N
    np.testing.assert_array_equal(np.abs(views['strong']).sum(-1) > 0, sure)  # of labelled examples too


def test_masked_rows_influence_nothing():
    task, batch = fixmatch(threshold=0.6), draw()
    keep = np.arange(N) % 4 != 3
    zeroed = {**batch, 'mask': keep.astype(np.float32)}
    garbage = {'image': np.nan, 'strong': np.nan, 'label': 999, 'labelled': np.nan, 'mask': 0}
    broken = {k: np.where(keep.reshape(-1, *[1] * (v.ndim - 1)), v, garbage[k]).astype(v.dtype) for k, v in batch.items()}
    want, got = gradients_and_terms(task, GAIN, zeroed), gradients_and_terms(task, GAIN, broken)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert float(got[1]['loss'][1]) == keep.sum()


def test_nan_outputs_of_examples_that_count_are_not_hidden():
    task, batch = fixmatch(threshold=0.6), draw()
    batch['strong'][np.argmax(batch['image'].max(-1))] = np.nan
    (gradient, _), terms = gradients_and_terms(task, GAIN, batch)
    assert np.isnan(terms['loss'][0]) and np.isnan(gradient['gain']).any()


def test_batch_statistics_see_both_views():
    task, batch = fixmatch(Stateful), draw()
    variables = jax.jit(task.init)(jax.random.key(0), batch)
    _, state = jax.jit(lambda v: task.loss(v, batch, {'dropout': jax.random.key(0)}, True))(variables)
    both = np.concatenate([batch['image'], batch['strong']])
    np.testing.assert_allclose(state['batch_stats']['BatchNorm_0']['mean'], both.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state['batch_stats']['BatchNorm_0']['var'], both.var(0), rtol=1e-4)


def test_evaluation_is_that_of_classify():
    task, other = fixmatch(), Classify(model=Logits, data=SPEC)
    batch = {key: value for key, value in draw().items() if key not in ('strong', 'labelled')}
    got, want = (jax.jit(lambda v, t=t: t.loss(v, batch, None, False)[0])(GAIN) for t in (task, other))
    assert set(got) == {'loss', 'accuracy'}
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_array_equal(task.predict(GAIN, batch), other.predict(GAIN, batch))
    assert list(task.metrics) == ['accuracy'] and task.num_outputs == K


def test_devices_keep_their_own_images(mesh):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    task, batch = fixmatch(threshold=0.6), draw()
    placed = jax.device_put(batch, sharding)
    compiled = gradients_and_terms.lower(task, GAIN, placed).compile()
    moving = [name for name in ('all-gather', 'all-to-all', 'collective-permute') if name in compiled.as_text()]
    assert not moving
    got, want = compiled(GAIN, placed)[1], gradients_and_terms(task, GAIN, batch)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_class_weights_and_smoothing_apply_to_the_labelled_part():
    batch = draw()
    variants = {'class_weights': (2.0, 2.0, 2.0, 2.0)}, {}, {'label_smoothing': 0.5}
    tasks = [fixmatch(unlabelled_weight=0.0, **variant) for variant in variants]
    doubled, once, smooth = jax.jit(lambda: [task.loss(GAIN, batch, None, True)[0]['loss'] for task in tasks])()
    np.testing.assert_allclose(doubled[0], 2 * once[0], rtol=1e-6)
    assert float(doubled[1]) == float(once[1]) == N
    assert abs(float(smooth[0] - once[0])) > 1e-2


def test_the_registry_sees_every_config_field():
    names = {field.name for field in dataclasses.fields(FixMatch)} - registry.SUPPLIED['task']
    assert set(registry.signature('task', 'fixmatch')) == names


@pytest.mark.parametrize('mixed', [0, 3])
def test_few_labels_and_the_task_must_agree(mixed):
    arrays = {'image': np.zeros((40, K), np.float32), 'label': np.arange(40, dtype=np.int32) % K}
    data = DataSet('toy', {'train': ArraySource(arrays)}, SPEC.class_names)
    spec = describe(few_labels(labels='8 examples', unlabelled=mixed)(data))
    assert FixMatch(model=Logits, data=spec, unlabelled=mixed).unlabelled == mixed
    for told in {0, 3, 7} - {mixed}:
        with pytest.raises(UsageError, match=f'has unlabelled={told}, the transform few_labels {mixed}\n'):
            FixMatch(model=Logits, data=spec, unlabelled=told)


WITHOUT = dataclasses.replace(SPEC, examples={k: v for k, v in SPEC.examples.items() if k != 'labelled'})


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'data': WITHOUT}, r"needs 'labelled'[^\n]*\n  fix: set config.data.transforms, e.g. to few_labels"),
        ({'threshold': 1.5}, r'threshold is 1.5, but must be in \[0, 1\]'),
        ({'unlabelled': -1}, 'unlabelled is -1, but must be at least 0'),
        ({'unlabelled_weight': float('nan')}, 'unlabelled_weight is nan'),
        ({'temperature': 0.0}, 'temperature is 0.0, but must be above 0'),
        ({'label_smoothing': 1.0}, 'label_smoothing is 1.0'),
    ],
)
def test_mistakes_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        FixMatch(model=Logits, **{'data': SPEC, **arguments})


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'strong': None}, "needs the batch's 'strong' view\n  fix: add 'views' to config.data.augment"),
        ({'mix_label': np.zeros(N, np.int32)}, 'cannot use mixed images\n  fix: take mixup and cutmix out'),
        ({'strong': np.zeros((N, K), np.uint8)}, r'weak view is float32\(16, 4\), the strong one uint8.*\n.*normalise'),
    ],
)
def test_batches_that_do_not_fit_are_refused(changes, message):
    batch = {key: value for key, value in (draw() | changes).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        fixmatch().loss(GAIN, batch, None, True)
