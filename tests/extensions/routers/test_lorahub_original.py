"""LoraHub's published search, beside nevergrad driven as its authors drive it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from loraweave.errors import PackageMissing, SearchFailed, WeightingError
from loraweave.extensions.routers.routers.lorahub_original import LorahubOriginal

nevergrad = pytest.importorskip("nevergrad")

NAMES = [f"expert {number}" for number in range(5)]


class Bowl:
    """sum of (w - 0.4)^2 in float64 plus LoraHub's L1 term, remembering every candidate."""

    def __init__(self):
        self.seen = []

    def loss(self, values):
        return float(((np.array(values) - 0.4) ** 2).sum() + 0.05 * np.abs(values).mean())

    def __call__(self, candidates):
        rows = [candidate.values_BTLE.flatten().double().numpy() for candidate in candidates]
        self.seen += rows
        return [self.loss(row) for row in rows]


def authors_search(seed, loss, num_experts):
    """lorahub_learning's lines about nevergrad: candidates and recommendation."""
    seen = []

    def score(weights):
        # loraweave's weights are of fp32, and so must these be for the losses to agree to the last bit
        seen.append(np.float32(weights))
        return loss(np.float32(weights).astype(np.float64))

    kept = np.random.get_state()
    np.random.seed(seed)
    space = nevergrad.p.Array(init=[0] * num_experts, upper=[1.5] * num_experts, lower=[-1.5] * num_experts)
    best = nevergrad.optimizers.NGOpt(parametrization=space, budget=40).minimize(score).value
    np.random.set_state(kept)
    return np.array(seen), np.float32(best)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("num_experts", "seed"), [(5, 0), (20, 1), (20, 42)])
def test_its_candidates_and_its_result_are_those_of_the_authors_code(num_experts, seed):
    objective = Bowl()
    result = LorahubOriginal([f"expert {number}" for number in range(num_experts)], seed=seed).solve(objective)
    seen, best = authors_search(seed, objective.loss, num_experts)
    assert np.array_equal(np.float32(objective.seen), seen)
    assert list(result.weights.values()) == best.tolist()


def test_forty_candidates_are_asked_for_one_by_one_and_the_first_is_zero():
    search, asked = LorahubOriginal(NAMES), []
    while not search.stop():
        asked.append([candidate.values_BTLE.flatten().tolist() for candidate in search.ask()])
        search.tell([1.0 + len(asked)])
    assert [len(candidates) for candidates in asked] == [1] * 40
    assert asked[0] == [[0.0] * 5]


def test_a_failure_inside_nevergrad_is_named(monkeypatch):
    search = LorahubOriginal(NAMES)

    def broken():
        raise TypeError("only 0-dimensional arrays")

    monkeypatch.setattr(search._optimizer, "ask", broken)
    with pytest.raises(SearchFailed, match=r"NGOpt failed for 5 weights and 40 evaluations after 0 \(TypeError: only 0"):
        search.ask()


def test_seconds_alone_are_refused():
    with pytest.raises(WeightingError, match=r"only 3.0 seconds; give a budget too"):
        LorahubOriginal(NAMES, budget=None, seconds=3.0)


def test_without_nevergrad_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(PackageMissing, match=r"pip install 'loraweave\[search\]'"):
        LorahubOriginal(NAMES)


def test_a_search_that_is_left_early_does_not_keep_the_interpreter_from_ending():
    code = (
        "from loraweave.extensions.routers.routers.lorahub_original import LorahubOriginal\n"
        "search = LorahubOriginal(['a', 'b', 'c', 'd'])\n"
        "for loss in (1.0, 0.5):\n"
        "    search.ask()\n"
        "    search.tell([loss])\n"
        "search.ask()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_seed_that_the_authors_generator_does_not_take_is_refused():
    with pytest.raises(WeightingError, match=r"seeds below 2\*\*32"):
        LorahubOriginal("ab", seed=2**32)
