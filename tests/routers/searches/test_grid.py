"""The grid: every point once and in order, one weight at a time where there are too many, and lattices beyond the budget."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from loraweave.errors import WeightingError
from loraweave.routers.searches.grid import Grid

NAMES = ("a", "b", "c")


class Quadratic:
    """(w - best) M (w - best), remembering every candidate; M couples neighbouring weights by `coupling`."""

    def __init__(self, best, coupling=0.0):
        self.best = np.array(best)
        self.matrix = np.eye(len(best)) + coupling * (np.eye(len(best), k=1) + np.eye(len(best), k=-1))
        self.seen = []
        self.sizes = []

    def loss(self, values):
        away = np.array(values) - self.best
        return float(away @ self.matrix @ away)

    def __call__(self, candidates):
        rows = [tuple(candidate.values_BTLE.flatten().tolist()) for candidate in candidates]
        self.seen += rows
        self.sizes.append(len(rows))
        return [self.loss(row) for row in rows]


def test_every_point_is_asked_for_once_and_in_order_the_start_first():
    strengths, objective = (0.0, -0.5, 1.0), Quadratic([0, 0, 0])
    Grid(NAMES, budget=40, strengths=strengths, start={"b": 1.0}).solve(objective)
    lattice = list(itertools.product(strengths, repeat=3))
    assert objective.seen[0] == (0, 1, 0)
    assert objective.seen[1:] == [point for point in lattice if point != (0, 1, 0)]
    assert objective.sizes == [1, 8, 8, 8, 2]


def test_a_start_beside_the_lattice_is_one_candidate_more():
    objective = Quadratic([0, 0, 0])
    Grid(NAMES, budget=9, strengths=(0, 1), start={"c": 0.25}).solve(objective)
    assert objective.seen == [(0, 0, 0.25), *itertools.product((0, 1), repeat=3)]


def test_the_best_point_of_the_lattice_is_found():
    objective = Quadratic([0.6, 0.2, -0.3], coupling=0.4)
    result = Grid(NAMES, budget=125).solve(objective)
    best = min(itertools.product((0, 0.25, 0.5, 0.75, 1.0), repeat=3), key=objective.loss)
    assert tuple(result.weights.values()) == best
    assert result.loss == objective.loss(best)


def test_groups_have_strengths_of_their_own():
    groups = {"early": ["q0"], "late": ["q1"]}
    objective = Quadratic([1, 0, 0, 1])
    result = Grid(("a", "b"), budget=16, strengths=(0, 1), groups=groups).solve(objective)
    assert result.loss == 0
    assert result.mixture.for_layer("q1").flatten().tolist() == [0, 1]


def test_one_weight_at_a_time_comes_to_the_optimum_of_a_loss_without_coupling():
    names = [f"expert {number}" for number in range(12)]
    best = np.resize([0.25, 0.0, 0.75, 1.0, 0.5], 12)
    objective = Quadratic(best)
    result = Grid(names, budget=200, coordinate=True).solve(objective)
    assert list(result.weights.values()) == best.tolist()
    # the start, 4 other strengths for each of 11 weights, of which the last is changed, and for the 11 others once more
    assert result.evaluations == 1 + 4 * 11 + 4 * 11


def test_a_change_of_one_weight_has_the_others_tried_again():
    objective = Quadratic([0.5, 0.5, 0.5], coupling=-0.6)
    result = Grid(NAMES, budget=300, coordinate=True).solve(objective)
    best = np.array(list(result.weights.values()))
    # no other strength of any one weight is better: that is what it ends with
    for place, strength in itertools.product(range(3), (0, 0.25, 0.5, 0.75, 1.0)):
        other = best.copy()
        other[place] = strength
        assert objective.loss(other) >= result.loss
    assert result.evaluations < 300


def test_candidates_that_cannot_be_scored_are_passed_over():
    plain = Quadratic([0.95, 0.05, 0.55])

    def spoilt(candidates):
        losses = plain(candidates)
        rows = plain.seen[-len(losses) :]
        return [math.nan if row[1] == 0 and row[2] == 0.5 else loss for row, loss in zip(rows, losses, strict=True)]

    lattice = itertools.product((0, 0.25, 0.5, 0.75, 1.0), repeat=3)
    best = min((point for point in lattice if point[1:] != (0, 0.5)), key=plain.loss)
    assert tuple(Grid(NAMES, budget=125).solve(spoilt).weights.values()) == best


def test_one_strength_of_one_expert_is_a_lattice_too():
    assert Grid(["a"], budget=2, strengths=[1.0]).solve(Quadratic([0.9])).weights == {"a": 1.0}
    assert Grid(["a"], budget=2, strengths=[1.0], coordinate=True).solve(Quadratic([0.9])).weights == {"a": 1.0}


def test_strengths_at_the_edges_of_the_box_are_taken_and_those_beyond_refused():
    result = Grid(["a"], budget=3, strengths=(-0.5, 0.75), low=-0.5, high=0.75).solve(Quadratic([-0.4]))
    assert result.weights == {"a": -0.5}
    for outside in (-0.51, 0.76):
        with pytest.raises(WeightingError, match=rf"strength {outside} is outside \[-0\.5, 0\.75\]"):
            Grid(["a"], budget=3, strengths=(0.0, outside), low=-0.5, high=0.75)


@pytest.mark.parametrize("coordinate", [False, True])
def test_of_points_with_equal_losses_the_first_stays(coordinate):
    grid = Grid(["a", "b"], budget=20, strengths=(0.0, 0.5, 1.0), coordinate=coordinate)
    result = grid.solve(lambda candidates: [1.0] * len(candidates))
    assert list(result.weights.values()) == grid.first.tolist() == [0.0, 0.0]
    # one weight at a time: the start, and the two other strengths of each weight, once
    assert result.evaluations == (1 + 2 * 2 if coordinate else 3**2)
