"""What every search of routers/ must do: ask, be told, stop at its budget, and give the best it was told of."""

from __future__ import annotations

import pytest
import torch

from loraweave import registry

NAMES = ("b", "a", "v_proj")
SEARCHES = [name for name in registry.names("routers") if hasattr(registry.get("routers", name), "ask")]


@pytest.fixture(params=SEARCHES)
def search(request):
    return registry.get("routers", request.param)


def distance(candidates):
    return [float((candidate.values_BTLE - 0.3).abs().sum()) for candidate in candidates]


@pytest.mark.parametrize("budget", [9, 12, 17])
def test_it_stops_after_exactly_its_budget_and_returns_the_best(search, budget):
    solver, told = search(NAMES, budget=budget, seed=1), []
    while not solver.stop():
        candidates = solver.ask()
        told += distance(candidates)
        solver.tell(told[-len(candidates) :])
    assert len(told) == budget
    assert solver.result().loss == min(told)


def test_candidates_are_finite_task_weights_of_its_experts_and_the_result_is_one_of_them(search):
    seen = []

    def objective(candidates):
        seen.extend(candidates)
        return distance(candidates)

    result = search(NAMES, budget=12, seed=0).solve(objective)
    assert all(candidate.scope == "task" and candidate.experts == NAMES for candidate in seen)
    assert all(bool(torch.isfinite(candidate.values_BTLE).all()) for candidate in seen)
    best = [candidate.as_dict() for candidate in seen][result.losses.index(result.loss)]
    assert result.weights == pytest.approx(best, abs=1e-6)


def test_the_same_seed_gives_the_same_candidates(search):
    runs = []
    for _ in range(2):
        seen = []
        search(NAMES, budget=12, seed=4).solve(lambda candidates, seen=seen: seen.extend(candidates) or distance(candidates))
        runs.append(torch.cat([candidate.values_BTLE for candidate in seen]))
    assert torch.equal(*runs)
