"""What every search of routers/ must do: ask, be told, stop at its budget, and give the best it was told of."""

from __future__ import annotations

import pytest
import torch

from loraweave import registry
from loraweave.routers.search.closed_form import ClosedForm

NAMES = ("b", "a", "v_proj")
SEARCHES = [name for name in registry.names("routers") if hasattr(registry.get("routers", name), "ask")]
# what a solver cannot do without, besides the experts
NEEDED = {
    "grid": {"strengths": (0.0, 1.0)},
    "manual": {"weights": {"b": 0.4}},
    "similarity": {"scores": {"a": 0.2, "v_proj": 0.1}},
}
# these may come to an end of their own within the budget
ENDING = {"greedy", "grid", "manual", "similarity", "uniform"}


@pytest.fixture(params=SEARCHES)
def search(request):
    found, needed = registry.get("routers", request.param), NEEDED.get(request.param, {})
    return lambda experts, **options: found(experts, **needed, **options)


class Distance:
    """sum of |w - 0.3|, with gradients, remembering every candidate."""

    def __init__(self):
        self.seen = []

    def __call__(self, candidates):
        self.seen.extend(candidates)
        return [float((candidate.values_BTLE - 0.3).abs().sum()) for candidate in candidates]

    def gradients(self, candidates):
        return self(candidates), [(candidate.values_BTLE - 0.3).sign() for candidate in candidates]


@pytest.mark.parametrize("budget", [9, 12, 17])
def test_it_stops_after_exactly_its_budget_and_returns_the_best(search, budget):
    solver, told = search(NAMES, budget=budget, seed=1), []
    while not solver.stop():
        losses, gradients = Distance().gradients(solver.ask())
        told += losses
        solver.tell(losses, gradients)
    # what costs two evaluations leaves one of an odd budget
    assert len(told) <= budget // solver.cost
    assert len(told) == budget // solver.cost or type(solver).__name__.lower() in ENDING
    assert len(told) == 1 or not isinstance(solver, ClosedForm)
    assert solver.result().loss == min(told)


def test_candidates_are_finite_task_weights_of_its_experts_and_the_result_is_one_of_them(search):
    objective = Distance()
    result = search(NAMES, budget=12, seed=0).solve(objective)
    assert all(candidate.scope == "task" and candidate.experts == NAMES for candidate in objective.seen)
    assert all(bool(torch.isfinite(candidate.values_BTLE).all()) for candidate in objective.seen)
    best = [candidate.as_dict() for candidate in objective.seen][result.losses.index(result.loss)]
    assert result.weights == pytest.approx(best, abs=1e-6)


def test_the_same_seed_gives_the_same_candidates(search):
    runs = []
    for _ in range(2):
        objective = Distance()
        search(NAMES, budget=12, seed=4).solve(objective)
        runs.append(torch.cat([candidate.values_BTLE for candidate in objective.seen]))
    assert torch.equal(*runs)
