"""regmean, least_squares and fisher against dense solutions in float64, and what each minimum promises."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import dense, random_factors

from loraweave.errors import WeightingError
from loraweave.extensions.statistics import LayerStatistics
from loraweave.extensions.statistics.methods import fisher as fisher_module
from loraweave.extensions.statistics.methods.fisher import fisher
from loraweave.extensions.statistics.methods.least_squares import least_squares
from loraweave.extensions.statistics.methods.regmean import regmean
from loraweave.types import Factors

NUM_OUT, NUM_IN = 4, 6


def factors(seed, rank=2, **parts):
    return random_factors(seed, rank, NUM_OUT, NUM_IN, **parts)


def inputs(seed, count=20):
    return torch.randn(count, NUM_IN, generator=torch.Generator().manual_seed(100 + seed))


def seen(x_NI):
    return LayerStatistics(x_NI.T @ x_NI / len(x_NI), None, len(x_NI))


def with_fisher(fisher_OI, norm=None):
    return LayerStatistics(None, fisher_OI, 1, norm)


EXPERTS = [factors(0, 1), factors(1, 3), factors(2)]
WEIGHTS = [0.5, 2.0, 1.0]
INPUTS = [inputs(seed) for seed in range(3)]
FISHERS = [torch.rand(NUM_OUT, NUM_IN, generator=torch.Generator().manual_seed(seed)) ** 4 for seed in (10, 11, 12)]
# each method with what it is told of three experts, of which least squares sees more inputs than directions
METHODS = [(method, [seen(x) for x in INPUTS]) for method in (regmean, least_squares)]
METHODS.append((fisher, [with_fisher(each) for each in FISHERS]))
every_method = pytest.mark.parametrize(("method", "statistics"), METHODS, ids=["regmean", "least_squares", "fisher"])


def mean_of(experts, weights):
    return sum(w * dense(e) for w, e in zip(weights, experts, strict=True)) / sum(weights)


def gives_back(found, experts, xs):
    """Whether an update acts on each expert's inputs as that expert does."""
    pairs = [(x.double() @ found.T, x.double() @ dense(e).T) for e, x in zip(experts, xs, strict=True)]
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in pairs)


@every_method
def test_experts_that_saw_the_same_are_averaged_by_weight(method, statistics):
    found = method(EXPERTS, WEIGHTS, statistics=statistics[:1] * 3)
    assert torch.allclose(dense(found), mean_of(EXPERTS, WEIGHTS), rtol=1e-4, atol=1e-5)


@every_method
def test_biases_are_averaged_by_weight_an_absent_one_being_zeros(method, statistics):
    bias_O = torch.arange(4.0)
    found = method([factors(0, bias_O=bias_O), factors(1)], [3.0, 1.0], statistics=statistics[:2])
    assert torch.allclose(found.bias_O, 0.75 * bias_O)
    assert method(EXPERTS, WEIGHTS, statistics=statistics).bias_O is None


@every_method
def test_an_expert_without_the_layer_is_zero_where_it_was_recorded_and_left_out_where_not(method, statistics):
    left_out = method([EXPERTS[0], None], [1.0, 1.0], statistics=[statistics[0], None])
    assert torch.allclose(dense(left_out), dense(EXPERTS[0]), rtol=1e-4, atol=1e-5)
    recorded = method([EXPERTS[0], None], [1.0, 1.0], statistics=statistics[:2])
    for rank in (0, 1):
        zero = Factors(torch.zeros(rank, NUM_IN), torch.zeros(NUM_OUT, rank))
        found = method([EXPERTS[0], zero], [1.0, 1.0], statistics=statistics[:2])
        assert torch.allclose(dense(found), dense(recorded), rtol=1e-4, atol=1e-5)


GRAM, FISHER = METHODS[0][1], METHODS[2][1]


@pytest.mark.parametrize(
    ("method", "weights", "statistics", "message"),
    [
        (regmean, WEIGHTS, [GRAM[0], None, GRAM[2]], r"gram_II of expert 1.*what=\('gram',\)"),
        (least_squares, WEIGHTS, [*GRAM[:2], LayerStatistics(None, None, 3)], "needs gram_II of expert 2"),
        (regmean, WEIGHTS, [LayerStatistics(torch.eye(3), None, 1)] * 3, r"\(3, 3\), but the layer \(6, 6\)"),
        (fisher, WEIGHTS, [None] * 3, "fisher_OI of expert 0"),
        (fisher, WEIGHTS, [FISHER[0], GRAM[0], FISHER[0]], r"expert 1.*what=\('fisher',\)"),
        (fisher, WEIGHTS, [FISHER[0], with_fisher(torch.ones(6, 4)), FISHER[0]], r"expert 1 has shape \(6, 4\), .*\(4, 6\)"),
        (fisher, WEIGHTS, [with_fisher(torch.full((4, 6), torch.nan)), *FISHER[1:]], "NaN"),
        (fisher, [1.0, -0.5, 1.0], FISHER, r"-0\.5 of expert 1 is below 0"),
    ],
)
def test_weights_and_statistics_that_do_not_fit_are_refused_with_their_expert(method, weights, statistics, message):
    with pytest.raises(WeightingError, match=message):
        method(EXPERTS, weights, statistics=statistics)


