"""breadcrumbs and della against entries dropped one by one."""

from __future__ import annotations

import math

import pytest
import torch
from drawn_entries import drawn
from tiny_models import random_factors as factors

from loraweave.composer.merge.methods.dare_linear import dare_linear
from loraweave.errors import WeightingError
from loraweave.extensions.methods.methods.breadcrumbs import breadcrumbs
from loraweave.extensions.methods.methods.della import della
from loraweave.types import Factors

pytestmark = pytest.mark.usefixtures("entries_way")

WEIGHTS, SEEDS = [0.7, -0.4, 1.3], [11, 2**62 + 5, 0]
BIAS = torch.tensor([4.0, -3.0, 2.0, -1.0, 0.5])


def whole(update: Factors) -> Factors:
    """The same with whole numbers, whose products nothing rounds, however they are summed."""
    return Factors((4 * update.a_RI).round(), (4 * update.b_OR).round())


def dense(update: Factors) -> torch.Tensor:
    return update.b_OR @ update.a_RI


def middle_entries(values: list[float], density: float, gamma: float) -> list[float]:
    """mergekit's counts (sparsify.py, magnitude outliers) on a sorted list, of equal magnitudes the earlier first."""
    size = len(values)
    target, num_outliers = int(density * size), int(gamma * size)
    num_small = size - target - num_outliers
    if num_small < 0:
        num_outliers, num_small = num_outliers + num_small, 0
    order = sorted(range(size), key=lambda i: (-abs(values[i]), i))
    keep = set(order[num_outliers : size - num_small])
    return [value if i in keep else 0.0 for i, value in enumerate(values)]


@pytest.mark.parametrize("density", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_breadcrumbs_is_the_weighted_sum_of_the_middle_entries(density: float, gamma: float) -> None:
    experts, weights = [factors(0), factors(1, 2), factors(2)], [0.7, -0.4, 1.3]
    middles = [torch.tensor(middle_entries(dense(e).flatten().tolist(), density, gamma)) for e in experts]
    expected = 0.3 * sum(w * middle for w, middle in zip(weights, middles, strict=True))
    found = breadcrumbs(experts, weights, density=density, gamma=gamma, scale=0.3).delta_OI.flatten()
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_kept_entries_are_bit_for_bit_what_they_were() -> None:
    update = whole(factors(0))
    found = breadcrumbs([update], [1.0], density=0.5, gamma=0.2).delta_OI
    assert int(torch.count_nonzero(found)) == 17
    assert torch.equal(found[found != 0], dense(update)[found != 0])


def test_breadcrumbs_counts_equal_magnitudes_in_order() -> None:
    even = Factors(torch.ones(1, 10), torch.ones(1, 1))
    found = breadcrumbs([even], [1.0], density=0.5, gamma=0.2).delta_OI
    assert found.tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]


def test_a_bias_has_outliers_of_its_own() -> None:
    found = breadcrumbs([factors(0, bias_O=BIAS), factors(1)], [0.5, 1.0], density=0.4, gamma=0.2)
    assert found.bias_O.tolist() == [0.0, -1.5, 1.0, 0.0, 0.0]


def magpruned(rows: list[list[float]], seed: int, density: float, epsilon: float, part: int = 0) -> list[list[float]]:
    """The authors' rule (declare-lab/della, rank_magnitude): p from density -+ epsilon by rank, kept entries over p."""
    pieces = iter(drawn(seed, len(rows) * len(rows[0]), part))
    result = []
    for row in rows:
        order = sorted(range(len(row)), key=lambda i: (abs(row[i]), i))
        left = []
        for i, value in enumerate(row):
            step = order.index(i) / (len(row) - 1) if len(row) > 1 else 0.5
            level = round((density - epsilon + 2 * epsilon * step) * 2**16)
            left.append(value * 2**16 / level if next(pieces) < level else 0.0)
        result.append(left)
    return result


