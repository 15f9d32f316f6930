"""Mix-of-Show's least squares (Gu et al. 2023) against numpy's pseudo-inverse, and what its minimum promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import dense as delta

from loraweave.composer.merge.methods.least_squares import least_squares
from loraweave.composer.merge.statistics import LayerStatistics
from loraweave.errors import WeightingError
from loraweave.types import Factors

NUM_OUT, NUM_IN = 4, 6


def factors(seed, rank=2):
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, NUM_IN, generator=generator), torch.randn(NUM_OUT, rank, generator=generator))


def inputs(seed, count=20):
    return torch.randn(count, NUM_IN, generator=torch.Generator().manual_seed(100 + seed))


def seen(x_NI):
    return LayerStatistics(x_NI.T @ x_NI / len(x_NI), None, len(x_NI))


def loss(update, experts, weights, xs):
    """sum of w |X (D - D_e)^T|^2 / n, on the inputs themselves."""
    parts = zip(experts, weights, xs, strict=True)
    return sum(w * float((x.double() @ (update - delta(e)).T).square().sum()) / len(x) for e, w, x in parts)


EXPERTS = [factors(0, 1), factors(1, 3), factors(2)]
WEIGHTS = [0.5, 2.0, 1.0]


@pytest.mark.parametrize("count", [20, 2, 1])
def test_it_is_the_solution_of_least_norm(count):
    xs = [inputs(seed, count) for seed in range(3)]
    rows = np.concatenate([np.sqrt(w / len(x)) * x.double().numpy() for w, x in zip(WEIGHTS, xs, strict=True)])
    wanted = np.concatenate(
        [np.sqrt(w / len(x)) * (x.double() @ delta(e).T).numpy() for w, x, e in zip(WEIGHTS, xs, EXPERTS, strict=True)]
    )
    expected = torch.from_numpy((np.linalg.pinv(rows) @ wanted).T)
    found = least_squares(EXPERTS, WEIGHTS, statistics=[seen(x) for x in xs])
    assert found.rank == 6
    assert torch.allclose(delta(found), expected, rtol=1e-3, atol=1e-4)


def test_one_concept_with_inputs_of_full_rank_is_recovered():
    found = least_squares([EXPERTS[1]], [0.7], statistics=[seen(inputs(0))])
    assert torch.allclose(delta(found), delta(EXPERTS[1]), rtol=1e-4, atol=1e-5)


def test_orthogonal_inputs_give_each_concept_back_on_its_own():
    turn_II = torch.linalg.qr(inputs(7, NUM_IN)).Q
    xs = [inputs(0)[:, :3] @ turn_II[:3], inputs(1)[:, 3:] @ turn_II[3:]]
    found = delta(least_squares(EXPERTS[:2], [0.2, 0.8], statistics=[seen(x) for x in xs]))
    for expert, x in zip(EXPERTS, xs, strict=False):
        assert torch.allclose(x.double() @ found.T, x.double() @ delta(expert).T, rtol=1e-4, atol=1e-4)


def test_what_nobody_has_seen_is_left_to_the_base():
    xs = [inputs(0, 2), inputs(1, 2)]
    found = delta(least_squares(EXPERTS[:2], [1.0, 1.0], statistics=[seen(x) for x in xs]))
    unseen_KI = torch.linalg.svd(torch.cat(xs).double()).Vh[4:]
    assert torch.allclose(unseen_KI @ found.T, torch.zeros(2, NUM_OUT, dtype=torch.float64), atol=1e-5)
    nothing = least_squares(EXPERTS[:1], [1.0], statistics=[seen(torch.zeros(1, NUM_IN))])
    assert not delta(nothing).any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), counts=st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_its_loss_is_never_above_that_of_averaging(seed, counts):
    experts = [factors(seed + n) for n in range(len(counts))]
    xs = [inputs(seed + n, count) for n, count in enumerate(counts)]
    weights = [1.0 + 0.5 * n for n in range(len(counts))]
    found = delta(least_squares(experts, weights, statistics=[seen(x) for x in xs]))
    mean = sum(w * delta(e) for w, e in zip(weights, experts, strict=True)) / sum(weights)
    assert loss(found, experts, weights, xs) <= loss(mean, experts, weights, xs) * (1 + 1e-4) + 1e-6


def test_a_scale_that_differs_by_input_changes_nothing_of_the_minimum():
    scale_I = torch.tensor([1e3, 1.0, 10.0, 1e-3, 1.0, 1.0])
    xs = [inputs(seed) * scale_I for seed in range(3)]
    found = delta(least_squares(EXPERTS, WEIGHTS, statistics=[seen(x) for x in xs]))
    grams = [w * x.double().T @ x.double() / len(x) for w, x in zip(WEIGHTS, xs, strict=True)]
    total = sum(delta(e) @ g for e, g in zip(EXPERTS, grams, strict=True))
    assert torch.allclose(found, torch.linalg.solve(sum(grams), total, left=False), rtol=1e-3, atol=1e-3)


def test_missing_statistics_are_refused():
    statistics = [seen(inputs(seed)) for seed in range(3)]
    with pytest.raises(WeightingError, match="the method needs gram_II of expert 2"):
        least_squares(EXPERTS, WEIGHTS, statistics=[*statistics[:2], LayerStatistics(None, None, 3)])
