"""Each token's one best expert of the feed-forward layers, and how the gate learns from it."""

import torch
from torch.nn import functional

from loraweave.extensions.recipes.recipes.llava_mole import LlavaMole
from loraweave.routers.recipes._gate import Call
from loraweave.routers.recipes._recipe import Site

LAYER = "model.layers.1.mlp.down_proj"


def test_the_gate_learns_by_the_probability_of_the_best_alone():
    gate = LlavaMole().gate(Site("up_proj", 5, 7), 3).double()
    gate.reset(torch.Generator().manual_seed(0))
    x_I = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad_EI,) = torch.autograd.grad(gate(x_I[None, None], Call()).w_BTE.sum(), gate.r_EI)
    p_E = functional.softmax(gate.r_EI.detach() @ x_I, dim=0)
    best = int(p_E.argmax())
    expected_E = torch.tensor([float(p_E[best]) * ((expert == best) - float(p_E[expert])) for expert in range(3)])
    torch.testing.assert_close(grad_EI, expected_E.double()[:, None] * x_I, rtol=1e-6, atol=1e-8)


def test_its_loss_is_that_of_switch_transformers(terms_of):
    batch = {"input_ids": torch.tensor([[3, 9, 27, 20, 5]])}
    terms, notes = terms_of("llava_mole", batch, balance=0.5, target_modules=(LAYER,))
    (scores_BTE,) = notes.scores.values()
    p_NE = scores_BTE[0].softmax(dim=1)
    share_E = torch.stack([(p_NE.argmax(dim=1) == expert).double().mean() for expert in range(3)])
    torch.testing.assert_close(terms["balance"], 0.5 * 3 * (share_E * p_NE.mean(dim=0)).sum())