def elected(updates: list[list[list[float]]], weights: list[float], mean: bool) -> list[list[float]]:
    result = []
    for rows in zip(*updates, strict=True):
        line = []
        for entries in zip(*rows, strict=True):
            votes = [w * t for w, t in zip(weights, entries, strict=True)]
            sign = 1 if math.fsum(votes) >= 0 else -1
            agreeing = [vote for vote in votes if vote * sign > 0]
            line.append(sum(agreeing) / (len(agreeing) or 1 if mean else 1))
        result.append(line)
    return result


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.2), (0.9, 0.1), (0.4, 0.0)])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (6, 1), (41, 3)])
def test_della_is_the_paper_s_three_steps(density: float, epsilon: float, shape: tuple[int, int]) -> None:
    experts = [factors(seed, 1 + seed, *shape) for seed in range(3)]
    pruned = [magpruned(dense(e).tolist(), s, density, epsilon) for e, s in zip(experts, SEEDS, strict=True)]
    for aggregate in ("mean", "sum"):
        expected = 1.1 * torch.tensor(elected(pruned, WEIGHTS, aggregate == "mean"), dtype=torch.float64)
        found = della(
            experts, WEIGHTS, seeds=SEEDS, density=density, epsilon=epsilon, aggregate=aggregate, scale=1.1
        ).delta_OI
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_a_window_della_drops_as_dare_does() -> None:
    update = factors(0)
    found = della([update], [1.0], seeds=[5], density=0.4, epsilon=0.0).delta_OI
    assert torch.allclose(found, dare_linear([update], [1.0], seeds=[5], density=0.4).delta_OI)


def test_larger_entries_survive_more_often_and_the_mean_is_the_update() -> None:
    row = Factors(torch.tensor([[0.5, -2.0, 1.0, 4.0, -3.0]]), torch.ones(1, 1))
    runs = torch.cat([della([row], [1.0], seeds=[s], density=0.5, epsilon=0.4).delta_OI for s in range(4000)])
    survival = (runs != 0).float().mean(dim=0)
    expected = torch.tensor([0.1, 0.5, 0.3, 0.9, 0.7])
    assert float((survival - expected).abs().max()) < 4.5 * (0.25 / 4000) ** 0.5
    deviation = (runs.mean(dim=0) / dense(row)[0] - 1).abs()
    assert bool((deviation < 4.5 * ((1 - expected) / expected / 4000).sqrt()).all())


def test_della_ranks_equal_magnitudes_by_place() -> None:
    even = [[1.0, -1.0, 1.0, 1.0, -1.0, 1.0]] * 50
    update = Factors(torch.tensor([even[0]]), torch.ones(50, 1))
    expected = torch.tensor(magpruned(even, 9, 0.5, 0.3))
    assert torch.allclose(della([update], [1.0], seeds=[9], density=0.5, epsilon=0.3).delta_OI, expected)


def test_density_zero_and_one_need_no_window() -> None:
    update = whole(factors(0))
    assert torch.equal(della([update], [1.0], seeds=[1], density=1.0).delta_OI, dense(update))
    assert torch.equal(della([update], [1.0], seeds=[1], density=0.0).delta_OI, torch.zeros(5, 7))


def test_a_bias_is_one_row() -> None:
    found = della([factors(0, bias_O=BIAS)], [1.0], seeds=[7], density=0.5, epsilon=0.3)
    assert torch.allclose(found.bias_O, torch.tensor(magpruned([BIAS.tolist()], 7, 0.5, 0.3, part=1)[0]))


def test_probabilities_outside_0_to_1_are_refused() -> None:
    for density, epsilon in ((0.1, 0.15), (0.15, 0.15), (0.9, 0.15)):
        with pytest.raises(WeightingError, match=rf"density={density} and epsilon={epsilon} give probabilities from"):
            della([factors(0)], [1.0], seeds=[0], density=density, epsilon=epsilon)
