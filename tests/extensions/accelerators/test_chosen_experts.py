"""Experts that each meet only their own tokens, and one token only its own experts, against the formula."""

import math

import pytest
import torch
from rounding import unit
from summed_experts import NAMES, RANKS, Example, assert_gradients_are_the_formulas

from loraweave.extensions.accelerators.kernels import chosen_experts
from loraweave.extensions.accelerators.kernels.chosen_experts import ChosenProduct


def chosen_product(example, y=None):
    return ChosenProduct.apply(y, *example.values, example.ranks)


def test_experts_with_their_own_tokens_have_the_values_and_gradients_of_the_formula():
    example = Example().learning()
    assert_gradients_are_the_formulas(
        chosen_product(example), example, NAMES, torch.randn(7, 4, dtype=torch.float64), skips=True
    )


@pytest.mark.parametrize("learning", NAMES)
def test_each_gradient_can_be_asked_for_alone(learning):
    example = Example().learning(learning)
    assert_gradients_are_the_formulas(
        chosen_product(example), example, (learning,), torch.ones(7, 4, dtype=torch.float64), skips=True
    )


def test_it_adds_into_the_given_memory_and_passes_its_gradient_on():
    example, start = Example(), torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    y = start * 1.0
    made = chosen_product(example, y)
    assert made.data_ptr() == y.data_ptr()
    torch.testing.assert_close(made, start.detach() + example.formula())
    made.sum().backward()
    assert torch.equal(start.grad, torch.ones(7, 4, dtype=torch.float64))


def test_tokens_that_all_chose_nothing_have_no_update():
    example = Example()
    example.w = torch.zeros_like(example.w)
    assert not chosen_product(example).any()


def test_products_run_in_the_dtype_of_the_factors_and_weights_count_in_their_own():
    example, exact = Example(), Example()
    for name in NAMES:
        half = getattr(example, name).to(torch.float32 if name == "w" else torch.bfloat16)
        setattr(example, name, half)
        setattr(exact, name, half.double())
    made = chosen_product(example)
    assert made.dtype is torch.bfloat16
    expected = exact.formula()
    for name in NAMES:
        setattr(exact, name, getattr(exact, name).abs())
    # hidden values, weighted ones, their products and the sum of the experts so far
    assert bool(((made.double() - expected).abs() <= unit(torch.bfloat16) * (3 + len(RANKS)) * exact.formula()).all())


@pytest.fixture
def sorted_calls(monkeypatch):
    """How often tokens were sorted, where that always pays."""
    calls, apply = [], ChosenProduct.apply
    monkeypatch.setattr(chosen_experts, "choosing_pays", lambda work, learns: True)
    monkeypatch.setattr(ChosenProduct, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_without_gradients_it_equals_the_formula(num_tokens, skips, monkeypatch):
    monkeypatch.setattr(chosen_experts, "skipping_pays", lambda *args: skips)
    example = Example(num_tokens=num_tokens, all_chosen=num_tokens == 1)
    torch.testing.assert_close(example.added(), example.formula())
    torch.testing.assert_close(example.added(torch.ones(num_tokens, 4, dtype=torch.float64)), 1 + example.formula())


def test_one_token_reads_no_factors_of_an_expert_without_weight(monkeypatch):
    monkeypatch.setattr(chosen_experts, "skipping_pays", lambda *args: True)
    example = Example(num_tokens=1, all_chosen=True)
    example.w[0, 1] = 0.0
    expected = 1 + example.formula()
    without_S = example.w[0, example.owner_S] == 0
    example.a[without_S], example.b[without_S] = math.nan, math.nan
    # as a layer gives it, with an axis for rows
    y = torch.ones(1, 1, 4, dtype=torch.float64)
    made = example.added(y)
    assert made is y
    torch.testing.assert_close(made[0], expected)


def test_tokens_are_sorted_where_that_pays_with_the_gradients_of_the_formula(sorted_calls):
    example = Example().learning()
    assert_gradients_are_the_formulas(example.added(), example, NAMES, torch.randn(7, 4, dtype=torch.float64), skips=True)
    assert sorted_calls


def test_a_weight_of_zero_that_learns_keeps_its_gradient(sorted_calls):
    example = Example().learning()
    made, by_hand = (torch.autograd.grad(y.sum(), example.w)[0] for y in (example.added(most=4), example.formula()))
    assert not sorted_calls
    torch.testing.assert_close(made, by_hand)
    assert bool((made[example.w == 0] != 0).all())


def test_weights_that_all_tokens_share_are_never_sorted_by_token(sorted_calls):
    example = Example(one_row=True, all_chosen=True)
    torch.testing.assert_close(example.added(), example.formula())
    assert not sorted_calls
