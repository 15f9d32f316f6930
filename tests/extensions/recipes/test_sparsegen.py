"""Sparsegen's closed form, against a search for the minimum and finite differences."""

from __future__ import annotations

import pytest
import torch

from loraweave.extensions.recipes.recipes.ld_mole import least_lambda, sparsegen


def minimum(u_E, lam):
    """The p of the simplex with the least |p - u|^2 - lam |p|^2, by bisection on the multiplier of sum p = 1."""
    low, high = u_E.min() - 1 + min(lam, 0), u_E.max()
    for _ in range(200):
        middle = (low + high) / 2
        # from the stationarity of the Lagrangian: (1 - lam) p = u - multiplier where p > 0
        total = ((u_E - middle).clamp_min(0) / (1 - lam)).sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    return (u_E - low).clamp_min(0) / (1 - lam)


@pytest.mark.parametrize("num_experts", [1, 2, 7])
@pytest.mark.parametrize("lam", [-20.0, -1.0, 0.0, 0.5, 0.98])
def test_it_is_the_minimum_over_the_simplex(num_experts, lam):
    draw = torch.Generator().manual_seed(num_experts)
    u_BTE = torch.randn(3, 5, num_experts, generator=draw, dtype=torch.float64)
    p_BTE = sparsegen(u_BTE, torch.full((3, 5, 1), lam, dtype=torch.float64))
    assert torch.allclose(p_BTE.sum(dim=-1), torch.ones(3, 5, dtype=torch.float64))
    for u_E, p_E in zip(u_BTE.flatten(0, 1), p_BTE.flatten(0, 1), strict=True):
        assert torch.allclose(p_E, minimum(u_E, lam), atol=1e-9)


def test_no_point_of_the_simplex_near_or_far_has_a_smaller_objective():
    draw = torch.Generator().manual_seed(0)
    u_E, lam = torch.randn(6, generator=draw, dtype=torch.float64), 0.3
    p_E = sparsegen(u_E, torch.tensor([lam], dtype=torch.float64))

    def objective(q):
        return ((q - u_E) ** 2).sum(dim=-1) - lam * (q**2).sum(dim=-1)

    far_NE = torch.rand(5000, 6, generator=draw, dtype=torch.float64)
    far_NE /= far_NE.sum(dim=-1, keepdim=True)
    near_NE = p_E + 0.001 * (far_NE - p_E)
    assert bool((objective(torch.cat([far_NE, near_NE])) > objective(p_E)).all())


def test_towards_1_the_best_gets_all_and_towards_minus_infinity_all_get_alike():
    u_BTE = torch.tensor([[[0.3, 0.31, -2.0, 0.1]]], dtype=torch.float64)
    one = sparsegen(u_BTE, torch.full((1, 1, 1), 1 - 1e-9, dtype=torch.float64))
    assert torch.allclose(one, torch.tensor([0, 1, 0, 0], dtype=torch.float64))
    alike = sparsegen(u_BTE, torch.full((1, 1, 1), -1e9, dtype=torch.float64))
    assert torch.allclose(alike, torch.full_like(alike, 0.25), atol=1e-8)


def test_gradients_are_those_of_finite_differences():
    draw = torch.Generator().manual_seed(3)
    u_BTE = torch.randn(2, 3, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    lambda_BT1 = torch.rand(2, 3, 1, generator=draw, dtype=torch.float64).mul(2).sub(1.2).requires_grad_()
    counts = (sparsegen(u_BTE, lambda_BT1) > 0).sum(dim=-1)
    assert len(set(counts.flatten().tolist())) > 1
    assert torch.autograd.gradcheck(sparsegen, (u_BTE, lambda_BT1))


def test_scores_of_minus_infinity_get_nothing_and_do_not_spoil_the_gradient():
    u_BTE = torch.tensor([[[0.2, -torch.inf, 0.4]]], dtype=torch.float64)
    lambda_BT1 = torch.zeros(1, 1, 1, dtype=torch.float64, requires_grad=True)
    p_BTE = sparsegen(u_BTE, lambda_BT1)
    assert torch.allclose(p_BTE, torch.tensor([0.4, 0, 0.6], dtype=torch.float64))
    p_BTE[..., 0].sum().backward()
    assert bool(torch.isfinite(lambda_BT1.grad).all())


@pytest.mark.parametrize("num_shares", [1, 2, 4])
def test_the_least_lambda_has_so_many_shares_and_a_little_less_has_more(num_shares):
    u_BTE = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    least_BT1 = least_lambda(u_BTE, num_shares)
    assert bool((least_BT1 < 1).all())
    assert torch.equal((sparsegen(u_BTE, least_BT1 + 1e-6) > 0).sum(dim=-1), torch.full((4, 5), num_shares))
    assert bool(((sparsegen(u_BTE, least_BT1 - 1e-6) > 0).sum(dim=-1) > num_shares).all())


def test_where_no_more_scores_are_there_no_lambda_is_too_low():
    u_BTE = torch.tensor([[[0.2, -torch.inf, -torch.inf]]])
    assert least_lambda(u_BTE, 2).item() == -torch.inf