def densely(experts, weights, xs, off_diagonal):
    """numpy, on whole matrices: W* = (sum W_e G_e)(sum G_e)^-1 with G's off-diagonal shrunk by a Hadamard product."""
    shrink = np.full((NUM_IN, NUM_IN), off_diagonal) + (1 - off_diagonal) * np.eye(NUM_IN)
    grams = [w * shrink * (x.double().numpy().T @ x.double().numpy()) / len(x) for w, x in zip(weights, xs, strict=True)]
    total = sum(dense(e).numpy() @ g for e, g in zip(experts, grams, strict=True))
    return torch.from_numpy(np.linalg.solve(sum(grams), total.T).T)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 0.95, 1.0])
def test_regmean_solves_the_normal_equations_on_the_factors(off_diagonal):
    found = regmean(EXPERTS, WEIGHTS, statistics=GRAM, off_diagonal=off_diagonal)
    assert found.rank == 6
    assert torch.allclose(dense(found), densely(EXPERTS, WEIGHTS, INPUTS, off_diagonal), rtol=1e-4, atol=1e-5)


def test_regmean_gives_the_same_for_updates_and_whole_weights():
    base = torch.randn(NUM_OUT, NUM_IN, generator=torch.Generator().manual_seed(9)).double()
    whole = [Factors(torch.eye(NUM_IN), (base + dense(e)).float()) for e in EXPERTS]
    on_updates, on_weights = (dense(regmean(each, WEIGHTS, statistics=GRAM)) for each in (EXPERTS, whole))
    assert torch.allclose(on_updates, on_weights - base, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9])
def test_regmean_gives_experts_of_axis_aligned_inputs_back_and_unseen_axes_the_mean(off_diagonal):
    # shrinking leaves subspaces of axes orthogonal
    xs = [inputs(0), inputs(1)]
    xs[0][:, 2:], xs[1][:, :2], xs[1][:, 4:] = 0.0, 0.0, 0.0
    found = dense(regmean(EXPERTS[:2], [0.2, 0.8], statistics=[seen(x) for x in xs], off_diagonal=off_diagonal))
    assert gives_back(found, EXPERTS[:2], xs)
    mean = mean_of(EXPERTS[:2], [0.2, 0.8])
    assert torch.allclose(found[:, 4:], mean[:, 4:], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[:, :4], mean[:, :4], rtol=1e-2)


@pytest.mark.parametrize("method", [partial(regmean, off_diagonal=1.0), least_squares], ids=["regmean", "least_squares"])
def test_unseen_directions_get_the_mean_by_regmean_and_the_base_by_least_squares(method):
    xs = [inputs(0, 2), inputs(1, 2)]
    found = dense(method(EXPERTS[:2], [1.0, 1.0], statistics=[seen(x) for x in xs]))
    unseen_KI = torch.linalg.svd(torch.cat(xs).double()).Vh[4:]
    wanted = 0.0 * found if method is least_squares else mean_of(EXPERTS[:2], [1.0, 1.0])
    assert torch.allclose(unseen_KI @ found.T, unseen_KI @ wanted.T, rtol=1e-4, atol=1e-5)
    # the inputs of both together are independent
    assert gives_back(found, EXPERTS[:2], xs)
    nothing = method(EXPERTS[:1], [1.0], statistics=[seen(torch.zeros(1, NUM_IN))])
    assert bool(dense(nothing).any()) == (method is not least_squares)


@pytest.mark.parametrize("method", [partial(regmean, off_diagonal=1.0), least_squares], ids=["regmean", "least_squares"])
@pytest.mark.parametrize("scale", [(1e3, 1.0, 1.0, 1e-3, 1.0, 1.0), (1e3, 1.0, 10.0, 1e-3, 1.0, 1.0)])
def test_an_input_a_million_times_larger_does_not_hide_the_others(scale, method):
    xs = [x * torch.tensor(scale) for x in INPUTS]
    found = method(EXPERTS, WEIGHTS, statistics=[seen(x) for x in xs])
    assert torch.allclose(dense(found), densely(EXPERTS, WEIGHTS, xs, 1.0), rtol=1e-3, atol=1e-3)


