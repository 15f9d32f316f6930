"""magnitude_prune, breadcrumbs, dare and della against PEFT, and against entries dropped one by one."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from peft.utils import merge_utils
from rounding import rounding
from tiny_models import random_factors as factors

from loraweave.composer.merge.methods._dropout import draws
from loraweave.composer.merge.methods.breadcrumbs import breadcrumbs
from loraweave.composer.merge.methods.dare_linear import dare_linear
from loraweave.composer.merge.methods.dare_ties import dare_ties
from loraweave.composer.merge.methods.della import della
from loraweave.composer.merge.methods.magnitude_prune import magnitude_prune
from loraweave.errors import WeightingError
from loraweave.types import Factors

pytestmark = pytest.mark.usefixtures("entries_way")

WEIGHTS, SEEDS = [0.7, -0.4, 1.3], [11, 2**62 + 5, 0]
BIAS = torch.tensor([4.0, -3.0, 2.0, -1.0, 0.5])
both_dares = pytest.mark.parametrize("method", [dare_linear, dare_ties])


def whole(update: Factors) -> Factors:
    """The same with whole numbers, whose products nothing rounds, however they are summed."""
    return Factors((4 * update.a_RI).round(), (4 * update.b_OR).round())


def dense(update: Factors) -> torch.Tensor:
    return update.b_OR @ update.a_RI


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (1, 9), (6, 1), (40, 3)])
def test_magnitude_prune_is_peft_s_on_the_dense_updates(density: float, shape: tuple[int, int]) -> None:
    experts = [factors(seed, 1 + seed, *shape) for seed in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = merge_utils.magnitude_prune([dense(e) for e in experts], torch.tensor(WEIGHTS), density)
    found = magnitude_prune(experts, WEIGHTS, density=density).delta_OI
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_magnitude_prune_keeps_half_of_the_entries_unless_told_otherwise() -> None:
    update = whole(factors(0))
    assert torch.equal(magnitude_prune([update], [2.0]).delta_OI, magnitude_prune([update], [2.0], density=0.5).delta_OI)
    assert int((magnitude_prune([factors(0)], [2.0]).delta_OI != 0).sum()) == 35 // 2


def test_magnitude_prune_keeps_the_largest_by_a_sorted_list() -> None:
    update = factors(0)
    order = sorted(range(35), key=lambda i: -abs(float(dense(update).flatten()[i])))
    expected = torch.zeros(35)
    expected[order[:12]] = dense(update).flatten()[order[:12]]
    assert torch.allclose(magnitude_prune([update], [2.0], density=0.35, scale=0.25).delta_OI.flatten(), expected / 2)


def test_exactly_as_many_are_kept_when_magnitudes_are_equal() -> None:
    even = Factors(torch.ones(1, 7), torch.ones(5, 1))
    for count in range(36):
        found = magnitude_prune([even], [1.0], density=(count + 0.2) / 35 if count < 35 else 1.0).delta_OI.flatten()
        assert found.tolist() == [1.0] * count + [0.0] * (35 - count)


def test_opposite_experts_leave_exactly_nothing() -> None:
    update = factors(0)
    found = magnitude_prune([update, Factors(update.a_RI, -update.b_OR)], [0.3, 0.3]).delta_OI
    assert not found.any()


def test_a_bias_is_pruned_as_a_vector_of_its_own() -> None:
    found = magnitude_prune([factors(0, bias_O=BIAS), factors(1)], [0.5, 1.0], density=0.4)
    assert found.bias_O.tolist() == [2.0, -1.5, 0.0, 0.0, 0.0]


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


def splitmix64(seed: int, number: int) -> list[int]:
    """Steele, Lea and Flood 2014, as Java's SplittableRandom has it."""
    words = []
    for place in range(1, number + 1):
        z = (seed + place * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        words.append(z ^ (z >> 31))
    return words


def test_the_stream_is_the_published_one() -> None:
    # the first numbers of seed 1234567, which implementations are checked by
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert splitmix64(1234567, 5) == known
    assert draws(1234567, 0, (1, 20)).view(np.uint64)[0].tolist() == known


def drawn(seed: int, size: int, part: int) -> list[int]:
    """16 bits for each entry, from the stream of that seed; a bias has that of the seed plus 2^63."""
    words = splitmix64(seed + part * 2**63, (size + 3) // 4)
    return [(word >> 16 * k) & 0xFFFF for word in words for k in range(4)][:size]


def mask(seed: int, shape: tuple[int, int], density: float, part: int = 0) -> torch.Tensor:
    """Entry i is kept when its 16 bits are below density * 2^16."""
    kept = [piece < round(density * 2**16) for piece in drawn(seed, shape[0] * shape[1], part)]
    return torch.tensor(kept).view(shape)


def dropped(update: Factors, seed: int, density: float) -> torch.Tensor:
    """In float64, divided by the probability with which an entry is really kept."""
    kept = mask(seed, tuple(dense(update).shape), density)
    return dense(update).double() * kept / (round(density * 2**16) / 2**16)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (1, 9), (6, 1), (41, 3)])
