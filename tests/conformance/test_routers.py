"""What every search of routers/ must do: ask, be told, stop at its budget, and give the best it was told of.

One case for each file of routers/searches.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from properties import Properties

from loraweave import registry
from loraweave.errors import SearchFailed, WeightingError
from loraweave.routers.searches import _solver as solver_module
from loraweave.routers.searches._solver import ClosedForm
from loraweave.routers.searches._told import Told

NAMES = ("b", "a", "v_proj")
CLASSES = {name: registry.get("routers", name) for name in registry.names("routers")}
SEARCHES = [name for name, found in CLASSES.items() if hasattr(found, "ask")]
FORMULAS = [name for name in SEARCHES if issubclass(CLASSES[name], ClosedForm)]
LEARNING = [name for name in SEARCHES if name not in FORMULAS]
# what a solver cannot do without, besides the experts
NEEDED = {
    "adapter_soup": {
        "texts": {"b": ["red apple"], "a": ["one two"], "v_proj": ["two three"]},
        "asked": ["two one"],
        "embedder": "hashing",
    },
    "grid": {"strengths": (0.0, 1.0)},
    "manual": {"weights": {"b": 0.4}},
    "similarity": {"scores": {"a": 0.2, "v_proj": 0.1}},
}
TRAITS = {name: registry.traits_of(CLASSES[name]) for name in SEARCHES}
ORDERLESS = [name for name in SEARCHES if "orderless" in TRAITS[name]]
PROPERTIES = Properties(SEARCHES)


def make(name, experts, **options):
    needed = NEEDED.get(name, {})
    if name in FORMULAS and len(experts) == 1:
        needed = {
            key: {experts[0]: next(iter(value.values()))} if isinstance(value, dict) else value
            for key, value in needed.items()
        }
    return CLASSES[name](experts, **needed, **options)


class Distance:
    """sum of |w - target|, with gradients, remembering every candidate; those of the numbers in `spoil` have no loss."""

    def __init__(self, target=0.3, spoil=()):
        self.target = torch.as_tensor(target)
        self.spoil = spoil
        self.seen = []
        self.sizes = []

    def __call__(self, candidates):
        first = len(self.seen)
        self.seen.extend(candidates)
        self.sizes.append(len(candidates))
        losses = [float((candidate.values_BTLE - self.target).abs().sum()) for candidate in candidates]
        return [math.nan if first + number in self.spoil else loss for number, loss in enumerate(losses)]

    def gradients(self, candidates):
        return self(candidates), [(candidate.values_BTLE - self.target).sign() for candidate in candidates]

    @property
    def values(self):
        """All candidates' values side by side."""
        return torch.cat([candidate.values_BTLE for candidate in self.seen])


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_keeps_all_properties(name, request):
    PROPERTIES.walk(request, name)


@PROPERTIES.add(budget=[9, 12, 17])
def it_stops_after_exactly_its_budget_and_returns_the_best(name, budget):
    solver, told = make(name, NAMES, budget=budget, seed=1), []
    while not solver.stop() and (candidates := solver.ask()):
        losses, gradients = Distance().gradients(candidates)
        told += losses
        solver.tell(losses, gradients)
    # what costs two evaluations leaves one of an odd budget
    assert len(told) <= budget // solver.cost
    assert len(told) == budget // solver.cost or "ends_early" in TRAITS[name]
    assert len(told) == 1 or name not in FORMULAS
    assert solver.stop()
    assert solver.ask() == []
    result = solver.result()
    assert result.loss == min(told)
    assert result.evaluations == solver.spent == solver.cost * len(told)


@PROPERTIES.add()
def candidates_are_finite_task_weights_of_its_experts_and_the_result_is_one_of_them(name):
    objective = Distance()
    result = make(name, NAMES, budget=12, seed=0).solve(objective)
    assert all(candidate.scope == "task" and candidate.experts == NAMES for candidate in objective.seen)
    assert bool(torch.isfinite(objective.values).all())
    best = objective.seen[result.losses.index(result.loss)]
    assert result.weights == pytest.approx(best.as_dict(), abs=1e-6)


@PROPERTIES.add(of=LEARNING)
def no_candidate_leaves_the_box(name):
    objective = Distance(target=3.0)
    make(name, NAMES, budget=40, low=-0.25, high=1.0).solve(objective)
    assert float(objective.values.min()) >= -0.25
    assert float(objective.values.max()) <= 1.0


@PROPERTIES.add()
def the_same_seed_gives_the_same_candidates_and_global_generators_are_left_alone(name):
    first, second = Distance(), Distance()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    make(name, NAMES, budget=12, seed=4).solve(first)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    make(name, NAMES, budget=12, seed=4).solve(second)
    assert torch.equal(first.values, second.values)


