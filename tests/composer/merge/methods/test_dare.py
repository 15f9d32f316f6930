"""dare_linear and dare_ties: seeded masks, an exact rescale, and PEFT's formulas after the drop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft.utils import merge_utils
from tiny_models import random_factors as factors

from loraweave.composer.merge.methods.dare_linear import dare_linear
from loraweave.composer.merge.methods.dare_ties import dare_ties
from loraweave.types import Factors

METHODS = [dare_linear, dare_ties]
WEIGHTS = [0.7, -0.4, 1.3]
SEEDS = [11, 2**62 + 5, 0]


def dense(update: Factors) -> torch.Tensor:
    return update.b_OR @ update.a_RI


def mask(seed: int, shape: tuple[int, int], density: float, part: int = 0) -> torch.Tensor:
    """Entry i is kept when the i-th 16 bits of the Philox stream with that key are below density * 2^16."""
    size = shape[0] * shape[1]
    words = [int(word) for word in np.random.Philox(key=seed + part * 2**64).random_raw((size + 3) // 4)]
    pieces = [(word >> 16 * k) & 0xFFFF for word in words for k in range(4)][:size]
    return torch.tensor([piece < round(density * 2**16) for piece in pieces]).view(shape)


def dropped(update: Factors, seed: int, density: float) -> torch.Tensor:
    """In float64, divided by the probability with which an entry is really kept."""
    kept = mask(seed, tuple(dense(update).shape), density)
    return dense(update).double() * kept / (round(density * 2**16) / 2**16)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (1, 9), (6, 1), (41, 3)])
def test_linear_is_the_weighted_sum_of_what_is_left(density: float, shape: tuple[int, int]) -> None:
    experts = [factors(seed, 1 + seed, *shape) for seed in range(3)]
    expected = sum(0.3 * w * dropped(e, seed, density) for w, e, seed in zip(WEIGHTS, experts, SEEDS, strict=True))
    found = dare_linear(experts, WEIGHTS, seeds=SEEDS, density=density, scale=0.3).delta_OI
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_ties_is_peft_s_election_and_merge_of_what_is_left(density: float, majority: str) -> None:
    experts = [factors(seed) for seed in range(3)]
    left = torch.stack([dropped(e, seed, density) for e, seed in zip(experts, SEEDS, strict=True)])
    agreeing = merge_utils.calculate_majority_sign_mask(left, majority)
    weighted = left * torch.tensor(WEIGHTS, dtype=torch.float64)[:, None, None]
    expected = merge_utils.disjoint_merge(weighted, agreeing)
    found = dare_ties(experts, WEIGHTS, seeds=SEEDS, density=density, majority=majority).delta_OI
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_at_density_one_nothing_is_dropped() -> None:
    experts = [factors(seed) for seed in range(3)]
    updates = [dense(e).double() for e in experts]
    expected = sum(w * update for w, update in zip(WEIGHTS, updates, strict=True))
    found = dare_linear(experts, WEIGHTS, seeds=SEEDS, density=1.0).delta_OI
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6)
    for method in METHODS:
        assert torch.equal(method(experts[:1], [1.0], seeds=[3], density=1.0).delta_OI, dense(experts[0]))


@pytest.mark.parametrize("method", METHODS)
def test_at_density_zero_nothing_is_left(method) -> None:
    found = method([factors(0)], [1.0], seeds=[3], density=0.0).delta_OI
    assert torch.equal(found, torch.zeros(5, 7))


def test_the_mean_over_seeds_is_the_update() -> None:
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


@pytest.mark.parametrize("method", METHODS)
def test_a_bias_has_a_mask_of_its_own(method) -> None:
    bias = torch.arange(1.0, 41.0)
    update = factors(0, 2, 40, 1, bias_O=bias)
    found = method([update], [1.0], seeds=[3], density=0.5)
    assert torch.allclose(found.bias_O, 2 * bias * mask(3, (1, 40), 0.5, part=1)[0])
    assert not torch.equal(found.bias_O != 0, found.delta_OI[:, 0] != 0)
