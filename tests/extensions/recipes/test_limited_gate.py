"""The gate that chooses in more ways, and some of whose experts are left out in training."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from loraweave.errors import WeightingError
from loraweave.extensions.recipes.limited_gate import (
    LimitedGate,
    even_share,
    heaviest_within_capacity,
    top_k_of_softmax,
    within_capacity,
    without_some,
)
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


def gate_of(top_k=2, **options):
    gate = LimitedGate(5, 4, top_k=top_k, **options).double()
    gate.reset(torch.Generator().manual_seed(0))
    with torch.no_grad():
        gate.r_EI.mul_(4)
    return gate


def inputs(*sizes):
    return torch.randn(*sizes, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


OPTIONS = {
    "expert_dropout": {"expert_dropout": 0.4},
    "capacity": {"capacity": 0.5},
    "prioritised": {"capacity": 0.5, "prioritised": True},
}


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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda p_E: p_E.where(p_E >= p_E.topk(2).values[1], 0) / p_E.topk(2).values.sum()),
        ({"sums_to_one": False}, lambda p_E: p_E.where(p_E >= p_E.topk(2).values[1], 0)),
        ({"top_k": None, "top_p": 1e-9, "sums_to_one": False}, lambda p_E: p_E.where(p_E == p_E.max(), 0)),
        ({"top_k": None, "top_p": 1e-9}, lambda p_E: (p_E == p_E.max()).double()),
    ],
)
def test_its_weights_are_the_formula(options, expected):
    gate, x_BTI = gate_of(**options), inputs(2, 3)
    w_BTE = gate(x_BTI, Call()).w_BTE
    for x_I, w_E in zip(x_BTI.flatten(0, 1), w_BTE.flatten(0, 1), strict=True):
        torch.testing.assert_close(w_E, expected(functional.softmax(gate.r_EI @ x_I, dim=0)))


def test_two_ways_of_choosing_are_refused():
    with pytest.raises(WeightingError, match=r"top_k is 2 and top_p 0\.5"):
        LimitedGate(5, 4, top_k=2, top_p=0.5)


def test_no_expert_has_more_tokens_than_its_capacity():
    gate, real_BT = gate_of(capacity=0.5), torch.ones(2, 12, dtype=torch.bool)
    real_BT[1, :4] = False
    w_BTE = gate(inputs(2, 12), Call(real_BT)).w_BTE
    num_BE = ((w_BTE != 0) & real_BT[..., None]).sum(dim=1)
    # half of 12 * 2 / 4, and of 8 * 2 / 4
    assert num_BE.max(dim=1).values.tolist() == [3, 2]


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_best_k_keep_their_softmax_over_all(top_k):
    scores_BTE = scores_of(2, 3, 5)
    w_BTE = top_k_of_softmax(scores_BTE, top_k)
    for scores_E, w_E in zip(scores_BTE.flatten(0, 1), w_BTE.flatten(0, 1), strict=True):
        total = sum(math.exp(score) for score in scores_E.tolist())
        best = sorted(range(5), key=lambda expert: -float(scores_E[expert]))[:top_k]
        expected = [math.exp(score) / total if expert in best else 0.0 for expert, score in enumerate(scores_E.tolist())]
        assert w_E.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_one_best_has_a_gradient_to_all_scores_that_of_a_softmax():
    scores_BTE = scores_of(1, 1, 4).requires_grad_()
    (grad_BTE,) = torch.autograd.grad(top_k_of_softmax(scores_BTE, 1).sum(), scores_BTE)
    p_E = scores_BTE.detach().softmax(dim=-1)[0, 0]
    best = int(p_E.argmax())
    expected_E = -p_E[best] * p_E
    expected_E[best] += p_E[best]
    torch.testing.assert_close(grad_BTE[0, 0], expected_E)


def test_what_overflows_is_zero_and_what_does_not_is_as_it_was():
    w_BTE = torch.tensor([[[0.6, 0.0], [0.7, 0.3], [0.0, 0.4], [0.2, 0.9], [0.5, 0.0]]])
    made_BTE = within_capacity(w_BTE, torch.tensor([2]))
    assert torch.equal(made_BTE[0], torch.tensor([[0.6, 0], [0.7, 0.3], [0, 0.4], [0, 0], [0, 0]]))


def test_padding_takes_no_capacity():
    w_BTE, real_BT = torch.ones(1, 4, 1), torch.tensor([[False, True, False, True]])
    assert within_capacity(w_BTE, torch.tensor([1]), real_BT)[real_BT].flatten().tolist() == [1, 0]


def test_a_row_overflows_by_itself():
    together_BTE = torch.ones(2, 3, 2)
    made_BTE = within_capacity(together_BTE, torch.tensor([1, 3]))
    assert torch.equal(made_BTE[1], together_BTE[1])
    assert made_BTE[0].sum(dim=0).tolist() == [1, 1]


def test_capacity_of_the_length_is_no_limit():
    w_BTE = top_k_of_softmax(scores_of(2, 7, 3), 2)
    assert torch.equal(within_capacity(w_BTE, torch.tensor([7, 7])), w_BTE)


def test_one_best_expert_within_capacity_is_what_the_router_of_switch_transformers_makes():
    config = SwitchTransformersConfig(hidden_size=5, num_experts=3, expert_capacity=2, router_jitter_noise=0.0)
    router, x_BTI = SwitchTransformersTop1Router(config).eval(), torch.randn(2, 9, 5)
    chosen_BTE, probability_BT1, scores_BTE = router(x_BTI)
    own_BTE = within_capacity(top_k_of_softmax(scores_BTE, 1), torch.tensor([2, 2]))
    torch.testing.assert_close(own_BTE, chosen_BTE * probability_BT1)


def test_the_even_share_counts_real_tokens_and_is_rounded_up():
    real_BT = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    assert even_share(real_BT, 4, 2, 1.0).tolist() == [3, 2]
    assert even_share(real_BT, 4, 2, 1.25).tolist() == [4, 2]