@PROPERTIES.add(of=LEARNING, killed_after=[1, 4])
def a_search_that_was_interrupted_goes_on_bit_for_bit(name, killed_after, tmp_path):
    class Killed(Distance):
        def __call__(self, candidates):
            if len(self.sizes) == killed_after:
                raise KeyboardInterrupt
            return super().__call__(candidates)

    whole, before, after = Distance(spoil=(2,)), Killed(spoil=(2,)), Distance()
    log = tmp_path / "runs" / "search.json"
    expected = make(name, NAMES, budget=40, seed=2).solve(whole)
    try:
        make(name, NAMES, budget=40, seed=2).solve(before, checkpoint=log)
    except KeyboardInterrupt:
        # what is told after the interruption has numbers of its own
        after.spoil = {number - len(before.seen) for number in (2,)}
    assert make(name, NAMES, budget=40, seed=2).solve(after, checkpoint=log) == expected
    seen = [objective.values for objective in (before, after) if objective.seen]
    assert torch.equal(torch.cat(seen), whole.values)
    stored = Told.read(log, make(name, NAMES, budget=40, seed=2).settings())
    assert len(stored.losses) == len(whole.seen)


@PROPERTIES.add()
def a_pool_of_one_can_be_searched(name):
    objective = Distance(target=0.6)
    result = make(name, ["alone"], budget=40, seed=1).solve(objective)
    assert list(result.weights) == ["alone"]
    assert result.loss == min(result.losses) <= 0.6


@PROPERTIES.add(of=LEARNING)
def groups_of_layers_have_weights_of_their_own(name):
    groups = {"early": ["q0", "q1"], "late": ["q2"]}
    objective = Distance(target=[[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    result = make(name, ["a", "b"], budget=60, groups=groups).solve(objective)
    assert result.mixture.layers == ("q0", "q1", "q2")
    assert bool((objective.values[:, :, 0] == objective.values[:, :, 1]).all())
    assert bool((objective.values[:, :, 0] != objective.values[:, :, 2]).any())
    assert result.num_trained == 4


@PROPERTIES.add(of=ORDERLESS)
def the_order_of_the_experts_does_not_matter(name):
    target_E, order = torch.tensor([0.4, -0.1, 0.2, 0.9]), [2, 0, 3, 1]
    names = ["d", "a", "c", "b"]
    first = make(name, names, budget=40).solve(Distance(target_E)).weights
    second = make(name, [names[place] for place in order], budget=40).solve(Distance(target_E[order])).weights
    assert second == pytest.approx(first, abs=1e-5)


@PROPERTIES.add(of=LEARNING)
def seconds_end_it_too(name, monkeypatch):
    class Clock:
        now = 100.0

    class Slow(Distance):
        def __call__(self, candidates):
            Clock.now += len(candidates)
            return super().__call__(candidates)

    monkeypatch.setattr(solver_module.time, "monotonic", lambda: Clock.now)
    solver, objective = make(name, NAMES, budget=40, seconds=13.0), Slow()
    result = solver.solve(objective)
    # the first population is whole, whatever it takes
    assert result.seconds <= max(13.0, objective.sizes[0])
    assert result.seconds == 13.0 or "ends_early" in TRAITS[name]


@PROPERTIES.add(of=LEARNING)
def candidates_without_a_loss_count_and_are_never_chosen(name):
    objective = Distance(spoil=range(1, 40, 3))
    result = make(name, NAMES, budget=40).solve(objective)
    assert result.failed == len([number for number in objective.spoil if number < len(objective.seen)])
    assert math.isfinite(result.loss)


@PROPERTIES.add()
def a_search_without_any_loss_fails_by_name(name):
    with pytest.raises(SearchFailed, match="could be scored"):
        make(name, NAMES, budget=40).solve(Distance(spoil=range(40)))


@PROPERTIES.add(
    of=LEARNING,
    refused=[
        ({"low": 1.0, "high": -1.0}, "low is 1.0 and high is -1.0; swap them"),
        ({"budget": 0}, "got budget=0;"),
        ({"budget": None}, "a budget of evaluations, or of seconds"),
        ({"seconds": -1.0}, "got seconds=-1.0;"),
        ({"seed": -1}, "got seed=-1;"),
        ({"seed": None}, "got seed=None;"),
        ({"groups": {"early": []}}, "group 'early' has no layers"),
    ],
)
def settings_that_no_search_can_use_are_refused(name, refused):
    options, message = refused
    with pytest.raises(WeightingError, match=message):
        make(name, NAMES, **options)


@PROPERTIES.add(of=[*LEARNING, "uniform"])
def a_pool_without_experts_is_refused(name):
    with pytest.raises(WeightingError, match="at least one expert"):
        make(name, [])


@PROPERTIES.add()
def its_curve_never_rises_and_ends_with_its_evaluations(name):
    result = make(name, NAMES, budget=12).solve(Distance())
    spent, lowest = zip(*result.curve(), strict=True)
    assert spent[-1] == result.evaluations
    assert list(lowest) == sorted(lowest, reverse=True)
