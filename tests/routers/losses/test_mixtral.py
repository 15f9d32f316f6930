"""The loss at uniform use, at collapse, and against transformers' own."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from loraweave.routers.losses.mixtral import mixtral


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_it_is_k_where_all_experts_are_alike(top_k):
    assert float(mixtral(torch.zeros(7, 5), top_k)) == pytest.approx(top_k)


def test_it_is_the_number_of_experts_where_one_has_everything():
    scores_NE = torch.zeros(7, 5)
    scores_NE[:, 3] = 1e4
    assert float(mixtral(scores_NE, 2)) == pytest.approx(5.0)


def test_it_equals_that_of_transformers_in_value_and_gradient():
    scores_NE = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    own, theirs = mixtral(scores_NE, 2), load_balancing_loss_func((scores_NE,), 4, 2)
    torch.testing.assert_close(own, theirs)
    torch.testing.assert_close(torch.autograd.grad(own, scores_NE), torch.autograd.grad(theirs, scores_NE))
