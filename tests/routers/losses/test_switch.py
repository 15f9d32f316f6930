"""The loss at uniform use, at collapse, and against transformers' own."""

import pytest
import torch
from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func

from loraweave.routers.losses.switch import switch


def test_it_is_1_where_all_experts_are_alike():
    assert float(switch(torch.zeros(7, 5))) == pytest.approx(1)


def test_it_is_the_number_of_experts_where_one_has_everything():
    scores_NE = torch.zeros(7, 5)
    scores_NE[:, 3] = 1e4
    assert float(switch(scores_NE)) == pytest.approx(5)


def test_it_equals_that_of_transformers_in_value_and_gradient():
    scores_NE = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    own = switch(scores_NE)
    theirs = load_balancing_loss_func(scores_NE.softmax(dim=-1)[None], scores_NE.argmax(dim=-1)[None])
    torch.testing.assert_close(own, theirs)
    torch.testing.assert_close(torch.autograd.grad(own, scores_NE), torch.autograd.grad(theirs, scores_NE))
