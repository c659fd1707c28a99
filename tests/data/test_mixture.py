"""Mixtures: exact shares, exact caps, every example once an epoch of its part, and all of it a function of the step."""

import json

import jax
import numpy as np
import pytest

from research.core import schema
from research.core.errors import UsageError
from research.data import build, pipeline, streams
from research.data.mixture import Mixture, MixturePlan, mixture
from research.data.plan import plan_of, unique_examples
from research.data.source import ArraySource


def owners_of(plan, indices):
    return np.searchsorted(np.cumsum(plan.sizes), indices, side='right')


def drawn(plan, steps, first=0):
    """(owners, indices, epochs) of the examples of some steps."""
    batches = [plan.batch(step) for step in range(first, first + steps)]
    indices, epochs = (np.concatenate([batch[i] for batch in batches]) for i in (0, 1))
    return owners_of(plan, indices), indices, epochs


def endless(sizes, weights, batch_size, seed=0):
    return MixturePlan(sizes, weights, (None,) * len(sizes), batch_size, seed)


@pytest.mark.parametrize(
    ('weights', 'batch_size', 'batches'),
    [((3, 1), 8, 1), ((0.7, 0.2, 0.1), 10, 1), ((0.7, 0.2, 0.1), 32, 5), ((1, 1, 1), 32, 3), ((1,), 8, 1), ((5, 3, 8), 4, 4)],
)
def test_every_block_has_the_exact_shares(weights, batch_size, batches):
    plan = endless((50, 70, 90)[: len(weights)], weights, batch_size)
    (stage,) = plan.stages
    assert len(stage.owners) == batches * batch_size  # the smallest block in which the shares are whole numbers
    for block in range(3):
        owners, _, _ = drawn(plan, batches, first=block * batches)
        counts = np.bincount(owners, minlength=len(weights))
        np.testing.assert_allclose(counts, np.array(weights) / sum(weights) * batches * batch_size, atol=1e-9)


@pytest.mark.parametrize('weights', [(0.7, 0.2, 0.1), (1, 1, 1), (997, 83, 5), (np.pi, np.e, 0.001)])
def test_every_batch_is_near_its_shares_and_long_runs_are_right(weights):
    plan = endless((1000, 2000, 3000), weights, 32)
    shares = np.array(weights) / sum(weights)
    owners, _, _ = drawn(plan, 2000)
    for step in range(0, 2000, 97):
        counts = np.bincount(owners[step * 32 : step * 32 + 32], minlength=3)
        assert (np.abs(counts - 32 * shares) < 2).all()
    np.testing.assert_allclose(np.bincount(owners, minlength=3) / len(owners), shares, rtol=0.04, atol=1e-4)


def test_every_example_of_a_part_comes_once_in_each_of_its_epochs():
    plan = endless((13, 40, 7), (1, 1, 2), 8)
    owners, indices, epochs = drawn(plan, 200)
    for part, size in enumerate(plan.sizes):
        mine, its_epochs = indices[owners == part], epochs[owners == part]
        assert (np.diff(its_epochs) >= 0).sum() >= len(mine) - 1 - 200  # in order but for the batch's own
        for epoch in range(its_epochs.max()):
            assert len(set(mine[its_epochs == epoch])) == (its_epochs == epoch).sum() == size
    orders = [indices[(owners == 2) & (epochs == e)].tolist() for e in range(5)]
    assert len({tuple(order) for order in orders}) > 1  # every epoch is shuffled anew


