"""The loss at scores of 0, at collapse, and against transformers' own."""

import math

import pytest
import torch
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from loraweave.routers.losses.z import z


def test_it_is_the_square_of_log_e_where_all_scores_are_0():
    assert float(z(torch.zeros(7, 5, dtype=torch.float64))) == pytest.approx(math.log(5) ** 2)


def test_it_is_the_square_of_a_score_far_above_the_others():
    assert float(z(torch.tensor([[0.0, 30.0, 1.0]], dtype=torch.float64))) == pytest.approx(900)


def test_it_equals_that_of_transformers_in_value_and_gradient():
    scores_NE = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    own, theirs = z(scores_NE), router_z_loss_func(scores_NE[None])
    torch.testing.assert_close(own, theirs)
    torch.testing.assert_close(torch.autograd.grad(own, scores_NE), torch.autograd.grad(theirs, scores_NE))