def test_regmean_of_one_expert_is_that_expert_whatever_it_has_seen():
    for x in (INPUTS[0], inputs(0, 2), torch.zeros(1, NUM_IN)):
        for off_diagonal in (0.9, 1.0):
            found = regmean([EXPERTS[1]], [0.3], statistics=[seen(x)], off_diagonal=off_diagonal)
            assert torch.allclose(dense(found), dense(EXPERTS[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [20, 2, 1])
def test_least_squares_is_the_solution_of_least_norm(count):
    xs = [inputs(seed, count) for seed in range(3)]
    rows = np.concatenate([np.sqrt(w / len(x)) * x.double().numpy() for w, x in zip(WEIGHTS, xs, strict=True)])
    wanted = np.concatenate(
        [np.sqrt(w / len(x)) * (x.double() @ dense(e).T).numpy() for w, x, e in zip(WEIGHTS, xs, EXPERTS, strict=True)]
    )
    found = least_squares(EXPERTS, WEIGHTS, statistics=[seen(x) for x in xs])
    assert found.rank == 6
    assert torch.allclose(dense(found), torch.from_numpy((np.linalg.pinv(rows) @ wanted).T), rtol=1e-3, atol=1e-4)


def test_least_squares_gives_experts_of_orthogonal_inputs_back():
    turn_II = torch.linalg.qr(inputs(7, NUM_IN)).Q
    xs = [inputs(0)[:, :3] @ turn_II[:3], inputs(1)[:, 3:] @ turn_II[3:]]
    assert gives_back(dense(least_squares(EXPERTS[:2], [0.2, 0.8], statistics=[seen(x) for x in xs])), EXPERTS[:2], xs)


def loss(update, experts, weights, xs):
    """sum of w |X (D - D_e)^T|^2 / n, on the inputs themselves."""
    parts = zip(experts, weights, xs, strict=True)
    return sum(w * float((x.double() @ (update - dense(e)).T).square().sum()) / len(x) for e, w, x in parts)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), counts=st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_the_loss_of_least_squares_is_never_above_that_of_averaging(seed, counts):
    experts = [factors(seed + n) for n in range(len(counts))]
    xs = [inputs(seed + n, count) for n, count in enumerate(counts)]
    weights = [1.0 + 0.5 * n for n in range(len(counts))]
    found = dense(least_squares(experts, weights, statistics=[seen(x) for x in xs]))
    assert loss(found, experts, weights, xs) <= loss(mean_of(experts, weights), experts, weights, xs) * (1 + 1e-4) + 1e-6


def by_loops(experts, weights, fishers, floor):
    result = torch.zeros(NUM_OUT, NUM_IN, dtype=torch.float64)
    for o in range(NUM_OUT):
        for i in range(NUM_IN):
            shares = [w * max(float(f[o, i]), floor) for w, f in zip(weights, fishers, strict=True)]
            result[o, i] = sum(s * dense(e)[o, i] for s, e in zip(shares, experts, strict=True)) / sum(shares)
    return result


@pytest.mark.parametrize("floor", [1e-6, 0.3])
def test_fisher_averages_each_entry_by_weight_and_fisher(floor):
    found = fisher(EXPERTS, WEIGHTS, statistics=FISHER, floor=floor)
    assert torch.allclose(dense(found), by_loops(EXPERTS, WEIGHTS, FISHERS, floor), rtol=1e-6, atol=1e-7)


def test_rows_beyond_one_block_are_the_same(monkeypatch):
    whole = fisher(EXPERTS, WEIGHTS, statistics=FISHER)
    monkeypatch.setattr(fisher_module, "BLOCK_ROWS", 3)
    assert torch.equal(fisher(EXPERTS, WEIGHTS, statistics=FISHER).delta_OI, whole.delta_OI)


def test_an_entry_that_matters_to_one_expert_alone_is_that_expert_s_and_one_that_matters_to_nobody_the_mean():
    masks = torch.zeros(2, NUM_OUT, NUM_IN)
    masks[0, 0], masks[1, 1:3] = 1.0, 1.0
    found = dense(fisher(EXPERTS[:2], [1.0, 3.0], statistics=[with_fisher(mask) for mask in masks], floor=0.0))
    expected = mean_of(EXPERTS[:2], [1.0, 3.0])
    expected[0], expected[1:3] = dense(EXPERTS[0])[0], dense(EXPERTS[1])[1:3]
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("floor", [0.0, 1e-3, 0.3])
def test_normalising_divides_the_floored_fisher_by_its_norm_over_all_layers_of_each_adapter(floor):
    norms = [2.0, 5.0, float(FISHERS[2].norm())]
    statistics = [with_fisher(FISHERS[0], 2.0), with_fisher(FISHERS[1], 5.0), FISHER[2]]
    found = fisher(EXPERTS, WEIGHTS, statistics=statistics, normalise=True, floor=floor)
    weights = [w / n for w, n in zip(WEIGHTS, norms, strict=True)]
    assert torch.allclose(dense(found), by_loops(EXPERTS, weights, FISHERS, floor), rtol=1e-6, atol=1e-7)


def test_a_norm_of_zero_is_refused_by_normalising_alone():
    statistics = [with_fisher(torch.zeros(NUM_OUT, NUM_IN), 0.0), with_fisher(FISHERS[1], 5.0)]
    with pytest.raises(WeightingError, match=r"norm of each expert's Fisher.*is 0.*leave normalise out"):
        fisher(EXPERTS[:2], [1.0, 1.0], statistics=statistics, normalise=True)
    assert fisher(EXPERTS[:2], [1.0, 1.0], statistics=statistics) is not None
