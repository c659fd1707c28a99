"""How many microbatches make a step where nobody says, and that they change nothing."""

import functools
import os

import jax
import numpy as np
import pytest
from flax import linen as nn

from research.core import config_file
from research.data.build import build_splits
from research.models import lowering
from research.parallel import hardware
from research.parallel import mesh as meshes
from research.train import build


class PlainConvolution(nn.Module):
    """A user's model, with flax' own convolution; its output is 262 kB an example."""

    num_outputs: int

    @nn.compact
    def __call__(self, inputs, train=False):
        return nn.Dense(self.num_outputs)(nn.Conv(1024, (3, 3))(inputs).mean((1, 2)))


def parts_of(*overrides, devices=1, config='configs/digits_cnn.py'):
    experiment = config_file.resolve(config, list(overrides))
    splits, spec = build_splits(experiment.data)
    task, mesh = build.make_task(experiment, spec), meshes.make_mesh(devices)
    facts = build.measure(experiment, task, spec, splits['train'])
    return build.make_parts(experiment, task, spec, mesh, build.learning_rate(experiment.optimizer, facts)), splits


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    monkeypatch.setenv('NPROC', '1')


WIDE = "model=cnn(features=(1024,), pool=(2,), padding='SAME')"  # (8, 8, 1024): 262 kB an example


def test_a_microbatch_fits_in_the_cache():
    assert parts_of(WIDE)[0].microbatches == 16, '64 examples: 16 of 4 are 1 MB each'
    assert parts_of(WIDE, 'model.norm=rms')[0].microbatches == 16, 'its statistics are of an example'
    assert parts_of(WIDE, 'parallel.compile=pmap', devices=8)[0].microbatches == 2, 'eight examples on each of eight devices'
    assert parts_of(WIDE, devices=8)[0].microbatches == 1, 'XLA cannot divide the products of a batch'
    assert parts_of()[0].microbatches == 1, 'all of it is small'


def test_cores_have_a_cache_each(monkeypatch):
    monkeypatch.setenv('NPROC', '2')
    assert parts_of(WIDE)[0].microbatches == 8
    assert parts_of(WIDE, 'parallel.compile=pmap', devices=2)[0].microbatches == 8, '32 examples on each device, of one core'
    monkeypatch.setenv('NPROC', '64')
    assert parts_of(WIDE)[0].microbatches == 1
    monkeypatch.delenv('NPROC')
    assert hardware.cpu_cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    'overrides',
    [
        ("model=cnn(features=(1024,), pool=(2,), padding='SAME', dropout=0.1)",),  # other units would be dropped
        ("model=cnn(features=(1024,), pool=(2,), padding='SAME', norm='batch')",),  # other statistics
        ('model=mlp(hidden=(4096,))',),  # no convolution
        ("model=cnn(features=(8192,), pool=(2,), padding='SAME')",),  # not even four examples would fit
        (WIDE, 'train.accumulate=1'),  # somebody says
        (WIDE, 'train.precision=bfloat16'),  # its convolutions stay XLA's, which are slow in a loop
        (f'model={__name__}:PlainConvolution',),  # as does one of flax
        ('model=vit(patch=1, width=1024, depth=1, heads=1)',),  # whose patches are a convolution of 262 kB an example
    ],
)
def test_a_step_stays_whole(overrides):
    assert parts_of(*overrides)[0].microbatches == 1


def test_the_step_is_looked_at_with_its_augmentation():
    config = 'configs/fashion_resnet_fewlabels.py:labels=64'  # fixmatch, which needs the view that the augmentation makes
    assert parts_of('data.source=digits', WIDE.replace('1024', '512'), config=config)[0].microbatches > 1


def test_accelerators_keep_whole_steps():
    with lowering.as_written():
        assert parts_of(WIDE)[0].microbatches == 1


def test_the_step_is_that_of_the_whole_batch():
    def trained(*overrides):
        parts, splits = parts_of(
            "model=cnn(features=(256, 32), pool=(2, 1), padding='SAME')", 'optimizer=nesterov(learning_rate=0.01)', *overrides
        )
        state, step = parts.init(), jax.jit(parts.step)
        rows = splits['train'][np.arange(64)]
        batch = {**rows, 'mask': np.ones(64, np.float32), 'id': np.arange(64), 'epoch': np.zeros(64, np.int32)}
        for _ in range(3):
            state, terms = step(state, batch)
        return parts.microbatches, state.params, terms

    (count, params, terms), (one, whole, of_whole) = trained(), trained('train.accumulate=1')
    assert (count, one) == (4, 1)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), (params, terms), (whole, of_whole))


def test_the_count_of_operations_does_not_depend_on_the_machine():
    def flops():
        experiment = config_file.resolve('configs/digits_cnn.py', [])
        splits, spec = build_splits(experiment.data)
        return build.measure(experiment, build.make_task(experiment, spec), spec, splits['train']).step_flops

    here = flops()
    with lowering.as_written():
        assert flops() == here
