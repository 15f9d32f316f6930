"""The sum of experts' updates with its gradients, all experts for all tokens, against the formula."""

import pytest
import torch
from summed_experts import NAMES, SHARED, Example, assert_gradients_are_the_formulas


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("form", SHARED)
def test_all_experts_for_all_tokens_have_the_values_and_gradients_of_the_formula(form, one_row):
    example = Example(form, one_row=one_row, all_chosen=True).learning()
    assert_gradients_are_the_formulas(example.expert_product(), example, NAMES, torch.randn(7, 4, dtype=torch.float64))


@pytest.mark.parametrize("learning", NAMES)
def test_each_gradient_can_be_asked_for_alone(learning):
    example = Example("one a").learning(learning)
    assert_gradients_are_the_formulas(example.expert_product(), example, (learning,), torch.ones(7, 4, dtype=torch.float64))


def test_it_adds_into_the_given_memory_and_passes_its_gradient_on():
    example, start = Example(), torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    y = start * 1.0
    made = example.expert_product(y)
    assert made.data_ptr() == y.data_ptr()
    torch.testing.assert_close(made, start.detach() + example.formula())
    made.sum().backward()
    assert torch.equal(start.grad, torch.ones(7, 4, dtype=torch.float64))


def test_a_weight_of_zero_adds_nothing_where_a_hidden_value_has_overflowed():
    example = Example()
    example.a[:2] = torch.inf
    example.w[:, 0] = 0.0
    assert bool(example.expert_product().isfinite().all())


def test_a_weight_of_zero_that_learns_keeps_its_gradient():
    example = Example().learning()
    made, by_hand = (torch.autograd.grad(y.sum(), example.w)[0] for y in (example.added(most=4), example.formula()))
    torch.testing.assert_close(made, by_hand)
    assert bool((made[example.w == 0] != 0).all())
