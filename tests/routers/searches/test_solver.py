"""What a solver gets from its base: budgets, seconds, gradients, replays, failures and the curve."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loraweave.errors import SearchFailed, UnknownExpert, WeightingError
from loraweave.routers.searches import _solver as solver_module
from loraweave.routers.searches._solver import Solver
from loraweave.routers.searches._space import Space
from loraweave.routers.weights import MixtureWeights

NAMES = ("a", "b")


class Walk(Solver):
    """Three candidates at a time, each a step further from the last that was told best."""

    def _propose(self):
        base = self._vectors[int(np.argmin(self._told.losses))] if self._vectors else self.first
        return [base + 0.1 * step for step in (0, 1, 2)]


class Descent(Solver):
    """Follows the gradient."""

    needs_gradients = True
    cost = 2

    def __init__(self, experts, **options):
        super().__init__(experts, **options)
        self.place = self.first

    def _propose(self):
        return [self.place]

    def _learn(self, vectors, losses, gradients):
        self.place = vectors[0] - 0.25 * gradients[0]


def distance(candidates):
    return [float(((candidate.values_BTLE - 0.5) ** 2).sum()) for candidate in candidates]


class Smooth:
    """distance, with its gradients."""

    def __call__(self, candidates):
        return distance(candidates)

    def gradients(self, candidates):
        return distance(candidates), [2 * (candidate.values_BTLE - 0.5) for candidate in candidates]


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(solver_module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_candidates_stay_the_same_until_they_are_told():
    search = Walk(NAMES)
    assert [c.as_dict() for c in search.ask()] == [c.as_dict() for c in search.ask()]
    search.tell([3.0, 2.0, 1.0])
    assert search.ask()[0].as_dict() == pytest.approx({"a": 0.2, "b": 0.2})


def test_seconds_end_a_search_and_cut_its_last_population(clock):
    asked = []

    def slow(candidates):
        asked.append(len(candidates))
        clock.now += len(candidates)
        return distance(candidates)

    result = Walk(NAMES, budget=None, seconds=8.0).solve(slow)
    assert asked == [3, 3, 2]
    assert result.seconds == 8.0


@pytest.mark.parametrize("launched", ["by torchrun", "by the script itself"])
def test_seconds_are_refused_in_several_processes_which_would_part(monkeypatch, launched):
    if launched == "by torchrun":
        monkeypatch.setenv("WORLD_SIZE", "2")
    else:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert Walk(NAMES, budget=3).solve(lambda candidates: [0.0] * len(candidates)).evaluations == 3
    with pytest.raises(WeightingError, match=r"2 processes were launched, .* with seconds=8: give a budget"):
        Walk(NAMES, budget=3, seconds=8.0)


def test_a_resumed_search_has_only_the_seconds_that_are_left(clock, tmp_path):
    asked = []

    def slow(candidates):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(candidates))
        clock.now += len(candidates)
        return distance(candidates)

    log = tmp_path / "walk.json"
    with pytest.raises(KeyboardInterrupt):
        Walk(NAMES, budget=None, seconds=7.0).solve(slow, checkpoint=log)
    clock.now += 1000
    resumed = Walk(NAMES, budget=None, seconds=7.0).solve(slow_after(clock, again := []), checkpoint=log)
    assert again == [1]
    assert len(resumed.losses) == 7


def slow_after(clock, asked):
    def slow(candidates):
        asked.append(len(candidates))
        clock.now += len(candidates)
        return distance(candidates)

    return slow


def test_a_gradient_search_converges_and_counts_two_evaluations_a_candidate():
    result = Descent(NAMES, budget=40).solve(Smooth())
    assert (len(result.losses), result.evaluations) == (20, 40)
    assert result.weights == pytest.approx({"a": 0.5, "b": 0.5}, abs=1e-4)
    assert result.num_trained == 2


def test_groups_are_trained_by_the_gradients_of_their_layers():
    target_LE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])

    class ByLayer:
        def __call__(self, candidates):
            return [float(((c.values_BTLE[0, 0] - target_LE) ** 2).sum()) for c in candidates]

        def gradients(self, candidates):
            return self(candidates), [2 * (c.values_BTLE - target_LE) for c in candidates]

    groups = {"early": ["q0", "q1"], "late": ["q2"]}
    result = Descent(NAMES, budget=80, groups=groups).solve(ByLayer())
    assert result.num_trained == 4
    assert result.mixture.for_layer("q1").flatten().tolist() == pytest.approx([0.5, 0.5], abs=1e-3)
    assert result.mixture.for_layer("q2").flatten().tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


def test_a_loss_or_gradient_that_is_not_finite_fails_its_candidate():
    search = Descent(NAMES)
    search.ask()
    search.tell([1.0], [torch.full((1, 1, 1, 2), math.nan)])
    with pytest.raises(SearchFailed, match="none of 1 candidates"):
        search.result()


def test_after_many_candidates_without_a_score_the_search_gives_up():
    with pytest.raises(SearchFailed, match="none of the last 16 candidates"):
        Walk(NAMES).solve(lambda candidates: [math.nan] * len(candidates))


def test_failed_candidates_are_counted():
    losses = iter([1.0, math.nan, 2.0, math.inf, 0.5, 3.0])
    result = Walk(NAMES, budget=6).solve(lambda candidates: [next(losses) for _ in candidates])
    assert (result.failed, result.loss, result.evaluations) == (2, 0.5, 6)
    assert result.curve() == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 0.5), (6, 0.5)]


def test_an_objective_without_gradients_is_refused_by_name():
    with pytest.raises(WeightingError, match="Descent needs an objective with gradients"):
        Descent(NAMES).solve(distance)


def test_progress_is_told_in_evaluations():
    made = []
    Descent(NAMES, budget=7).solve(Smooth(), on_progress=made.append)
    assert made == [2, 2, 2]


GROUPS = {"early": ("q0", "v0"), "late": ("q1",)}


def test_without_groups_a_vector_has_a_weight_for_each_expert():
    mixture = Space(("a", "b", "c")).mixture(np.array([0.5, -1.0, 0.0]))
    assert mixture.as_dict() == {"a": 0.5, "b": -1.0, "c": 0.0}


def test_the_layers_of_a_group_share_their_weights():
    mixture = Space(("a", "b"), groups=GROUPS).mixture(np.array([0.1, 0.2, 0.3, 0.4]))
    assert mixture.layers == ("q0", "v0", "q1")
    assert mixture.for_layer("q0").tolist() == mixture.for_layer("v0").tolist() == [[pytest.approx([0.1, 0.2])]]
    assert mixture.for_layer("q1").tolist() == [[pytest.approx([0.3, 0.4])]]


@pytest.mark.parametrize("groups", [{}, GROUPS])
def test_the_vector_of_a_mixture_is_that_vector(groups):
    space = Space(("a", "b"), groups=groups)
    vector = np.linspace(-1, 1, space.size).astype(np.float32)
    assert space.vector(space.mixture(vector)).tolist() == vector.tolist()


def test_a_mapping_starts_every_group_alike_and_what_it_leaves_out_is_zero():
    assert Space(("a", "b"), groups=GROUPS).vector({"b": 0.5}).tolist() == [0.0, 0.5, 0.0, 0.5]
    assert Space(("a", "b")).vector(None).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("groups", [{}, GROUPS])
def test_a_gradient_is_pulled_back_as_autograd_does(groups):
    space = Space(("a", "b"), groups=groups)
    vector = torch.linspace(-1, 1, space.size, dtype=torch.float64, requires_grad=True)
    by_group_GE = vector.view(-1, 2)
    values_LE = by_group_GE[[0, 0, 1]] if groups else by_group_GE
    scale_LE = torch.arange(values_LE.numel(), dtype=torch.float64).view(values_LE.shape) + 1
    (values_LE * scale_LE).sum().backward()
    assert space.pull(scale_LE[None, None]).tolist() == vector.grad.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": ()}, "at least one expert"),
        ({"low": 1.0, "high": -1.0}, "low is 1.0 and high is -1.0; swap them"),
        ({"low": 0.5, "high": 0.5}, "low is 0.5 and high is 0.5"),
        ({"high": float("nan")}, "high is nan"),
        ({"groups": {"early": ()}}, "'early' has no layers"),
        ({"groups": {"x": ("q0",), "y": ("q1", "q0")}}, "'q0' is in two places"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(arguments, message):
    with pytest.raises(WeightingError, match=message):
        Space(**{"experts": ("a", "b"), **arguments})


def test_a_start_that_does_not_fit_is_refused():
    space = Space(("a", "b"))
    with pytest.raises(UnknownExpert, match="'x'"):
        space.vector({"x": 1.0})
    with pytest.raises(WeightingError, match=r"'b' the weight 2.0, outside \[-1.5, 1.5\]"):
        space.vector({"b": 2.0})
    with pytest.raises(WeightingError, match="instance scope"):
        space.vector(MixtureWeights(torch.zeros(2, 1, 1, 2), ("a", "b")))
    with pytest.raises(WeightingError, match=r"\('b', 'a'\)"):
        space.vector(MixtureWeights(torch.zeros(1, 1, 1, 2), ("b", "a")))
