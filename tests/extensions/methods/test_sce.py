"""SCE against a loop written from its definition."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import random_factors as factors

from loraweave.extensions.methods.methods.sce import sce
from loraweave.types import Factors

pytestmark = pytest.mark.usefixtures("entries_way")


def dense(update: Factors) -> torch.Tensor:
    return update.b_OR @ update.a_RI


def selected(rows: list[list[float]], density: float) -> list[float]:
    """FuseChat's SCE as mergekit's sce.py counts it, in double precision and without its two floors of 1e-6."""
    columns = list(zip(*rows, strict=True))
    variances = [sum((x - sum(c) / len(c)) ** 2 for x in c) / len(c) for c in columns]
    if density < 1:
        count = int(sum(v > 0 for v in variances) * density)
        chosen = set(sorted(range(len(columns)), key=lambda i: (-variances[i], i))[:count])
        columns = [c if i in chosen else (0.0,) * len(c) for i, c in enumerate(columns)]
    squares = [sum(x * x for x in row) for row in zip(*columns, strict=True)]
    shares = [s / (sum(squares) or 1) for s in squares]
    result = []
    for column in columns:
        sign = 1 if math.fsum(column) >= 0 else -1
        agreeing = [(c, x) for c, x in zip(shares, column, strict=True) if x * sign > 0]
        result.append(sum(c * x for c, x in agreeing) / (sum(c for c, _ in agreeing) or 1))
    return result


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (1, 9), (6, 1), (40, 3)])
def test_sce_is_the_definition_on_weighted_updates(density: float, shape: tuple[int, int]) -> None:
    experts, weights = [factors(seed, 1 + seed, *shape) for seed in range(3)], [0.7, -0.4, 1.3]
    rows = [[w * x for x in dense(e).flatten().tolist()] for w, e in zip(weights, experts, strict=True)]
    expected = 0.5 * torch.tensor(selected(rows, density), dtype=torch.float64)
    found = sce(experts, weights, density=density, scale=0.5).delta_OI.flatten()
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_sce_by_hand() -> None:
    # variances 1, 4, 0, 9: half of the three that vary is one entry, the last; shares 1/17 and 16/17, signs agree
    left = Factors(torch.tensor([[1.0, 2.0, 5.0, -2.0]]), torch.ones(1, 1))
    right = Factors(torch.tensor([[3.0, -2.0, 5.0, -8.0]]), torch.ones(1, 1))
    found = sce([left, right], [1.0, 1.0], density=0.5).delta_OI
    assert torch.allclose(found, torch.tensor([[0.0, 0.0, 0.0, (-2 * 1 - 8 * 16) / 17]]))


def test_sce_merges_small_updates_as_large_ones_do() -> None:
    # LoRA updates have mean squares far below 1e-6, and variances that fp32 could not hold
    experts = [factors(0), factors(1)]
    small = [Factors(e.a_RI * 1e-13, e.b_OR * 1e-13) for e in experts]
    large_OI, small_OI = (sce(group, [1.0, 1.0], density=0.4).delta_OI for group in (experts, small))
    assert torch.allclose(small_OI * 1e26, large_OI, rtol=1e-4, atol=1e-5)


def test_sce_gives_one_expert_or_several_of_the_same_back() -> None:
    update = factors(0)
    assert torch.allclose(sce([update], [1.0]).delta_OI, dense(update))
    assert torch.allclose(sce([update] * 3, [1.0] * 3).delta_OI, dense(update))
    assert torch.allclose(sce([None, update], [1.0, 0.5]).delta_OI, dense(update) / 2)


def test_sce_keeps_the_positive_side_of_opposite_experts() -> None:
    update = factors(0)
    opposite = Factors(update.a_RI, -update.b_OR)
    assert torch.allclose(sce([update, opposite], [1.0, 1.0], density=1.0).delta_OI, dense(update).abs())


def test_a_bias_is_a_tensor_of_its_own() -> None:
    left, right = torch.tensor([4.0, -3.0, 2.0, -1.0, 0.5]), torch.tensor([1.0, -3.5, 0.0, -1.0, 3.0])
    found = sce([factors(0, bias_O=left), factors(1, bias_O=right), factors(2)], [1.0] * 3, density=0.4)
    expected = selected([left.tolist(), right.tolist(), [0.0] * 5], 0.4)
    assert torch.allclose(found.bias_O, torch.tensor(expected))
