"""The Bayesian search: known optima within forty evaluations, its first points, and losses that say little."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from loraweave.extensions.routers.routers.bayesian import Bayesian, expected_improvement
from loraweave.routers.searches.random import Random

NAMES = ("a", "b/c", "🦙")


class Recorded:
    """An objective of the values in float64, remembering every candidate and the sizes of populations."""

    def __init__(self, function):
        self.function = function
        self.seen = []
        self.sizes = []

    def __call__(self, candidates):
        rows = [candidate.values_BTLE.double().flatten().numpy() for candidate in candidates]
        self.seen += rows
        self.sizes.append(len(rows))
        return [self.function(row) for row in rows]


def branin(values):
    """Branin's function, of three equal minima of 0.397887, over the box [-1.5, 1.5]."""
    x, y = 5 * values[0] + 2.5, 5 * values[1] + 7.5
    bend = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
    return float(bend**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10)


def bowl(values):
    return float(((values - 0.4) ** 2).sum())


def test_a_minimum_of_branin_is_found_in_forty_evaluations_where_random_draws_stay_away():
    found = [Bayesian(["a", "b"], seed=seed).solve(Recorded(branin)).loss for seed in range(3)]
    drawn = [Random(["a", "b"], seed=seed).solve(Recorded(branin)).loss for seed in range(3)]
    assert max(found) < 0.397887 + 0.1
    assert np.mean(drawn) > 0.397887 + 0.5


@pytest.mark.parametrize("num_experts", [1, 6])
def test_the_bottom_of_a_bowl_is_found_in_forty_evaluations(num_experts):
    names = [f"expert {number}" for number in range(num_experts)]
    assert Bayesian(names).solve(Recorded(bowl)).loss < 0.005


def test_the_first_points_are_the_start_and_one_in_every_part_of_the_box_drawn_together_around_it():
    objective = Recorded(bowl)
    Bayesian(NAMES, budget=12, initial=6, low=-1.0, high=1.5, start={"a": 0.5}).solve(objective)
    assert objective.sizes == [6, 4, 2]
    assert objective.seen[0].tolist() == [0.5, 0, 0]
    # by two thirds, for three weights
    points = objective.seen[0] + (np.array(objective.seen[1:6]) - objective.seen[0]) * 3 / 2
    parts = np.floor((points + 1.0) / 0.5).astype(int)
    assert np.sort(parts, axis=0).tolist() == [[part] * 3 for part in range(5)]


def test_losses_that_explode_far_from_the_optimum_do_not_hide_it():
    names = [f"expert {number}" for number in range(8)]
    target = np.resize([0.5, -0.2, 0.1], 8)
    steep = Recorded(lambda values: float(np.expm1(3 * ((values - target) ** 2).sum())))
    found = [Bayesian(names, seed=seed).solve(steep).loss for seed in range(3)]
    # the start has 13.4, and half of the box more than e^20
    assert max(found) < 3.0


def test_a_third_of_a_small_budget_is_initial():
    small, large = Recorded(bowl), Recorded(bowl)
    Bayesian(NAMES, budget=15).solve(small)
    Bayesian(NAMES, budget=40).solve(large)
    assert small.sizes[0] == 5
    assert large.sizes[0] == 7


def test_a_population_has_no_candidate_twice():
    objective = Recorded(bowl)
    Bayesian(NAMES, budget=40).solve(objective)
    assert len({tuple(row) for row in objective.seen}) == 40


def test_no_candidate_leaves_the_box():
    objective = Recorded(lambda values: float(((values - 2.0) ** 2).sum()))
    result = Bayesian(NAMES, low=-0.25, high=0.75).solve(objective)
    assert np.min(objective.seen) >= -0.25
    assert np.max(objective.seen) <= 0.75
    assert list(result.weights.values()) == pytest.approx([0.75] * 3, abs=0.02)


def test_losses_that_are_all_the_same_or_partly_missing_do_not_end_it():
    flat = Bayesian(NAMES).solve(Recorded(lambda values: 1.0))
    assert (flat.loss, flat.evaluations) == (1.0, 40)
    holes = Recorded(lambda values: math.nan if values[0] < 0 else bowl(values))
    result = Bayesian(NAMES).solve(holes)
    assert result.failed > 0
    assert result.loss < 0.01


@pytest.mark.parametrize(("mean", "deviation"), [(0.3, 0.5), (-1.2, 0.1), (4.0, 1.5), (0.2, 1e-3)])
def test_expected_improvement_is_its_integral(mean, deviation):
    integral, _ = quad(lambda y: (0.2 - y) * norm.pdf(y, mean, deviation), mean - 12 * deviation, 0.2)
    found = expected_improvement(np.array([mean]), np.array([deviation]), 0.2)
    assert found == pytest.approx([integral], abs=1e-7)


def test_without_uncertainty_expected_improvement_is_the_improvement_itself():
    found = expected_improvement(np.array([-1.0, 0.5]), np.zeros(2), 0.2)
    assert found.tolist() == pytest.approx([1.2, 0.0])
