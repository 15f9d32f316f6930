"""magnitude_prune and dare against PEFT, and against entries dropped one by one."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from drawn_entries import drawn, splitmix64
from peft.utils import merge_utils
from rounding import rounding
from tiny_models import random_factors as factors

from loraweave.composer.merge.methods._pruning import draws
from loraweave.composer.merge.methods.dare_linear import dare_linear
from loraweave.composer.merge.methods.dare_ties import dare_ties
from loraweave.extensions.methods.methods.magnitude_prune import magnitude_prune
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


def test_the_stream_is_the_published_one() -> None:
    # the first numbers of seed 1234567, which implementations are checked by
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert splitmix64(1234567, 5) == known
    assert draws(1234567, 0, (1, 20)).view(np.uint64)[0].tolist() == known


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
