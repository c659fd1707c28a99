"""One run on 8, then 2, then 4 devices: the examples and the losses of a run on one device."""

import numpy as np

from tests.train.test_loop import by_split, death_after, saved

# Nesterov, whose update is linear in the gradient: Adam turns the rounding of a sum near zero into a whole step.
FEW = ('optimizer=nesterov', 'optimizer.learning_rate=0.05', 'checkpoint.every=4 steps')


def test_a_run_goes_on_on_any_number_of_devices(run, monkeypatch):
    one, records, whole = run(*FEW, 'parallel.devices=1', folder='one')
    with death_after(monkeypatch, 5):
        run(*FEW, 'parallel.devices=8', folder='moved')
    with death_after(monkeypatch, 9):
        run(*FEW, 'parallel.devices=2', folder='moved')
    moved, again, path = run(*FEW, 'parallel.devices=4', folder='moved')
    for split in ('train', 'validation', 'test'):
        first, second = ([(r['step'], r['loss']) for r in by_split(which, split)] for which in (records, again))
        assert [step for step, _ in first] == [step for step, _ in second]
        np.testing.assert_allclose([x for _, x in first], [x for _, x in second], atol=1e-6)
    assert moved['budget']['unique_examples'] == one['budget']['unique_examples']
    for name, leaf in saved(whole, 12).items():
        np.testing.assert_allclose(leaf, saved(path, 12)[name], atol=1e-5, err_msg=name)
