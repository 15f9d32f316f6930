"""The gate some of whose experts are left out in training."""

import math

import pytest
import torch

from loraweave.extensions.recipes.limited_gate import LimitedGate, heaviest_within_capacity, without_some
from loraweave.routers.recipes._gate import Call


def scores_of(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_token_goes_without_the_share_of_experts_that_it_should():
    torch.manual_seed(0)
    gone = without_some(torch.zeros(1, 20_000, 6), 0.3) == -math.inf
    assert float(gone.double().mean()) == pytest.approx(0.3, abs=0.01)


def test_so_many_experts_as_are_needed_stay():
    torch.manual_seed(0)
    stays_BTE = without_some(torch.zeros(2, 500, 5), 0.999, least=2) == 0
    assert int(stays_BTE.sum(dim=-1).min()) == 2


def test_scores_that_stay_are_as_they_were():
    torch.manual_seed(0)
    scores_BTE = scores_of(2, 3, 5)
    made_BTE = without_some(scores_BTE, 0.5)
    assert torch.equal(made_BTE[made_BTE > -math.inf], scores_BTE[made_BTE > -math.inf])


def test_a_prioritised_expert_keeps_what_it_weighs_most_and_the_earlier_of_equals():
    w_BTE = torch.tensor([[[0.6, 0.0], [0.7, 0.3], [0.0, 0.4], [0.9, 0.3], [0.5, 0.0]]])
    made_BTE = heaviest_within_capacity(w_BTE, torch.tensor([2]))
    assert torch.equal(made_BTE[0], torch.tensor([[0, 0], [0.7, 0.3], [0, 0.4], [0.9, 0], [0, 0]]))


def test_padding_takes_no_capacity_by_priority():
    w_BTE, real_BT = torch.tensor([[[0.9], [0.2], [0.8], [0.4]]]), torch.tensor([[False, True, False, True]])
    made_BTE = heaviest_within_capacity(w_BTE, torch.tensor([1]), real_BT)
    assert torch.equal(made_BTE[real_BT].flatten(), torch.tensor([0, 0.4]))


def gate_of(**options):
    gate = LimitedGate(5, 4, top_k=2, **options).double()
    gate.reset(torch.Generator().manual_seed(0))
    with torch.no_grad():
        gate.r_EI.mul_(4)
    return gate


def inputs(*sizes):
    return torch.randn(*sizes, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


OPTIONS = {"expert_dropout": {"expert_dropout": 0.4}, "prioritised": {"capacity": 0.5, "prioritised": True}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_alone_leaves_experts_out(options):
    plain, limited, x_BTI = gate_of(), gate_of(**options), inputs(2, 7)
    torch.manual_seed(0)
    assert not torch.equal(limited(x_BTI, Call()).w_BTE, plain(x_BTI, Call()).w_BTE)
    assert torch.equal(limited.eval()(x_BTI, Call()).w_BTE, plain.eval()(x_BTI, Call()).w_BTE)


def test_a_token_that_goes_without_experts_still_has_k():
    gate = gate_of(expert_dropout=0.9)
    torch.manual_seed(0)
    w_BTE = gate(inputs(2, 50), Call()).w_BTE
    assert torch.equal((w_BTE != 0).sum(dim=-1), torch.full((2, 50), 2))
    torch.testing.assert_close(w_BTE.sum(dim=-1), torch.ones(2, 50, dtype=torch.float64))
