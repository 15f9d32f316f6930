from __future__ import annotations

import numpy as np

from loraweave.hub.indexes.flat import Flat


def test_scores_are_inner_products_of_rows_as_given():
    index = Flat(2)
    index.add(np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]]))
    scores, positions = index.search(np.array([[0.0, 2.0]]), 3)
    np.testing.assert_allclose(scores, [[1.6, 0.0, 0.0]], atol=1e-6)
    assert positions.tolist() == [[1, 0, 2]]
