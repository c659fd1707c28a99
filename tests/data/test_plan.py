import numpy as np
import pytest
import scipy.stats

from research.data import plan
from research.data.plan import EvaluationPlan, TrainPlan


@pytest.mark.parametrize('n', [1, 2, 3, 5, 64, 1000, 1258, 4097])
def test_permute_is_a_permutation_for_every_address(n):
    for seed, epoch in ((0, 0), (0, 1), (7, 0)):
        for permutation in (plan.permute, plan.feistel):
            assert sorted(permutation(np.arange(n), n, seed, epoch)) == list(range(n))


def test_a_part_of_a_permutation_needs_no_other_part():
    whole = plan.feistel(np.arange(1000), 1000, 3, 4)
    np.testing.assert_array_equal(plan.feistel(np.array([999, 3, 500]), 1000, 3, 4), whole[[999, 3, 500]])


@pytest.mark.parametrize('permutation', [plan.permute, plan.feistel])
def test_orders_of_other_seeds_and_epochs_are_unrelated(permutation):
    n = 2000
    orders = [permutation(np.arange(n), n, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert abs(scipy.stats.spearmanr(a, b).statistic) < 5 / np.sqrt(n)
            assert (a == b).sum() < 12  # a Poisson(1) number of fixed points


@pytest.mark.parametrize(('permutation', 'n'), [(plan.permute, 3), (plan.permute, 10), (plan.permute, 64), (plan.feistel, 64)])
def test_every_place_is_equally_likely(permutation, n):
    trials = 4000
    counts = np.zeros((n, n))
    for epoch in range(trials):
        counts[np.arange(n), permutation(np.arange(n), n, 1, epoch)] += 1
    statistic = ((counts - trials / n) ** 2 / (trials / n)).sum()
    assert scipy.stats.chi2.sf(statistic, (n - 1) ** 2) > 1e-4


@pytest.mark.parametrize(('n', 'batch'), [(10, 4), (10, 10), (3, 8), (1258, 128)])
def test_every_epoch_holds_every_example_once(n, batch):
    steps = -(-3 * n // batch)
    parts = [TrainPlan(n, batch, seed=5).batch(step) for step in range(steps)]
    indices, epochs = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
    for epoch in range(3):
        assert sorted(indices[epochs == epoch]) == list(range(n))
    assert all(mask.all() for _, _, mask in parts)


def test_a_batch_within_one_epoch_is_made_as_one_across_two():
    for step in range(8):  # of 10 examples: the batches 2 and 7 hold two epochs
        indices, epochs, _ = TrainPlan(10, 4, seed=5).batch(step)
        positions = range(4 * step, 4 * step + 4)
        assert epochs.tolist() == [p // 10 for p in positions]
        assert indices.tolist() == [plan.permute(np.arange(10), 10, 5, p // 10)[p % 10] for p in positions]
        assert indices.dtype == epochs.dtype == np.int64


def test_a_far_step_of_a_huge_data_set_costs_nothing():
    indices, epochs, _ = TrainPlan(10**10, 4, 0).batch(10**10)
    assert (epochs == 4).all()
    assert len(set(indices)) == 4
    assert (indices < 10**10).all()


@pytest.mark.parametrize(('n', 'batch'), [(10, 4), (8, 4), (1, 4), (353, 512)])
def test_evaluation_sees_every_example_once_and_masks_the_rest(n, batch):
    one = EvaluationPlan(n, batch)
    parts = [one.batch(step) for step in range(len(one))]
    indices, mask = np.concatenate([p[0] for p in parts]), np.concatenate([p[2] for p in parts])
    assert list(indices[mask > 0]) == list(range(n))
    assert len(indices) % batch == 0
    assert len(indices) - n < batch
