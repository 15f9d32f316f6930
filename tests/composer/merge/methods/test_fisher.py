"""Fisher merging (Matena and Raffel 2022, eq. 3): sum of w F D / sum of w F, entry by entry, in float64 by loops."""

from __future__ import annotations

import pytest
import torch
from tiny_models import dense as delta

from loraweave.composer.merge.methods import fisher as module
from loraweave.composer.merge.methods.fisher import fisher
from loraweave.composer.merge.statistics import LayerStatistics
from loraweave.errors import WeightingError
from loraweave.types import Factors


def factors(seed, rank=2, num_out=4, num_in=5, **parts):
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, num_in, generator=generator), torch.randn(num_out, rank, generator=generator), **parts)


def seen(fisher_OI, norm=None):
    return LayerStatistics(None, fisher_OI, 1, norm)


def random_fisher(seed, num_out=4, num_in=5):
    return torch.rand(num_out, num_in, generator=torch.Generator().manual_seed(seed)) ** 4


EXPERTS = [factors(0, 1), factors(1, 3), factors(2)]
FISHERS = [random_fisher(seed) for seed in (10, 11, 12)]
WEIGHTS = [0.5, 2.0, 1.0]


def by_loops(experts, weights, fishers, floor):
    result = torch.zeros(4, 5, dtype=torch.float64)
    for o in range(4):
        for i in range(5):
            shares = [w * max(float(f[o, i]), floor) for w, f in zip(weights, fishers, strict=True)]
            result[o, i] = sum(s * delta(e)[o, i] for s, e in zip(shares, experts, strict=True)) / sum(shares)
    return result


@pytest.mark.parametrize("floor", [1e-6, 0.3])
def test_each_entry_is_the_mean_weighted_by_weight_and_fisher(floor):
    found = fisher(EXPERTS, WEIGHTS, statistics=[seen(f) for f in FISHERS], floor=floor)
    assert torch.allclose(found.delta_OI.double(), by_loops(EXPERTS, WEIGHTS, FISHERS, floor), rtol=1e-6, atol=1e-7)


def test_rows_beyond_one_block_are_the_same(monkeypatch):
    whole = fisher(EXPERTS, WEIGHTS, statistics=[seen(f) for f in FISHERS])
    monkeypatch.setattr(module, "BLOCK_ROWS", 3)
    assert torch.equal(fisher(EXPERTS, WEIGHTS, statistics=[seen(f) for f in FISHERS]).delta_OI, whole.delta_OI)


def test_equal_fisher_gives_the_weighted_mean():
    found = fisher(EXPERTS, WEIGHTS, statistics=[seen(FISHERS[0])] * 3)
    mean = sum(w * delta(e) for w, e in zip(WEIGHTS, EXPERTS, strict=True)) / sum(WEIGHTS)
    assert torch.allclose(found.delta_OI.double(), mean, rtol=1e-6, atol=1e-7)


def test_an_entry_that_matters_to_one_expert_alone_is_that_expert_s():
    mask = torch.zeros(4, 5)
    mask[0] = 1.0
    found = fisher(EXPERTS[:2], [1.0, 1.0], statistics=[seen(mask), seen(1.0 - mask)], floor=0.0)
    assert torch.allclose(found.delta_OI[0].double(), delta(EXPERTS[0])[0], rtol=1e-6)
    assert torch.allclose(found.delta_OI[1:].double(), delta(EXPERTS[1])[1:], rtol=1e-6)


def test_entries_that_matter_to_nobody_are_the_weighted_mean():
    found = fisher(EXPERTS[:2], [1.0, 3.0], statistics=[seen(torch.zeros(4, 5))] * 2, floor=0.0)
    assert torch.allclose(found.delta_OI.double(), 0.25 * delta(EXPERTS[0]) + 0.75 * delta(EXPERTS[1]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("floor", [0.0, 1e-3, 0.3])
def test_normalising_divides_the_floored_fisher_by_its_norm_over_all_layers_of_each_adapter(floor):
    norms = [2.0, 5.0, float(FISHERS[2].norm())]
    statistics = [seen(FISHERS[0], 2.0), seen(FISHERS[1], 5.0), seen(FISHERS[2])]
    found = fisher(EXPERTS, WEIGHTS, statistics=statistics, normalise=True, floor=floor)
    weights = [w / n for w, n in zip(WEIGHTS, norms, strict=True)]
    assert torch.allclose(found.delta_OI.double(), by_loops(EXPERTS, weights, FISHERS, floor), rtol=1e-6, atol=1e-7)


def test_a_norm_of_zero_is_refused_by_normalising_alone():
    statistics = [seen(torch.zeros(4, 5), 0.0), seen(FISHERS[1], 5.0)]
    with pytest.raises(WeightingError, match=r"norm of each expert's Fisher.*is 0.*leave normalise out"):
        fisher(EXPERTS[:2], [1.0, 1.0], statistics=statistics, normalise=True)
    assert fisher(EXPERTS[:2], [1.0, 1.0], statistics=statistics) is not None


def test_biases_are_averaged_by_weight_an_absent_one_being_zeros():
    bias_O = torch.tensor([1.0, 2.0, 3.0, 4.0])
    experts = [factors(0, bias_O=bias_O), factors(1)]
    found = fisher(experts, [1.0, 3.0], statistics=[seen(f) for f in FISHERS[:2]])
    assert torch.allclose(found.bias_O, 0.25 * bias_O)
    assert fisher(EXPERTS, WEIGHTS, statistics=[seen(f) for f in FISHERS]).bias_O is None


def test_an_expert_without_the_layer_is_zero_where_it_was_recorded_and_left_out_where_not():
    recorded = fisher([EXPERTS[0], None], [1.0, 1.0], statistics=[seen(FISHERS[0]), seen(FISHERS[1])])
    zero = Factors(torch.zeros(1, 5), torch.zeros(4, 1))
    expected = by_loops([EXPERTS[0], zero], [1.0, 1.0], FISHERS[:2], 1e-6)
    assert torch.allclose(recorded.delta_OI.double(), expected, rtol=1e-6, atol=1e-7)
    left_out = fisher([EXPERTS[0], None], [1.0, 1.0], statistics=[seen(FISHERS[0]), None])
    assert torch.allclose(left_out.delta_OI.double(), delta(EXPERTS[0]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ([None, None], "fisher_OI of expert 0"),
        ([seen(FISHERS[0]), LayerStatistics(torch.eye(5), None, 3)], r"expert 1.*what=\('fisher',\)"),
        ([seen(FISHERS[0]), seen(torch.ones(5, 4))], r"expert 1 has shape \(5, 4\), but the layer \(4, 5\)"),
        ([seen(torch.full((4, 5), torch.nan)), seen(FISHERS[0])], "NaN"),
    ],
)
def test_statistics_that_are_missing_or_do_not_fit_are_refused(statistics, message):
    with pytest.raises(WeightingError, match=message):
        fisher(EXPERTS[:2], [1.0, 1.0], statistics=statistics)


def test_a_negative_weight_is_refused_with_its_expert():
    statistics = [seen(f) for f in FISHERS]
    with pytest.raises(WeightingError, match=r"-0\.5 of expert 1 is below 0"):
        fisher(EXPERTS, [1.0, -0.5, 1.0], statistics=statistics)
