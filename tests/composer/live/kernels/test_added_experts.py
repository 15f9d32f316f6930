"""Which way a sum of experts' updates takes, and that all ways make the same."""

import math

import pytest
import torch

from loraweave.composer.live.kernels import _added_experts
from loraweave.composer.live.kernels._added_experts import add_experts
from loraweave.composer.live.kernels._chosen_product import ChosenProduct
from loraweave.composer.live.kernels._expert_product import RankRows

RANKS = (2, 3, 2)
OWNER_S = torch.arange(3).repeat_interleave(torch.tensor(RANKS))


def example(num_tokens=5):
    generator = torch.Generator().manual_seed(num_tokens)
    x_NI, a_SI, b_SO = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((num_tokens, 4), (7, 4), (7, 6))
    )
    w_NE = torch.rand(num_tokens, 3, generator=generator, dtype=torch.float64)
    return x_NI, w_NE * (w_NE == w_NE.amax(dim=1, keepdim=True)), a_SI, b_SO


def by_formula(x_NI, w_NE, a_SI, b_SO):
    a_by_expert, b_by_expert = a_SI.split(RANKS), b_SO.split(RANKS)
    updates = [x_NI @ a_RI.T @ b_RO for a_RI, b_RO in zip(a_by_expert, b_by_expert, strict=True)]
    return sum(w_N1 * update_NO for w_N1, update_NO in zip(w_NE.split(1, dim=1), updates, strict=True))


def added(values, y=None, *, most=1, rows=None):
    return add_experts(y, *values, RankRows(OWNER_S) if rows is None else rows, ranks=RANKS, most=most)


@pytest.fixture
def sorted_calls(monkeypatch):
    """How often tokens were sorted, where that always pays."""
    calls, apply = [], ChosenProduct.apply
    monkeypatch.setattr(_added_experts, "choosing_pays", lambda work, learns: True)
    monkeypatch.setattr(ChosenProduct, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_without_gradients_it_equals_the_formula(num_tokens, skips, monkeypatch):
    monkeypatch.setattr(_added_experts, "skipping_pays", lambda *args: skips)
    values = example(num_tokens)
    torch.testing.assert_close(added(values), by_formula(*values))
    y = torch.ones(num_tokens, 6, dtype=torch.float64)
    torch.testing.assert_close(added(values, y), 1 + by_formula(*values))


def test_one_token_reads_no_factors_of_an_expert_without_weight(monkeypatch):
    monkeypatch.setattr(_added_experts, "skipping_pays", lambda *args: True)
    x_NI, w_NE, a_SI, b_SO = example(1)
    expected = 1 + by_formula(x_NI, w_NE, a_SI, b_SO)
    without_S = w_NE[0, OWNER_S] == 0
    a_SI[without_S], b_SO[without_S] = math.nan, math.nan
    # as a layer gives it, with an axis for rows
    y = torch.ones(1, 1, 6, dtype=torch.float64)
    made = added((x_NI, w_NE, a_SI, b_SO), y)
    assert made is y
    torch.testing.assert_close(made[0], expected)


def test_sorted_tokens_have_the_values_and_gradients_of_the_formula(sorted_calls):
    values = [value.requires_grad_() for value in example()]
    made, expected = added(values), by_formula(*values)
    assert sorted_calls
    torch.testing.assert_close(made, expected)
    own, by_hand = (torch.autograd.grad(each.square().sum(), values) for each in (made, expected))
    torch.testing.assert_close(own[0], by_hand[0])
    torch.testing.assert_close(own[2:], by_hand[2:])


def test_a_weight_of_zero_that_learns_keeps_its_gradient(sorted_calls):
    values = [value.requires_grad_() for value in example()]
    own, by_hand = (
        torch.autograd.grad(each.sum(), values[1])[0] for each in (added(values, most=len(RANKS)), by_formula(*values))
    )
    assert not sorted_calls
    torch.testing.assert_close(own, by_hand)
    assert bool((own[values[1] == 0] != 0).all())


def test_weights_that_all_tokens_share_are_never_sorted_by_token(sorted_calls):
    x_NI, w_NE, a_SI, b_SO = example()
    torch.testing.assert_close(added((x_NI, w_NE[:1], a_SI, b_SO)), by_formula(x_NI, w_NE[:1].expand(5, 3), a_SI, b_SO))
    assert not sorted_calls
