"""The loss where directions are all apart, where they are all one, and what it does to a stack of factors."""

import pytest
import torch

from loraweave.routers.losses.nuclear_norm import nuclear_norm


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