def test_dare_linear_is_the_weighted_sum_of_what_is_left(density: float, shape: tuple[int, int]) -> None:
    experts = [factors(seed, 1 + seed, *shape) for seed in range(3)]
    expected = sum(0.3 * w * dropped(e, seed, density) for w, e, seed in zip(WEIGHTS, experts, SEEDS, strict=True))
    found = dare_linear(experts, WEIGHTS, seeds=SEEDS, density=density, scale=0.3).delta_OI
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_dare_ties_is_peft_s_election_and_merge_of_what_is_left(density: float, majority: str) -> None:
    experts = [factors(seed) for seed in range(3)]
    left = torch.stack([dropped(e, seed, density) for e, seed in zip(experts, SEEDS, strict=True)])
    agreeing = merge_utils.calculate_majority_sign_mask(left, majority)
    weighted = left * torch.tensor(WEIGHTS, dtype=torch.float64)[:, None, None]
    expected = merge_utils.disjoint_merge(weighted, agreeing)
    found = dare_ties(experts, WEIGHTS, seeds=SEEDS, density=density, majority=majority).delta_OI
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_dare_at_density_one_nothing_is_dropped() -> None:
    experts = [factors(seed) for seed in range(3)]
    updates = [dense(e).double() for e in experts]
    expected = sum(w * update for w, update in zip(WEIGHTS, updates, strict=True))
    found = dare_linear(experts, WEIGHTS, seeds=SEEDS, density=1.0).delta_OI
    sizes = sum(abs(w) * (e.b_OR.abs() @ e.a_RI.abs()).double() for w, e in zip(WEIGHTS, experts, strict=True))
    num_terms = sum(e.rank for e in experts) + len(experts)
    assert bool(((found.double() - expected).abs() <= rounding(num_terms, sizes)).all())
    exact = whole(experts[0])
    for method in (dare_linear, dare_ties):
        assert torch.equal(method([exact], [1.0], seeds=[3], density=1.0).delta_OI, dense(exact))


@both_dares
def test_dare_at_density_zero_nothing_is_left(method) -> None:
    found = method([factors(0)], [1.0], seeds=[3], density=0.0).delta_OI
    assert torch.equal(found, torch.zeros(5, 7))


def test_the_mean_of_dare_over_seeds_is_the_update() -> None:
    # 4,000 seeds: the standard error of an entry is |entry| * sqrt((1 - q) / q / 4000), here 3.2 % of it
    update = factors(0)
    for density in (0.2, 0.5):
        total = sum(dare_linear([update], [1.0], seeds=[seed], density=density).delta_OI for seed in range(4000))
        error = (total / 4000 - dense(update)).abs() / dense(update).abs()
        assert float(error.max()) < 4.5 * ((1 - density) / density / 4000) ** 0.5


def test_a_tiny_density_is_the_smallest_that_keeps_the_mean() -> None:
    update = Factors(torch.ones(1, 300), torch.ones(300, 1))
    found = dare_linear([update], [1.0], seeds=[8], density=1e-9).delta_OI
    assert set(found.unique().tolist()) <= {0.0, 65536.0}


@both_dares
def test_a_bias_has_a_mask_of_its_own(method) -> None:
    bias = torch.arange(1.0, 41.0)
    update = factors(0, 2, 40, 1, bias_O=bias)
    found = method([update], [1.0], seeds=[3], density=0.5)
    assert torch.allclose(found.bias_O, 2 * bias * mask(3, (1, 40), 0.5, part=1)[0])
    assert not torch.equal(found.bias_O != 0, found.delta_OI[:, 0] != 0)


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
