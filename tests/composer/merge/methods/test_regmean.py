"""RegMean (Jin et al. 2023, eq. 2) against the normal equations solved densely in float64, and its own properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import dense as delta

from loraweave.composer.merge.methods.regmean import regmean
from loraweave.composer.merge.statistics import LayerStatistics
from loraweave.errors import WeightingError
from loraweave.types import Factors

NUM_OUT, NUM_IN = 4, 6


def factors(seed, rank=2, **parts):
    generator = torch.Generator().manual_seed(seed)
    a_RI, b_OR = torch.randn(rank, NUM_IN, generator=generator), torch.randn(NUM_OUT, rank, generator=generator)
    return Factors(a_RI, b_OR, **parts)


def inputs(seed, count=20):
    return torch.randn(count, NUM_IN, generator=torch.Generator().manual_seed(100 + seed))


def seen(x_NI):
    return LayerStatistics(x_NI.T @ x_NI / len(x_NI), None, len(x_NI))


EXPERTS = [factors(0, 1), factors(1, 3), factors(2)]
WEIGHTS = [0.5, 2.0, 1.0]
INPUTS = [inputs(seed) for seed in range(3)]


def densely(experts, weights, xs, off_diagonal):
    """numpy, on whole matrices: W* = (sum W_e G_e)(sum G_e)^-1 with G's off-diagonal shrunk by a Hadamard product."""
    shrink = np.full((NUM_IN, NUM_IN), off_diagonal) + (1 - off_diagonal) * np.eye(NUM_IN)
    grams = [w * shrink * (x.double().numpy().T @ x.double().numpy()) / len(x) for w, x in zip(weights, xs, strict=True)]
    total = sum(delta(e).numpy() @ g for e, g in zip(experts, grams, strict=True))
    return torch.from_numpy(np.linalg.solve(sum(grams), total.T).T)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 0.95, 1.0])
def test_it_solves_the_normal_equations_on_the_factors(off_diagonal):
    found = regmean(EXPERTS, WEIGHTS, statistics=[seen(x) for x in INPUTS], off_diagonal=off_diagonal)
    assert found.rank == 6
    assert torch.allclose(delta(found), densely(EXPERTS, WEIGHTS, INPUTS, off_diagonal), rtol=1e-4, atol=1e-5)


def test_updates_or_whole_weights_give_the_same():
    base = torch.randn(NUM_OUT, NUM_IN, generator=torch.Generator().manual_seed(9)).double()
    whole = [Factors(torch.eye(NUM_IN), (base + delta(e)).float()) for e in EXPERTS]
    statistics = [seen(x) for x in INPUTS]
    on_updates = delta(regmean(EXPERTS, WEIGHTS, statistics=statistics))
    on_weights = delta(regmean(whole, WEIGHTS, statistics=statistics)) - base
    assert torch.allclose(on_updates, on_weights, rtol=1e-4, atol=1e-5)


def test_identical_grams_give_the_weighted_mean():
    for off_diagonal in (0.9, 1.0):
        found = regmean(EXPERTS, WEIGHTS, statistics=[seen(INPUTS[0])] * 3, off_diagonal=off_diagonal)
        mean = sum(w * delta(e) for w, e in zip(WEIGHTS, EXPERTS, strict=True)) / sum(WEIGHTS)
        assert torch.allclose(delta(found), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9])
def test_orthogonal_inputs_give_each_expert_back_on_its_own(off_diagonal):
    """Axis-aligned subspaces, which the shrinking leaves orthogonal."""
    xs = [inputs(0), inputs(1)]
    xs[0][:, 3:], xs[1][:, :3] = 0.0, 0.0
    found = delta(regmean(EXPERTS[:2], [0.2, 0.8], statistics=[seen(x) for x in xs], off_diagonal=off_diagonal))
    for expert, x in zip(EXPERTS, xs, strict=False):
        assert torch.allclose(x.double() @ found.T, x.double() @ delta(expert).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9])
def test_inputs_that_nobody_has_seen_get_the_weighted_mean(off_diagonal):
    xs = [inputs(0), inputs(1)]
    for x in xs:
        x[:, 4:] = 0.0
    found = delta(regmean(EXPERTS[:2], [1.0, 3.0], statistics=[seen(x) for x in xs], off_diagonal=off_diagonal))
    mean = 0.25 * delta(EXPERTS[0]) + 0.75 * delta(EXPERTS[1])
    assert torch.allclose(found[:, 4:], mean[:, 4:], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[:, :4], mean[:, :4], rtol=1e-2)


