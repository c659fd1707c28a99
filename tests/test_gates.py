"""What makes a step fast, told without a clock: operations and memory of the compiled reference program, what the host reads.

The seconds are measured by `python -m bench.reference_cnn` and `python -m bench.loop_overhead`.
"""

import collections
import re
import traceback

import jax
import numpy as np
import pytest

from research.core import config_file
from research.data.build import build_splits
from research.models import lowering
from research.parallel import mesh as meshes
from research.train import build, loop

EXACT = 23_270_000  # FLOPs of an example, forward and backward, by XLA's own convolutions: 2 a multiplication and addition
HOST = ('infeed', 'outfeed', 'send', 'recv', 'xla_python_cpu_callback', 'xla_ffi_python_cpu_callback')


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    monkeypatch.setenv('NPROC', '1')  # of which the size of microbatches follows


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """A file of random images in the shape of CIFAR-10."""
    path, generator = tmp_path_factory.mktemp('images') / 'images.npz', np.random.default_rng(0)
    arrays = {}
    for split, count in (('train', 640), ('test', 64)):
        arrays[f'x_{split}'] = generator.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
        arrays[f'y_{split}'] = generator.integers(0, 10, count).astype(np.int32)
    np.savez(path, **arrays)
    return path


def reference_step(images, *overrides, batch=32):
    """The compiled step of the reference program on one device, the parts it is made of, and what is counted for it."""
    settings = [f'data.source=npz(path={str(images)!r})', f'data.batch_size={batch}', *overrides]
    experiment, mesh = config_file.resolve('configs/cifar10_cnn.py', settings), meshes.make_mesh(1)
    splits, spec = build_splits(experiment.data)
    task = build.make_task(experiment, spec)
    facts = build.measure(experiment, task, spec, splits['train'])
    parts = build.make_parts(experiment, task, spec, mesh, build.learning_rate(experiment.optimizer, facts))
    return jax.jit(parts.step, donate_argnums=0).lower(parts.abstract, parts.batch).compile(), parts, facts


def kinds(program):
    """The operations of a compiled program's text."""
    return set(re.findall(r'\s([a-z][\w-]*)\(', program))


def test_the_step_has_no_slow_operation(images):
    compiled, parts, facts = reference_step(images)
    text = compiled.as_text()
    found = kinds(text)
    assert {'dot', 'while'} <= found
    assert not found & {'select-and-scatter', 'convolution', 'sort', 'conditional'}
    assert not [name for name in HOST if name in text]
    assert parts.microbatches == 4, 'eight examples, whose largest layer is 0.9 MB'
    assert facts.step_flops == pytest.approx(32 * EXACT, rel=0.02)


def test_filtering_takes_less_than_two_thirds_of_the_operations(images):
    def flops():
        _, parts, _ = reference_step(images, 'train.accumulate=1', batch=256)
        return jax.jit(parts.step).lower(parts.abstract, parts.batch).cost_analysis()['flops']

    here = flops()
    with lowering.as_written():
        assert here < 2 / 3 * flops()


def test_devices_keep_their_own_images(images):
    experiment = config_file.resolve(
        'configs/cifar10_cnn.py', [f'data.source=npz(path={str(images)!r})', 'data.batch_size=512']
    )
    mesh, (splits, spec) = meshes.make_mesh(8), build_splits(experiment.data)
    task = build.make_task(experiment, spec)
    facts = build.measure(experiment, task, spec, splits['train'])
    parts = build.make_parts(experiment, task, spec, mesh, build.learning_rate(experiment.optimizer, facts))
    text = jax.jit(parts.step).lower(parts.abstract, parts.batch).compile().as_text()
    assert 'all-reduce' in text
    assert not [name for name in ('all-gather', 'all-to-all', 'collective-permute') if name in text]


def test_memory_of_a_step_does_not_grow_with_its_batch(images):
    """Working memory, batch 32 and 256, in microbatches and whole."""
    small, large, whole = (
        reference_step(images, *overrides, batch=batch)[0].memory_analysis().temp_size_in_bytes
        for batch, overrides in ((32, ()), (256, ()), (256, ('train.accumulate=1',)))
    )
    images_of_batch = (256 - 32) * 32 * 32 * 3 * 4
    assert large - small < 2.5 * images_of_batch
    assert whole > 5 * large


def test_the_state_is_donated(images):
    compiled, parts, _ = reference_step(images)
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts.abstract))
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * state


@pytest.mark.parametrize('ema', ['0', '0.99'])
def test_the_guard_copies_nothing(ema, images):
    guarded, bare = (copies_of_leaves(images, f'train.ema={ema}', f'train.skip_nonfinite={x}') for x in ('True', 'False'))
    assert guarded == bare
    assert 'f32[1024,64]' not in guarded


def copies_of_leaves(images, *settings):
    """How often each shape of a parameter is copied in the step."""
    compiled, parts, _ = reference_step(images, *settings)
    entry = compiled.as_text().partition('\nENTRY')[2]
    shapes = {f'f32[{",".join(map(str, leaf.shape))}]' for leaf in jax.tree.leaves(parts.abstract.params)}
    assert all(shape in entry for shape in shapes)
    copied = (line.partition('= ')[2].partition('{')[0] for line in entry.splitlines() if ' copy(' in line)
    return collections.Counter(shape for shape in copied if shape in shapes)


def test_the_host_reads_nothing_between_log_evaluation_and_checkpoint(images, tmp_path, monkeypatch):
    """jax' guard of transfers sees none on a CPU, where nothing is transferred: here every read of an array's value counts."""
    array, steps, reads = type(jax.numpy.zeros(())), [0], []
    value = array._value.fget
    assert value is not None

    def read(self):
        reads.append((steps[0], ''.join(traceback.format_stack(limit=12))))
        return value(self)

    def reading(function):
        def inner(given, *args, **kwargs):
            if any(isinstance(leaf, array) for leaf in jax.tree.leaves(given)):
                reads.append((steps[0], ''.join(traceback.format_stack(limit=12))))
            return function(given, *args, **kwargs)

        return inner

    plain = loop._steps

    def counted(run, step, state, hooks):
        def stepped(state, batch):
            steps[0] += 1
            return step(state, batch)

        monkeypatch.setattr(array, '_value', property(read))
        for name in ('asarray', 'array', 'stack'):  # numpy reads a CPU's array in place
            monkeypatch.setattr(np, name, reading(getattr(np, name)))
        return plain(run, stepped, state, hooks)

    monkeypatch.setattr(loop, '_steps', counted)
    settings = [
        f'data.source=npz(path={str(images)!r})',
        'train.duration=40 steps',
        'log.every=10 steps',
        'evaluate.every=20 steps',
        'checkpoint.every=20 steps',
        'parallel.devices=1',
    ]
    loop.train(config_file.resolve('configs/cifar10_cnn.py', settings), tmp_path / 'run', quiet=True)
    during = {step for step, _ in reads if step}
    assert during <= {10, 20, 30, 40}, [stack for step, stack in reads if step % 10]
    assert {10, 30} <= during
