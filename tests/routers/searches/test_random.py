"""Random search: the start first, draws of the right distribution, and each of them by its number alone."""

from __future__ import annotations

import numpy as np
import pytest

from loraweave.routers.searches.random import Random

NAMES = ("a", "b/c", "🦙")


def candidates_of(solver):
    """All candidates, as rows of values."""
    seen = []

    def objective(candidates):
        seen.extend(candidate.values_BTLE[0, 0].double().numpy() for candidate in candidates)
        return [0.0] * len(candidates)

    solver.solve(objective)
    return np.array(seen)


def test_the_first_candidate_is_the_start():
    assert candidates_of(Random(NAMES, budget=2, start={"b/c": 0.5}))[0, 0].tolist() == [0, 0.5, 0]


def test_weights_are_uniform_in_the_box():
    draws = candidates_of(Random(NAMES, budget=3001, low=-0.5, high=2.0))[1:].reshape(-1)
    assert draws.min() >= -0.5
    assert draws.max() <= 2.0
    # the largest gap to the distribution function is below 1.63 / sqrt(n) in 99 of 100 cases
    distribution = np.sort((draws + 0.5) / 2.5)
    assert np.abs(distribution - np.arange(len(draws)) / len(draws)).max() < 1.63 / len(draws) ** 0.5


def test_weights_on_the_simplex_are_uniform_there():
    draws = candidates_of(Random(NAMES, budget=3001, simplex=True))[1:, 0]
    assert draws.min() >= 0
    assert draws.sum(axis=1) == pytest.approx(1.0, abs=1e-6)
    # of three uniform weights each is distributed as 1 - (1 - w)^2
    distribution = np.sort(1 - (1 - draws[:, 1]) ** 2)
    assert np.abs(distribution - np.arange(3000) / 3000).max() < 1.63 / 3000**0.5


def test_every_group_of_layers_sums_to_one_of_its_own():
    draws = candidates_of(Random(NAMES, budget=9, simplex=True, groups={"early": ["q0", "q1"], "late": ["q2"]}))[1:]
    assert draws.sum(axis=2) == pytest.approx(np.ones((8, 3)), abs=1e-6)
    assert np.array_equal(draws[:, 0], draws[:, 1])
    assert not np.allclose(draws[:, 0], draws[:, 2])


def test_a_draw_depends_on_its_number_and_not_on_how_many_are_asked_for_at_a_time():
    assert np.array_equal(
        candidates_of(Random(NAMES, budget=20, seed=3)), candidates_of(Random(NAMES, budget=20, seed=3, population=7))
    )
