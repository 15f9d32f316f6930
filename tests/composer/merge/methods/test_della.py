"""della: probabilities by rank of magnitude within a row, then election and disjoint merge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import random_factors as factors

from loraweave.composer.merge.methods.della import della
from loraweave.errors import WeightingError
from loraweave.types import Factors

WEIGHTS = [0.7, -0.4, 1.3]
SEEDS = [11, 2**62 + 5, 0]


def dense(update: Factors) -> torch.Tensor:
    return update.b_OR @ update.a_RI


def magpruned(rows: list[list[float]], seed: int, density: float, epsilon: float, part: int = 0) -> list[list[float]]:
    """The authors' rule (declare-lab/della, rank_magnitude): p from density -+ epsilon by rank, kept entries over p."""
    size = len(rows) * len(rows[0])
    words = [int(word) for word in np.random.Philox(key=seed + part * 2**64).random_raw((size + 3) // 4)]
    pieces = iter([(word >> 16 * k) & 0xFFFF for word in words for k in range(4)][:size])
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


def fused(updates: list[list[list[float]]], weights: list[float], mean: bool) -> list[list[float]]:
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
def test_it_is_the_paper_s_three_steps(density: float, epsilon: float, shape: tuple[int, int]) -> None:
    experts = [factors(seed, 1 + seed, *shape) for seed in range(3)]
    pruned = [magpruned(dense(e).tolist(), s, density, epsilon) for e, s in zip(experts, SEEDS, strict=True)]
    for aggregate in ("mean", "sum"):
        expected = 1.1 * torch.tensor(fused(pruned, WEIGHTS, aggregate == "mean"), dtype=torch.float64)
        found = della(
            experts, WEIGHTS, seeds=SEEDS, density=density, epsilon=epsilon, aggregate=aggregate, scale=1.1
        ).delta_OI
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_a_window_it_drops_as_dare_does() -> None:
    from loraweave.composer.merge.methods.dare_linear import dare_linear

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


def test_equal_magnitudes_are_ranked_by_place() -> None:
    even = [[1.0, -1.0, 1.0, 1.0, -1.0, 1.0]] * 50
    update = Factors(torch.tensor([even[0]]), torch.ones(50, 1))
    expected = torch.tensor(magpruned(even, 9, 0.5, 0.3))
    assert torch.allclose(della([update], [1.0], seeds=[9], density=0.5, epsilon=0.3).delta_OI, expected)


def test_density_zero_and_one_need_no_window() -> None:
    update = factors(0)
    assert torch.equal(della([update], [1.0], seeds=[1], density=1.0).delta_OI, dense(update))
    assert torch.equal(della([update], [1.0], seeds=[1], density=0.0).delta_OI, torch.zeros(5, 7))


def test_a_bias_is_one_row() -> None:
    bias = torch.tensor([4.0, -3.0, 2.0, -1.0, 0.5])
    found = della([factors(0, bias_O=bias)], [1.0], seeds=[7], density=0.5, epsilon=0.3)
    assert torch.allclose(found.bias_O, torch.tensor(magpruned([bias.tolist()], 7, 0.5, 0.3, part=1)[0]))


def test_probabilities_outside_0_to_1_are_refused() -> None:
    for density, epsilon in ((0.1, 0.15), (0.15, 0.15), (0.9, 0.15)):
        with pytest.raises(WeightingError, match=rf"density={density} and epsilon={epsilon} give probabilities from"):
            della([factors(0)], [1.0], seeds=[0], density=density, epsilon=epsilon)
