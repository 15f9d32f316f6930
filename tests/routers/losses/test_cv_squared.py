"""The loss at uniform use, at collapse, and as its formula."""

import statistics

import pytest
import torch

from loraweave.routers.losses.cv_squared import cv_squared


def test_it_is_0_where_all_experts_are_alike():
    assert float(cv_squared(torch.full((5,), 0.2, dtype=torch.float64))) == pytest.approx(0, abs=1e-12)


def test_it_is_the_number_of_experts_where_one_has_everything():
    assert float(cv_squared(torch.tensor([0.0, 0.0, 7.0, 0.0, 0.0]))) == pytest.approx(5)


def test_it_is_the_variance_over_the_squared_mean_for_any_unit():
    use = [0.3, 1.7, 0.9, 2.2, 0.1, 0.8]
    expected = statistics.variance(use) / statistics.mean(use) ** 2
    for unit in (1, 40):
        found = cv_squared(unit * torch.tensor(use, dtype=torch.float64).view(2, 3))
        assert float(found) == pytest.approx(expected, rel=1e-8)


def test_one_expert_alone_has_nothing_to_be_balanced_with():
    use_E = torch.ones(1, requires_grad=True)
    assert float(cv_squared(use_E).detach()) == 0
    assert float(torch.autograd.grad(cv_squared(use_E), use_E)[0]) == 0