@pytest.mark.parametrize('batch_size', [1, 4, 9, 32])
def test_a_part_leaves_when_it_has_given_its_epochs(batch_size):
    sizes, caps = (20, 30, 50), (2, 1.5, None)
    plan = MixturePlan(sizes, (2, 1, 1), caps, batch_size, seed=0)
    owners, indices, epochs = drawn(plan, 600 // batch_size)
    counts = np.bincount(indices, minlength=100)
    assert (counts[:20] == 2).all()
    assert sorted(np.unique(counts[20:50], return_counts=True)[1].tolist()) == [15, 15]  # half of the part twice
    assert counts[20:50].sum() == 45
    assert (counts[50:] >= 5).all()
    assert epochs[owners == 0].max() == 1
    first_end = plan.stages[1].start
    assert plan.length is None
    assert [int(stage.start) for stage in plan.stages] == sorted(int(stage.start) for stage in plan.stages)
    flat = [part for stage in plan.stages for part in (stage.counts > 0).nonzero()[0].tolist()]
    assert flat == [0, 1, 2, 1, 2, 2]
    share = np.bincount(owners[:first_end], minlength=3) / first_end
    np.testing.assert_allclose(share, [0.5, 0.25, 0.25], atol=0.04)
    second = owners[first_end : plan.stages[2].start]
    np.testing.assert_allclose(np.bincount(second, minlength=3) / len(second), [0, 0.5, 0.5], atol=0.06)


def test_a_mixture_whose_parts_have_all_left_says_so():
    plan = MixturePlan((10, 6), (1, 1), (1, 2), batch_size=4, seed=0)
    assert plan.length == 22
    _, indices, _ = drawn(plan, 5)
    counts = np.bincount(indices, minlength=16)
    assert counts[:10].max() == 1
    assert counts[10:].max() == 2
    with pytest.raises(UsageError, match=r'ends after 22 examples \(5 steps\).*\n  fix: train for fewer steps'):
        plan.batch(5)


def test_a_step_is_a_function_of_its_number():
    def make():
        return MixturePlan((100, 200), (3, 1), (4, None), batch_size=16, seed=5)

    plan = make()
    in_order = [plan.batch(step) for step in range(60)]
    for step in (59, 0, 23, 37, 36):
        for one, other in zip(make().batch(step), in_order[step], strict=True):
            np.testing.assert_array_equal(one, other)
    indices, epochs, mask = plan.batch(10**9)
    assert (indices >= 100).all()
    assert epochs.min() > 10**7
    assert mask.all()
    assert any((MixturePlan((100, 200), (3, 1), (4, None), 16, 6).batch(s)[0] != in_order[s][0]).any() for s in range(3))


def test_parts_of_one_size_are_not_shuffled_alike():
    owners, indices, _ = drawn(endless((64, 64), (1, 1), 8), 16)
    assert (indices[owners == 0] != indices[owners == 1] - 64).any()


def test_a_stream_is_a_permutation_for_each_epoch_of_small_and_large_parts():
    for n in (1, 5, streams.TABLE_LIMIT + 3):
        indices, epochs = streams.stream(np.arange(2 * n), n, seed=1)
        np.testing.assert_array_equal(epochs, np.repeat([0, 1], n))
        for epoch in (0, 1):
            np.testing.assert_array_equal(np.sort(indices[epochs == epoch]), np.arange(n))


def part(n, start, **more):
    return ArraySource({'x': np.arange(start, start + n, dtype=np.float32), **more}, label='label' if 'label' in more else None)


def test_a_mixture_is_a_source():
    whole = Mixture([part(5, 0), part(3, 100)], None, (None, None))
    assert len(whole) == 8
    assert whole[np.array([7, 0, 5, 4])]['x'].tolist() == [102, 0, 100, 4]
    assert whole.keys().tolist() == [*part(5, 0).keys().tolist(), *part(3, 100).keys().tolist()]
    assert whole.labels() is None
    chosen = whole.select(np.array([1, 2, 6]))
    assert isinstance(chosen, Mixture)
    assert chosen[np.arange(3)]['x'].tolist() == [1, 2, 101]
    assert [len(p) for p in chosen.parts] == [2, 1]
    classes = [part(2, 0, label=np.array([1, 0], np.int32)), part(1, 5, label=np.array([1], np.int32))]
    assert Mixture(classes, None, (None, None)).labels().tolist() == [1, 0, 1]


def test_without_weights_the_rows_count():
    plan = plan_of(Mixture([part(30, 0), part(10, 100)], None, (None, None)), 8, 0)
    assert isinstance(plan, MixturePlan)
    owners, _, _ = drawn(plan, 10)
    assert np.bincount(owners).tolist() == [60, 20]


def test_columns_that_one_part_lacks_are_left_out_and_differing_ones_refused():
    both = Mixture([part(2, 0, y=np.zeros(2)), part(2, 5)], None, (None, None))
    assert list(both[np.array([0, 3])]) == ['x']
    with pytest.raises(UsageError, match="differ in 'x'"):
        Mixture([part(2, 0), ArraySource({'x': np.zeros((2, 3), np.float32)})], None, (None, None))
    with pytest.raises(UsageError, match='no key in common'):
        Mixture([part(2, 0), ArraySource({'z': np.zeros(2)})], None, (None, None))


def test_an_empty_part_may_be_evaluated_but_not_trained_on():
    whole = Mixture([part(4, 0), part(4, 9)], (1, 1), (None, None)).select(np.array([0, 1]))
    assert whole.map(lambda source: source)[np.array([0, 1])]['x'].tolist() == [0, 1]
    with pytest.raises(UsageError, match='source 1 of the mixture has no training examples'):
        whole.plan(2, 0)


def test_processes_read_their_slices_of_one_global_batch(monkeypatch, mesh):
    whole = Mixture([part(50, 0), part(30, 100)], (3, 1), (2, None))
    plan = whole.plan(16, 0)
    indices, epochs, mask = plan.batch(7)
    for process in range(4):
        monkeypatch.setattr(jax, 'process_count', lambda: 4)
        monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
        found, rest = pipeline._local(plan, 7)
        np.testing.assert_array_equal(found, indices[process * 4 : process * 4 + 4])
        np.testing.assert_array_equal(rest['epoch'], epochs[process * 4 : process * 4 + 4])
        np.testing.assert_array_equal(rest['mask'], mask[:4])


@pytest.fixture
def corpora(tmp_path):
    for name, count in (('one', 30), ('two', 12)):
        lines = [json.dumps({'text': f'{name} {i}'}) for i in range(count)]
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
    (tmp_path / 'split').mkdir()
    for name in ('train.txt', 'test.txt'):
        (tmp_path / 'split' / name).write_text('x')
    return [f'text_files(path="{tmp_path}/{name}.jsonl")' for name in ('one', 'two')]


def test_the_component_mixes_what_a_config_names(corpora):
    data = mixture(sources=tuple(corpora), weights=(3, 1), max_epochs=(None, 2))
    assert data.name == 'one.jsonl+two.jsonl'
    source = data.splits['all']
    assert len(source) == 42
    assert source[np.array([30, 0])]['text'].tolist() == ['two 0', 'one 0']
    owners, _, _ = drawn(source.plan(8, 0), 4)
    assert np.bincount(owners).tolist() == [24, 8]


MISTAKES = [
    (lambda c: {'sources': ()}, 'a mixture of no sources'),
    (lambda c: {'sources': c, 'weights': (1,)}, '2 sources, 1 weights and 2 max_epochs'),
    (lambda c: {'sources': c, 'max_epochs': (1,)}, '2 sources, 1 weights and 1 max_epochs'),
    (lambda c: {'sources': c, 'weights': (1, 0)}, 'a weight or max_epochs of the mixture is 0'),
    (lambda c: {'sources': c, 'max_epochs': (None, -1)}, 'a weight or max_epochs of the mixture is -1'),
    (lambda c: {'sources': (c[0], c[0].replace('/one.jsonl', '/split'))}, 'differ in splits or classes'),
    (lambda c: {'sources': ('digitz',)}, "source 'digitz' does not exist"),
]


@pytest.mark.parametrize(('arguments', 'message'), MISTAKES)
def test_mistakes_are_named(corpora, arguments, message):
    with pytest.raises(UsageError, match=message):
        mixture(**arguments(tuple(corpora)))


def test_a_mixture_in_a_mixture_is_refused(corpora):
    inner = Mixture([part(3, 0), part(2, 10)], (9, 1), (None, 1))
    with pytest.raises(UsageError, match=r'source 1 of the mixture is a mixture or in buckets.*\n  fix: name the sources'):
        Mixture([part(4, 20), inner], (1, 1), (None, None))
    nested = {'name': 'mixture', 'sources': corpora, 'weights': (3, 1)}
    with pytest.raises(UsageError, match='source 0 of the mixture is a mixture'):
        mixture(sources=(nested, corpora[0]))


@pytest.mark.parametrize(
    ('sizes', 'weights', 'caps'), [((10, 1000), (1, 1), (None, None)), ((20, 30, 50), (2, 1, 1), (2, 1.5, None))]
)
def test_unique_examples_are_those_that_the_plan_has_drawn(sizes, weights, caps):
    source = Mixture([part(n, 1000 * k) for k, n in enumerate(sizes)], weights, caps)
    plan = source.plan(8, seed=3)
    for steps in (0, 1, 2, 7, 13, 40, 100):
        drawn_ids = {int(i) for step in range(steps) for i in plan.batch(step)[0]}
        assert unique_examples(source, steps, 8, seed=3) == len(drawn_ids)


def test_unique_examples_of_a_large_part_follow_from_its_share():
    source = Mixture([part(10, 0), part(10**6, 100)], (1, 1), (None, None))
    assert unique_examples(source, 100, 10, seed=0) == 10 + 500


def test_unique_examples_of_a_mixture_that_has_ended_are_what_its_caps_allow():
    source = Mixture([part(20, 0), part(30, 100)], (1, 1), (2, 0.5))
    assert source.plan(5, 0).length == 55
    assert unique_examples(source, 11, 5, seed=0) == 20 + 15


def test_tokens_of_an_example_are_weighed_as_the_plan_draws_them():
    def tokens(rows, real):
        return ArraySource(
            {'tokens': np.ones((rows, 128), np.int32), 'segment': np.tile(np.arange(128) < real, (rows, 1)).astype(np.int32)}
        )

    whole = Mixture([tokens(50, 10), tokens(50, 100)], (9, 1), (None, None))
    plan = whole.plan(20, 0)
    drawn_tokens = np.concatenate([whole[plan.batch(step)[0]]['segment'].sum(1) for step in range(50)])
    assert build.example_tokens(whole, ['tokens', 'segment']) == pytest.approx(drawn_tokens.mean()) == pytest.approx(19.0)
    by_rows = Mixture([tokens(30, 10), tokens(10, 50)], None, (None, None))
    assert build.example_tokens(by_rows, ['tokens', 'segment']) == pytest.approx(20.0)
    assert build.example_tokens(whole, ['image']) is None


def test_a_share_too_small_for_any_table_is_refused():
    with pytest.raises(UsageError, match=r'a source has a share of 1\.0e-07 of the mixture'):
        endless((10, 10), (1, 1e-7), 8)
    owners, _, _ = drawn(endless((10, 10), (1, 2e-3), 32), 500)
    assert abs(np.bincount(owners)[1] - 32) <= 2


def test_interleaving_is_even():
    owners, ranks = streams.interleave(np.array([6, 2, 0]))
    assert owners.tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    for k in (0, 1):
        assert ranks[owners == k].tolist() == list(range((owners == k).sum()))


def test_a_mixture_stays_one_through_splits_budget_tokenizer_and_transforms(tmp_path):
    for name, count in (('one', 300), ('two', 100)):
        lines = [json.dumps({'text': f'{name} number {i} {i * 7919 % 1000}'}) for i in range(count)]
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
    config = schema.default_config()
    sources = [f'text_files(path="{tmp_path}/{name}.jsonl")' for name in ('one', 'two')]
    config.data.source = {'name': 'mixture', 'sources': sources, 'weights': (1, 3), 'max_epochs': (None, 4)}
    config.data.budget = '50%'
    config.data.tokenizer = 'bpe(vocabulary_size=300)'
    config.data.transforms = ['pack(length=32)']
    parts, spec = build.build_splits(schema.resolve(config).data)
    assert set(parts) == {'train', 'validation', 'test'}
    assert all(isinstance(part, Mixture) for part in parts.values())
    assert spec.tokenizer.vocabulary_size <= 300
    assert spec.examples['tokens'] == ((33,), np.dtype(np.int32))
    plan = plan_of(parts['train'], 8, 0)
    owners, _, _ = drawn(plan, 4)
    assert np.bincount(owners).tolist() == [8, 24]
    assert parts['test'].weights == (1, 3)
