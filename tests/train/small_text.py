"""A decoder of two layers on rows of letters, for tests of training that need the names and shapes of a Transformer."""

import jax

from research.parallel import mesh as meshes
from research.train import build
from tests.tasks.tiny_text import rows, spec_of
from tests.train.conftest import experiment_of

LENGTH = 8
SPEC = spec_of('tokens', length=LENGTH + 1)
DECODER = f'decoder(depth=2, width=16, heads=4, hidden=32, max_length={LENGTH})'


def text_experiment(*overrides, model=DECODER):
    """Eight rows a step, by plain SGD: an update that is linear in the gradient."""
    return experiment_of(
        f'model={model}', 'task=research.tasks.language:Language', 'data.batch_size=8', 'data.preprocess=none',
        'optimizer=sgd', 'optimizer.learning_rate=0.5', *overrides,
    )  # fmt: skip


def text_parts(experiment, devices=8, spec=SPEC):
    """The parts of an experiment on rows of letters, their mesh and their task."""
    mesh = meshes.make_mesh(devices, experiment.parallel.model_axis)
    task = build.make_task(experiment, spec)
    facts = build.measure(experiment, task, spec, range(64))
    return build.make_parts(experiment, task, spec, mesh, build.learning_rate(experiment.optimizer, facts)), mesh, task


def text_batch(mesh, seed=0):
    """Eight rows, laid out over the devices."""
    return jax.device_put(rows(seed, length=LENGTH + 1), meshes.batch_sharding(mesh))


def trained(experiment, devices=8, steps=3, state=None):
    """The state before and after some steps, as numpy and as it lies on the devices."""
    parts, mesh, _ = text_parts(experiment, devices)
    state = parts.init() if state is None else state
    before = jax.device_get(state)
    compiled = build.compile_parts(parts, experiment, mesh)
    for k in range(steps):
        state, _ = compiled(state, text_batch(mesh, k))
    return before, state
