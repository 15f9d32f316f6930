"""Tokens sorted by expert, in a model, against the formula."""

import torch
from torch import nn

from loraweave.composer.composer import Composer

NUM_EXPERTS = 96


class TopOne:
    """Each token of a layer's input gets the one expert that its first feature points to, with a weight of its own."""

    def weights(self, x_BTI, layer):
        index_BT1 = (x_BTI[..., :1].abs() * 1000).long() % NUM_EXPERTS
        w_BTE = torch.zeros(*x_BTI.shape[:2], NUM_EXPERTS)
        return w_BTE.scatter(2, index_BT1, x_BTI[..., 1:2].float())


def test_a_router_of_one_expert_a_token_is_its_formula_though_only_chosen_experts_are_multiplied(make_adapter):
    model = nn.Sequential(nn.Linear(256, 192)).double()
    adapters = [make_adapter(model, f"expert {n}", rank=4, targets=("0",), seed=n) for n in range(NUM_EXPERTS)]
    x_BTI = torch.randn(3, 150, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    engine = Composer(model, adapters)
    with torch.no_grad(), engine.activate(TopOne()):
        found_BTO = model(x_BTI)
        used = engine.last_weights
    told_BTE = used["0"]
    assert used.layers["0"].kernel == "sorted_tokens"
    w_BTE = TopOne().weights(x_BTI, "0").double()
    assert torch.equal(told_BTE.double(), w_BTE)
    expected_BTO = model(x_BTI).detach().clone()
    for number, adapter in enumerate(adapters):
        factors = adapter.layers["0"]
        expected_BTO += w_BTE[..., number, None] * (x_BTI @ factors.a_RI.double().T @ factors.b_OR.double().T)
    assert torch.allclose(found_BTO, expected_BTO, rtol=1e-10, atol=1e-10)
