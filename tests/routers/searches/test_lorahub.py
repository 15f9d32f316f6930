"""The LoraHub search: exact budgets, bounds, seeds, resuming, and objectives that fail."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loraweave.errors import WeightingError
from loraweave.routers.searches.lorahub import Lorahub
from loraweave.routers.searches.similarity import Similarity

NAMES = ("a", "b/c", "q_proj", "🦙")
BEST = np.array([0.9, -0.4, 0.0, 0.2])


class Quadratic:
    """sum of (w - BEST)^2, remembering every candidate."""

    def __init__(self, spoil=()):
        self.seen = []
        self.spoil = set(spoil)

    def __call__(self, candidates):
        losses = []
        for candidate in candidates:
            values = candidate.values_BTLE[0, 0, 0].double().numpy()
            self.seen.append(values)
            bad = len(self.seen) - 1 in self.spoil
            losses.append(math.nan if bad else float(((values - BEST) ** 2).sum()))
        return losses


def test_it_asks_for_the_papers_l1_term():
    assert Lorahub(NAMES).l1 == 0.05


def test_a_restart_has_twice_the_population_and_steps_of_a_quarter_of_the_box():
    search = Lorahub(NAMES, low=-1.0, high=3.0, population=6)
    for restarts, population in ((1, 12), (2, 24)):
        search._restarted = restarts
        strategy = search._evolution()
        assert (strategy.sigma, strategy.popsize) == (1.0, population)
        assert ((strategy.mean >= -1.0) & (strategy.mean <= 3.0)).all()


def test_the_search_comes_close_to_the_optimum():
    result = Lorahub(NAMES, budget=400).solve(Quadratic())
    assert [result.weights[name] for name in NAMES] == pytest.approx(BEST.tolist(), abs=0.02)


def test_the_first_candidate_is_the_start_and_the_base_by_default():
    plain, started = Quadratic(), Quadratic()
    Lorahub(NAMES, budget=3, population=2).solve(plain)
    Lorahub(NAMES, budget=3, population=2, start={"b/c": 1.0}).solve(started)
    assert plain.seen[0].tolist() == [0, 0, 0, 0]
    assert started.seen[0].tolist() == [0, 1, 0, 0]


def test_another_seed_gives_other_candidates():
    first, other = Quadratic(), Quadratic()
    Lorahub(NAMES, budget=30, seed=7).solve(first)
    Lorahub(NAMES, budget=30, seed=8).solve(other)
    assert not np.array_equal(first.seen, other.seen)


class Wells:
    """A loss with a well every half, the deepest of them at 0.7 for each weight; remembers the sizes of populations."""

    def __init__(self):
        self.sizes = []

    def __call__(self, candidates):
        self.sizes.append(len(candidates))
        away = [candidate.values_BTLE[0, 0, 0].double().numpy() - 0.7 for candidate in candidates]
        return [float((10 * (1 - np.cos(4 * math.pi * values)) + 40 * values**2).sum()) for values in away]


def test_a_search_that_is_stuck_begins_anew_with_twice_the_population():
    stuck, restarted = Wells(), Wells()
    once = Lorahub(NAMES[:3], budget=6000, restarts=0).solve(stuck)
    result = Lorahub(NAMES[:3], budget=2000, restarts=1).solve(restarted)
    # it ends where it is stuck, with most of its budget left
    assert once.loss > 5
    assert once.evaluations < 1000
    assert set(stuck.sizes) == {1, 8}
    assert result.loss < 1e-6
    assert restarted.sizes == sorted(restarted.sizes)
    assert set(restarted.sizes) == {1, 8, 16}
    assert restarted.sizes[: len(stuck.sizes)] == stuck.sizes


def test_restarts_go_on_until_the_budget_is_used_up():
    objective = Wells()
    assert Lorahub(NAMES[:3], budget=3001).solve(objective).evaluations == 3001
    assert {8, 16, 32} <= set(objective.sizes)


def test_a_search_that_restarted_resumes_to_the_same_result(tmp_path):
    whole = Lorahub(NAMES[:3], budget=1500, seed=1).solve(Wells())

    class Killed(Wells):
        def __call__(self, candidates):
            if sum(self.sizes) > 1200:
                raise KeyboardInterrupt
            return super().__call__(candidates)

    objective = Killed()
    with pytest.raises(KeyboardInterrupt):
        Lorahub(NAMES[:3], budget=1500, seed=1).solve(objective, checkpoint=tmp_path / "log.json")
    assert 16 in objective.sizes
    assert Lorahub(NAMES[:3], budget=1500, seed=1).solve(Wells(), checkpoint=tmp_path / "log.json") == whole


def test_a_box_need_not_be_symmetric_and_the_search_may_begin_at_its_edge():
    objective = Quadratic()
    result = Lorahub(NAMES, budget=600, low=-0.1, high=1.0, start={"a": 1.0}).solve(objective)
    assert objective.seen[0].tolist() == [1, 0, 0, 0]
    assert np.min(objective.seen) >= -0.1 - 1e-6
    assert np.max(objective.seen) <= 1.0 + 1e-6
    # the nearest point of the box to BEST
    assert list(result.weights.values()) == pytest.approx([0.9, -0.1, 0.0, 0.2], abs=0.02)


def test_a_search_can_begin_at_the_softmax_of_retrieval_scores():
    objective = Quadratic()
    start = Similarity(NAMES, scores={"a": 0.9, "b/c": 0.7, "q_proj": 0.7}).ask()[0]
    Lorahub(NAMES, budget=9, start=start).solve(objective)
    total = 1 + 2 * math.exp(-2)
    assert objective.seen[0] == pytest.approx([1 / total, math.exp(-2) / total, math.exp(-2) / total, 0])


@pytest.mark.parametrize("num_experts", [1, 2, 31])
def test_pools_of_any_size_can_be_searched(num_experts):
    names = [f"expert {index}" for index in range(num_experts)]

    def nearest_to_half(candidates):
        return [float(((c.values_BTLE - 0.5) ** 2).sum()) for c in candidates]

    result = Lorahub(names, budget=60).solve(nearest_to_half)
    assert result.loss < 0.25 * num_experts


def test_candidates_that_cannot_be_scored_count_and_are_never_chosen():
    objective = Quadratic(spoil=range(1, 400, 3))
    result = Lorahub(NAMES, budget=400).solve(objective)
    assert result.evaluations == 400
    assert [result.weights[name] for name in NAMES] == pytest.approx(BEST.tolist(), abs=0.1)


def test_a_checkpoint_of_another_search_is_refused(tmp_path):
    Lorahub(NAMES, budget=9).solve(Quadratic(), checkpoint=tmp_path / "log.json")
    with pytest.raises(WeightingError, match="other settings"):
        Lorahub(NAMES, budget=10).solve(Quadratic(), checkpoint=tmp_path / "log.json")


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    (tmp_path / "log.json").write_text('{"settings": ')
    with pytest.raises(WeightingError, match="damaged"):
        Lorahub(NAMES).solve(Quadratic(), checkpoint=tmp_path / "log.json")


def test_losses_must_be_told_for_every_candidate():
    search = Lorahub(NAMES)
    search.ask()
    with pytest.raises(WeightingError, match="2 losses were told for 1 candidates"):
        search.tell([1.0, 2.0])
