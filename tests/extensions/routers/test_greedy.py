"""Greedy selection: the recipe written out, pruning, fixed strengths, groups, and experts that cannot be scored."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loraweave.errors import WeightingError
from loraweave.extensions.routers.routers.greedy import Greedy


def names(count):
    return [f"expert {number}" for number in range(count)]


class Mixed:
    """|sum of w_e d_e - target|^2 for random directions d_e, remembering every candidate."""

    def __init__(self, num_experts, seed=0, spoil=()):
        generator = np.random.default_rng(seed)
        self.directions = generator.standard_normal((num_experts, 7)) + 1.0
        self.target = generator.standard_normal(7) + 1.0
        self.spoil = spoil
        self.seen = []
        self.sizes = []

    def loss(self, values):
        if any(values[place] for place in self.spoil):
            return math.nan
        return float(((np.array(values) @ self.directions - self.target) ** 2).sum())

    def __call__(self, candidates):
        rows = [candidate.values_BTLE[0, 0, 0].double().tolist() for candidate in candidates]
        self.seen += rows
        self.sizes.append(len(rows))
        return [self.loss(row) for row in rows]


def soup(members, num_experts):
    values = [0.0] * num_experts
    for place in members:
        values[place] = float(np.float32(1 / len(members)))
    return values


def recipe(loss, num_experts):
    """Greedy soup and pruning, as sets of members: the members and their loss."""
    alone = [loss(soup([place], num_experts)) for place in range(num_experts)]
    order = sorted((place for place in range(num_experts) if not math.isnan(alone[place])), key=lambda place: alone[place])
    members = order[:1]
    for place in order[1:]:
        if loss(soup([*members, place], num_experts)) < loss(soup(members, num_experts)):
            members = [*members, place]
    grown = len(members)
    while len(members) > 2:
        smaller = [[member for member in members if member != place] for place in members]
        best = min(smaller, key=lambda chosen: loss(soup(chosen, num_experts)))
        if loss(soup(best, num_experts)) >= loss(soup(members, num_experts)):
            break
        members = best
    return sorted(members), loss(soup(members, num_experts)), grown


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_experts", [1, 2, 9])
def test_the_result_is_that_of_the_recipe(num_experts, seed):
    objective = Mixed(num_experts, seed)
    result = Greedy(names(num_experts), budget=400).solve(objective)
    members, loss, _ = recipe(objective.loss, num_experts)
    base = objective.loss([0.0] * num_experts)
    assert result.loss == min(loss, base)
    if loss < base:
        assert sorted(place for place, weight in enumerate(result.weights.values()) if weight) == members


def test_some_of_these_cases_are_pruned():
    pruned = [seed for seed in range(60) if len(recipe(Mixed(9, seed).loss, 9)[0]) < recipe(Mixed(9, seed).loss, 9)[2]]
    assert pruned
    objective = Mixed(9, pruned[0])
    result = Greedy(names(9), budget=400).solve(objective)
    assert result.loss == recipe(objective.loss, 9)[1]


def test_all_experts_alone_are_one_population_and_so_are_the_mixtures_without_one_member():
    objective = Mixed(9, seed=1)
    Greedy(names(9), budget=400).solve(objective)
    assert objective.sizes[0] == 10
    assert objective.sizes[1:9] == [1] * 8
    grown = recipe(objective.loss, 9)[2]
    assert objective.sizes[9:10] == ([grown] if grown > 2 else [])


def test_forty_evaluations_are_enough_to_try_twenty_experts_once():
    objective = Mixed(20, seed=2)
    assert Greedy(names(20)).solve(objective).evaluations == 40
    assert objective.sizes == [21, *[1] * 19]


def test_members_can_have_a_fixed_strength():
    objective = Mixed(5, seed=3)
    result = Greedy(names(5), budget=100, strength=0.5).solve(objective)
    assert set(result.weights.values()) <= {0.0, 0.5}
    assert objective.seen[1:6] == (0.5 * np.eye(5)).tolist()


def test_in_each_group_of_layers_the_members_weigh_one_over_their_number():
    seen, groups = [], {"early": ["q0"], "late": ["q1"]}
    target_LE = np.array([[0.6, 0.4, 0.0], [0.0, 0.0, 1.0]])

    def objective(candidates):
        seen.extend(candidate.values_BTLE[0, 0].double().numpy() for candidate in candidates)
        return [float(((values - target_LE) ** 2).sum()) for values in seen[-len(candidates) :]]

    result = Greedy(["a", "b", "c"], budget=60, groups=groups).solve(objective)
    assert result.mixture.values_BTLE[0, 0].tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    assert all(values_E.sum() in (0, pytest.approx(1)) for values in seen for values_E in values)


def test_an_expert_that_cannot_be_scored_is_left_out():
    objective = Mixed(6, seed=4, spoil=(2, 5))
    result = Greedy(names(6), budget=100).solve(objective)
    assert result.loss == min(recipe(objective.loss, 6)[1], objective.loss([0.0] * 6))
    assert result.failed == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 4}, "budget is 4 evaluations, but Greedy needs at least 5"),
        ({"high": 0.5}, r"weigh up to 1.0 and the others 0, but weights lie in \[-1.5, 0.5\]"),
        ({"strength": 2.0}, "weigh up to 2.0"),
        ({"strength": math.nan}, "got strength=nan;"),
        ({"low": 0.1, "start": dict.fromkeys("abcd", 0.2)}, r"weights lie in \[0.1, 1.5\]"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(WeightingError, match=message):
        Greedy("abcd", **options)
