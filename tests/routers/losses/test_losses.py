"""The loss at its least, without a difference of halves, at collapse, and as its formula."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_loss
from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func, router_z_loss_func

from loraweave.routers.losses.mixtral import mixtral
from loraweave.routers.losses.z import z


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_mixtral_is_k_where_all_experts_are_alike(top_k):
    assert float(mixtral(torch.zeros(7, 5), top_k)) == pytest.approx(top_k)


def test_z_is_the_square_of_log_e_where_all_experts_are_alike():
    assert float(z(torch.zeros(7, 5, dtype=torch.float64))) == pytest.approx(math.log(5) ** 2)


def test_where_one_has_everything_it_is_the_number_of_experts_and_z_the_square_of_its_score():
    scores_NE = torch.zeros(7, 5)
    scores_NE[:, 3] = 1e4
    assert float(mixtral(scores_NE, 2)) == float(mixtral(scores_NE, 1)) == pytest.approx(5)
    assert float(z(torch.tensor([[0.0, 30.0, 1.0]], dtype=torch.float64))) == pytest.approx(900)


LOSSES = {
    "mixtral": (lambda s_NE: mixtral(s_NE, 2), lambda s_NE: mixtral_loss((s_NE,), 4, 2)),
    "mixtral of one": (
        lambda s_NE: mixtral(s_NE, 1),
        lambda s_NE: load_balancing_loss_func(s_NE.softmax(dim=-1)[None], s_NE.argmax(dim=-1)[None]),
    ),
    "z": (z, lambda s_NE: router_z_loss_func(s_NE[None])),
}


@pytest.mark.parametrize(("own", "theirs"), LOSSES.values(), ids=LOSSES)
def test_it_equals_that_of_transformers_in_value_and_gradient(own, theirs):
    scores_NE = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found, expected = own(scores_NE), theirs(scores_NE)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, scores_NE), torch.autograd.grad(expected, scores_NE))
