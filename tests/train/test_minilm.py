"""Real weights: MiniLM's sentence embeddings are those of transformers. Skipped where the model was not fetched."""

import numpy as np
import pytest

from bench import minilm
from research.core import files
from research.train.pretrained import SINGLE

# The first eight numbers of each sentence's embedding, by transformers 5.23.0 and torch 2.13.0 on a CPU, float32.
EXPECTED = [
    [-0.102969, 0.045574, -0.007625, 0.056591, -0.016369, 0.009336, 0.033024, 0.013783],
    [0.04247, -0.036337, -0.006833, -0.055406, -0.027889, 0.032373, 0.105055, -0.00547],
    [0.043934, 0.058934, 0.048178, 0.077548, 0.026744, -0.03763, -0.002605, -0.059943],
    [0.016169, 0.014905, -0.018327, -0.089638, -0.050379, 0.086185, 0.054009, -0.007867],
    [-0.008984, -0.086457, -0.017713, 0.065392, 0.047181, 0.009919, -0.071877, -0.014158],
    [0.007856, 0.045194, -0.0318, -0.026183, -0.048452, 0.025812, 0.0079, 0.064154],
    [0.048671, -0.017685, 0.033549, -0.005462, -0.088102, -0.016272, 0.017683, -0.0115],
    [0.012272, -0.066054, -0.02898, 0.016289, -0.039502, 0.020268, 0.042066, -0.024587],
]


def test_embeddings_are_those_of_the_reference_implementation():
    folder = files.data_folder() / minilm.FOLDER
    if not (folder / SINGLE).is_file():
        pytest.skip('MiniLM is not here: python -m bench.data fetch minilm')
    found = minilm.embeddings(folder)
    assert found.shape == (8, 384)
    np.testing.assert_allclose(found[:, :8], EXPECTED, atol=2e-6)
