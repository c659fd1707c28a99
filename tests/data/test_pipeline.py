import threading
import time

import jax
import numpy as np
import pytest

from research.core.errors import UsageError
from research.data.buckets import Buckets
from research.data.pipeline import BUFFER_BYTES, DeviceFeed, HostFeed, Prefetcher, make_feed
from research.data.plan import EvaluationPlan, TrainPlan
from research.data.source import ArraySource
from research.parallel.mesh import batch_sharding, make_mesh


@pytest.fixture
def source():
    return ArraySource({'x': np.arange(100, dtype=np.float32)[:, None], 'label': np.arange(100, dtype=np.int32)})


def host(batch):
    return {k: np.asarray(v) for k, v in batch.items()}


def test_a_batch_is_what_the_plan_says_on_any_number_of_devices(source):
    plan = TrainPlan(100, 16, seed=1)
    for devices in (1, 2, 8):
        feed = HostFeed(source, plan, batch_sharding(make_mesh(devices)))
        for step in (0, 6, 700):
            batch = host(feed(step))
            indices, epochs, _ = plan.batch(step)
            np.testing.assert_array_equal(batch['label'], indices)
            np.testing.assert_array_equal(batch['x'][:, 0], indices)
            np.testing.assert_array_equal(batch['id'], indices)
            np.testing.assert_array_equal(batch['epoch'], epochs)
            assert batch['mask'].sum() == 16


def test_the_data_set_on_the_devices_gives_the_same_batches(source, mesh):
    for plan in (TrainPlan(100, 16, seed=1), EvaluationPlan(100, 24)):
        sharding = batch_sharding(mesh)
        a, b = HostFeed(source, plan, sharding), DeviceFeed(source, plan, sharding)
        for step in (0, 4):
            on_host, on_device = a(step), b(step)
            assert set(on_host) == set(on_device)
            for key in on_host:
                np.testing.assert_array_equal(on_host[key], on_device[key])
                assert on_device[key].sharding.is_equivalent_to(sharding, on_device[key].ndim)


def test_buckets_on_the_device_are_refused(mesh):
    segment = (np.arange(8) < np.array([[2], [8]] * 8)).astype(np.int32)
    source = Buckets(ArraySource({'tokens': segment, 'segment': segment}), (4, 8), 'text')
    sharding = batch_sharding(mesh)
    for plan in (source.plan(8, 0), source.evaluation_plan(8)):
        with pytest.raises(
            UsageError, match=r"placement='device' would undo the buckets.*\n  fix: set config.data.placement='host'"
        ):
            make_feed(source, plan, sharding, 'device')
        assert make_feed(source, plan, sharding, 'host')(0)['tokens'].shape[1] in (4, 8)


@pytest.mark.parametrize('depth', [0, 1, 3])
def test_prefetching_changes_nothing(depth):
    asked = []
    with Prefetcher(lambda step: asked.append(step) or {'step': step}, start=5, depth=depth) as feed:
        assert [feed(step)['step'] for step in range(5, 12)] == list(range(5, 12))
    assert asked[:7] == list(range(5, 12))
    assert len(asked) <= 7 + depth + 1


@pytest.mark.parametrize(('rows', 'ahead'), [(1, 6), (BUFFER_BYTES // 4, 4), (BUFFER_BYTES, 2)])
def test_small_batches_wait_for_a_burst(rows, ahead):
    """`BUFFER_BYTES // 4` bytes is what four of them may have."""
    asked = []
    batch = {'image': np.broadcast_to(np.uint8(0), (rows,))}

    def feed(step):
        asked.append(step)
        return batch

    with Prefetcher(feed, start=0, depth=2, burst=6) as batches:
        batches(0)
        end = time.monotonic() + 10
        while len(asked) < ahead + 2 and time.monotonic() < end:  # and one that finds no room
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(asked) == ahead + 2


def test_an_error_in_the_thread_reaches_the_step_it_belongs_to():
    def feed(step):
        if step == 2:
            raise OSError('shard 2 cannot be read')
        return {'step': step}

    with Prefetcher(feed, start=0, depth=2) as batches:
        assert batches(0)['step'] == 0
        assert batches(1)['step'] == 1
        with pytest.raises(OSError, match='shard 2'):
            batches(2)


def test_the_thread_ends_with_the_context():
    with Prefetcher(lambda step: {'step': step}, start=0, depth=2) as feed:
        feed(0)
    assert not [t for t in threading.enumerate() if t.name == 'prefetch' and t.is_alive()]


def test_steps_out_of_order_are_refused():
    with Prefetcher(lambda step: {'step': step}, start=0, depth=1) as feed, pytest.raises(ValueError, match='expected step 0'):
        feed(3)


def test_batches_lie_along_the_data_axis(source, mesh):
    batch = HostFeed(source, TrainPlan(100, 16, 0), batch_sharding(mesh))(0)
    assert batch['x'].sharding.spec == jax.sharding.PartitionSpec('data')
    assert {shard.data.shape for shard in batch['x'].addressable_shards} == {(2, 1)}
