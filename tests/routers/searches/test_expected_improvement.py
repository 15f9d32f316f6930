"""Expected improvement against its integral."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from loraweave.routers.searches.bayesian import expected_improvement


@pytest.mark.parametrize(("mean", "deviation"), [(0.3, 0.5), (-1.2, 0.1), (4.0, 1.5), (0.2, 1e-3)])
def test_it_is_the_integral_of_the_improvement(mean, deviation):
    integral, _ = quad(lambda y: (0.2 - y) * norm.pdf(y, mean, deviation), mean - 12 * deviation, 0.2)
    found = expected_improvement(np.array([mean]), np.array([deviation]), 0.2)
    assert found == pytest.approx([integral], abs=1e-7)


def test_without_uncertainty_it_is_the_improvement_itself():
    found = expected_improvement(np.array([-1.0, 0.5]), np.zeros(2), 0.2)
    assert found.tolist() == pytest.approx([1.2, 0.0])