def test_a_direction_that_nobody_has_seen_gets_the_mean_also_when_it_is_no_axis():
    xs = [inputs(0, 2), inputs(1, 2)]
    found = delta(regmean(EXPERTS[:2], [1.0, 1.0], statistics=[seen(x) for x in xs], off_diagonal=1.0))
    unseen_KI = torch.linalg.svd(torch.cat(xs).double()).Vh[4:]
    mean = 0.5 * delta(EXPERTS[0]) + 0.5 * delta(EXPERTS[1])
    assert torch.allclose(unseen_KI @ found.T, unseen_KI @ mean.T, rtol=1e-4, atol=1e-5)
    for expert, x in zip(EXPERTS, xs, strict=False):
        assert torch.allclose(x.double() @ found.T, x.double() @ delta(expert).T, rtol=1e-4, atol=1e-4)


def test_an_input_a_million_times_larger_does_not_hide_the_others():
    scale_I = torch.tensor([1e3, 1.0, 1.0, 1e-3, 1.0, 1.0])
    xs = [x * scale_I for x in INPUTS]
    found = regmean(EXPERTS, WEIGHTS, statistics=[seen(x) for x in xs], off_diagonal=1.0)
    expected = densely(EXPERTS, WEIGHTS, xs, 1.0)
    assert torch.allclose(delta(found), expected, rtol=1e-3, atol=1e-3)


def test_one_expert_alone_is_itself_whatever_it_has_seen():
    for x in (INPUTS[0], inputs(0, 2), torch.zeros(1, NUM_IN)):
        for off_diagonal in (0.9, 1.0):
            found = regmean([EXPERTS[1]], [0.3], statistics=[seen(x)], off_diagonal=off_diagonal)
            assert torch.allclose(delta(found), delta(EXPERTS[1]), rtol=1e-4, atol=1e-5)


def test_biases_are_averaged_by_weight():
    bias_O = torch.arange(4.0)
    found = regmean([factors(0, bias_O=bias_O), factors(1)], [3.0, 1.0], statistics=[seen(x) for x in INPUTS[:2]])
    assert torch.allclose(found.bias_O, 0.75 * bias_O)


def test_an_expert_without_the_layer_is_zero_where_it_was_recorded_and_left_out_where_not():
    statistics = [seen(x) for x in INPUTS[:2]]
    zero = Factors(torch.zeros(1, NUM_IN), torch.zeros(NUM_OUT, 1))
    recorded = regmean([EXPERTS[0], None], [1.0, 1.0], statistics=statistics)
    assert torch.allclose(delta(recorded), densely([EXPERTS[0], zero], [1.0, 1.0], INPUTS[:2], 0.9), rtol=1e-4, atol=1e-5)
    left_out = regmean([EXPERTS[0], None], [1.0, 1.0], statistics=[statistics[0], None])
    assert torch.allclose(delta(left_out), delta(EXPERTS[0]), rtol=1e-4, atol=1e-5)


def test_rank_zero_takes_part_as_a_zero_update():
    empty = Factors(torch.zeros(0, NUM_IN), torch.zeros(NUM_OUT, 0))
    found = regmean([EXPERTS[0], empty], [1.0, 1.0], statistics=[seen(x) for x in INPUTS[:2]])
    zero = Factors(torch.zeros(1, NUM_IN), torch.zeros(NUM_OUT, 1))
    assert torch.allclose(delta(found), densely([EXPERTS[0], zero], [1.0, 1.0], INPUTS[:2], 0.9), rtol=1e-4, atol=1e-5)


def test_statistics_that_are_missing_or_do_not_fit_are_refused():
    statistics = [seen(x) for x in INPUTS]
    with pytest.raises(WeightingError, match=r"gram_II of expert 1.*what=\('gram',\)"):
        regmean(EXPERTS, WEIGHTS, statistics=[statistics[0], None, statistics[2]])
    with pytest.raises(WeightingError, match=r"\(3, 3\), but the layer \(6, 6\)"):
        regmean(EXPERTS[:1], [1.0], statistics=[LayerStatistics(torch.eye(3), None, 1)])
