"""Losses at their least, at collapse, and as their formulas."""

from __future__ import annotations

import statistics

import pytest
import torch

from loraweave.extensions.recipes.losses.cv_squared import cv_squared
from loraweave.extensions.recipes.losses.localised import localised
from loraweave.extensions.recipes.losses.nuclear_norm import nuclear_norm
from loraweave.extensions.recipes.losses.switch import switch

FIRST_B = torch.tensor([True, False, False])


def uses(own, other):
    """use_BE of four experts, for rows whose own half is the first, and twice the second."""
    return torch.tensor([[own, own, other, other], [other, other, own, own], [other, other, own, own]], dtype=torch.float64)


def test_it_is_0_where_a_row_uses_its_own_half_more_by_the_ratio_of_delta():
    assert float(localised(uses(1.1, 0.9), FIRST_B, 0.1)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("own", "other"), [(1.0, 1.0), (0.9, 1.1), (1.2, 0.8)])
def test_it_is_above_0_where_use_is_not_in_that_ratio(own, other):
    assert float(localised(uses(own, other), FIRST_B, 0.1)) > 0.005


def test_training_gives_the_own_half_more_and_so_the_most():
    scores_BE = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([scores_BE], lr=2.0)
    for _ in range(400):
        optimizer.zero_grad()
        localised(scores_BE.softmax(dim=1), FIRST_B, 0.1).backward()
        optimizer.step()
    torch.testing.assert_close(scores_BE.detach().softmax(dim=1), uses(0.275, 0.225), rtol=1e-3, atol=0)


def test_it_is_its_formula():
    use_BE = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = [
        float(use_BE[row, expert]) * (0.8 if (expert < 2) == (row == 0) else 1.2) for row in range(3) for expert in range(4)
    ]
    expected = statistics.variance(scaled) / statistics.mean(scaled) ** 2
    assert float(localised(use_BE, FIRST_B, 0.2)) == pytest.approx(expected, rel=1e-8)


def test_without_a_difference_of_halves_it_is_0_where_all_are_alike():
    assert float(localised(uses(0.25, 0.25), FIRST_B, 0.0)) == pytest.approx(0, abs=1e-12)


def test_it_is_the_number_of_all_entries_where_one_has_everything():
    use_BE = torch.zeros(3, 4)
    use_BE[1, 2] = 1
    assert float(localised(use_BE, FIRST_B, 0.1)) == pytest.approx(12)


def test_rows_of_one_kind_have_one_row_of_factors():
    use_BE = torch.rand(1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone, twice = localised(use_BE, FIRST_B[:1], 0.1), localised(use_BE.expand(2, 4), FIRST_B[:1].expand(2), 0.1)
    # 8 entries with the same deviations, twice each, over 7 instead of 4 over 3
    assert float(twice) == pytest.approx(float(alone) * (2 / 7) / (1 / 3), rel=1e-8)


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


def test_it_is_the_number_of_rows_where_they_are_orthogonal():
    rows_SI = torch.linalg.qr(torch.randn(7, 4, generator=torch.Generator().manual_seed(0))).Q.T
    lengths = torch.tensor([[0.1], [3.0], [1.0], [20.0]])
    assert float(nuclear_norm(lengths * rows_SI)) == pytest.approx(4.0)


def test_it_is_the_root_of_the_number_of_rows_where_they_lie_along_one_line():
    row_1I = torch.randn(1, 7, generator=torch.Generator().manual_seed(0))
    assert float(nuclear_norm(torch.tensor([[1.0], [-2.0], [0.5], [9.0]]) * row_1I)) == pytest.approx(2.0)


def test_it_is_the_trace_of_the_root_of_the_rows_products():
    a_SI = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit_SI = a_SI / a_SI.norm(dim=1, keepdim=True)
    torch.testing.assert_close(nuclear_norm(a_SI), torch.linalg.eigvalsh(unit_SI @ unit_SI.T).sqrt().sum())


def test_it_does_not_depend_on_the_order_of_members():
    a_SI = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(nuclear_norm(a_SI[[4, 5, 0, 1, 2, 3]]), nuclear_norm(a_SI))


def test_going_up_it_makes_the_effective_rank_larger():
    generator = torch.Generator().manual_seed(0)
    own_SI, row_1I = (torch.randn(rows, 6, generator=generator) for rows in (4, 1))
    a_SI = (row_1I + 0.1 * own_SI).requires_grad_()

    def effective_rank():
        share_S = torch.linalg.svdvals(a_SI.detach()).square()
        share_S = share_S / share_S.sum()
        return float((-(share_S * share_S.log()).sum()).exp())

    before = effective_rank()
    for _ in range(60):
        (grad_SI,) = torch.autograd.grad(nuclear_norm(a_SI), a_SI)
        with torch.no_grad():
            a_SI += 0.3 * grad_SI
    assert effective_rank() > before + 1


def test_rows_of_zeros_count_as_nothing_and_have_finite_gradients():
    a_SI = torch.zeros(3, 5, requires_grad=True)
    with torch.no_grad():
        a_SI[0, 2] = 4.0
    value = nuclear_norm(a_SI)
    assert float(value.detach()) == pytest.approx(1.0)
    (grad_SI,) = torch.autograd.grad(value, a_SI)
    assert grad_SI.isfinite().all()


def test_switch_is_mixtral_s_of_one_choice():
    scores_NE = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert float(switch(torch.zeros(7, 5))) == pytest.approx(1)
    p_NE, best_N = scores_NE.softmax(dim=1), scores_NE.argmax(dim=1)
    expected = 5 * sum(float((best_N == e).float().mean() * p_NE[:, e].mean()) for e in range(5))
    assert float(switch(scores_NE)) == pytest.approx(expected, rel=1e-6)
