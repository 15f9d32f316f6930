"""The token gate's formula with each of its options, and which of them training alone has."""

import pytest
import torch
from torch.nn import functional

from loraweave.routers.recipes._gate import Call, TokenGate


def gate_of(num_experts=4, **options):
    gate = TokenGate(5, num_experts, **options).double()
    gate.reset(torch.Generator().manual_seed(0))
    with torch.no_grad():
        gate.r_EI.mul_(4)
    return gate


def inputs(*sizes, seed=1):
    return torch.randn(*sizes, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda p_E: p_E),
        ({"top_k": 2}, lambda p_E: p_E.where(p_E >= p_E.topk(2).values[1], 0) / p_E.topk(2).values.sum()),
    ],
)
def test_its_weights_are_the_formula(options, expected):
    gate, x_BTI = gate_of(**options), inputs(2, 3)
    w_BTE = gate(x_BTI, Call()).w_BTE
    for x_I, w_E in zip(x_BTI.flatten(0, 1), w_BTE.flatten(0, 1), strict=True):
        torch.testing.assert_close(w_E, expected(functional.softmax(gate.r_EI @ x_I, dim=0)))


def test_its_scores_are_what_the_softmax_was_taken_of():
    gate, x_BTI = gate_of(), inputs(2, 3)
    w_BTE, scores_BTE, _ = gate(x_BTI, Call())
    torch.testing.assert_close(scores_BTE.softmax(dim=-1), w_BTE)


@pytest.mark.parametrize("top_k", [None, 2])
def test_training_alone_has_noise(top_k):
    plain, full, x_BTI = gate_of(top_k=top_k), gate_of(top_k=top_k, noise=True), inputs(2, 7)
    torch.manual_seed(0)
    assert not torch.equal(full(x_BTI, Call()).w_BTE, plain(x_BTI, Call()).w_BTE)
    assert torch.equal(full.eval()(x_BTI, Call()).w_BTE, plain.eval()(x_BTI, Call()).w_BTE)


def test_the_noise_begins_with_a_standard_deviation_of_log_2_and_learns():
    gate, x_BTI = gate_of(noise=True), inputs(1, 3)
    assert not gate.n_EI.any()
    torch.manual_seed(0)
    scores_BTE = gate(x_BTI, Call()).scores_BTE
    torch.manual_seed(0)
    drawn_BTE = torch.randn_like(scores_BTE)
    torch.testing.assert_close(scores_BTE, x_BTI @ gate.r_EI.T + drawn_BTE * torch.tensor(2.0).double().log())
    (grad_EI,) = torch.autograd.grad(scores_BTE[..., 0].sum(), gate.n_EI)
    assert grad_EI[0].all()
    assert not grad_EI[1:].any()
