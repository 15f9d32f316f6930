"""The loss of a gate that has to know the domain of its input: its least, its formula, and rows without a domain."""

from __future__ import annotations

import math

import pytest
import torch

from loraweave.extensions.recipes.losses.domain import domain


def test_it_is_log_e_where_all_experts_are_alike():
    assert float(domain(torch.zeros(3, 5, dtype=torch.float64), torch.tensor([0, 4, 2]))) == pytest.approx(math.log(5))


def test_it_is_0_where_each_has_its_own_and_the_difference_of_scores_where_it_has_another():
    scores_NE = torch.tensor([[0.0, 50.0], [50.0, 0.0]], dtype=torch.float64)
    assert float(domain(scores_NE, torch.tensor([1, 0]))) == pytest.approx(0, abs=1e-12)
    assert float(domain(scores_NE, torch.tensor([0, 1]))) == pytest.approx(50)


def test_it_is_the_mean_of_those_whose_domain_is_known():
    scores_NE = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [-math.log(math.exp(scores_NE[row, own]) / scores_NE[row].exp().sum()) for row, own in ((0, 2), (2, 1))]
    assert float(domain(scores_NE, torch.tensor([2, -1, 1]))) == pytest.approx(sum(expected) / 2, rel=1e-12)


def test_it_is_0_and_teaches_nothing_where_none_is_known():
    scores_NE = torch.ones(2, 3, requires_grad=True)
    loss = domain(scores_NE, torch.tensor([-1, -1]))
    assert float(loss.detach()) == 0
    assert not torch.autograd.grad(loss, scores_NE)[0].any()
