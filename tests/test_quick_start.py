"""The promise of the README's first command."""

import pytest

from research.core import config_file
from research.train.loop import train


@pytest.mark.slow
def test_the_quick_start_reaches_98_percent(tmp_path):
    summary = train(config_file.resolve('configs/digits_cnn.py'), tmp_path, quiet=True)
    assert summary['metrics']['test']['accuracy'] >= 0.98
    assert summary['budget']['epochs'] == pytest.approx(30, abs=0.1)
