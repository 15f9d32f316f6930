"""Products added to row ranges: values and gradients against the products written one by one."""

from __future__ import annotations

import pytest
import torch

from loraweave.composer.train.passes import RowRange, add_products, naive_products

# a gap before, between and after; ranges of one token; ranks of one and seven
CASES = {
    "whole": ([RowRange(0, 4, 2.0), RowRange(4, 14, 0.5)], (3, 7)),
    "gaps": ([RowRange(1, 2, 1.0), RowRange(5, 11, -0.7)], (1, 4)),
    "one": ([RowRange(0, 14, 1.5)], (1,)),
}


def made(ranks, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    factors = [(random(rank, 5), random(6, rank)) for rank in ranks]
    return random(2, 7, 5), random(2, 7, 6), factors


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_products_one_by_one(case):
    ranges, ranks = CASES[case]
    found, gradients = [], []
    for products in (add_products, naive_products):
        x, y, factors = made(ranks)
        # the layer's own product, so that y is nobody else's
        result = products(y * 1.0, x, ranges, factors)
        (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)).sum().backward()
        found.append(result)
        gradients.append([tensor.grad for tensor in (x, y, *(t for pair in factors for t in pair))])
    assert torch.allclose(*found, atol=1e-12)
    for fast, naive in zip(*gradients, strict=True):
        assert torch.allclose(fast, naive, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    ranges, ranks = CASES["gaps"]
    x, y, factors = made(ranks)

    def products(x, y, *flat):
        return add_products(y * 1.0, x, ranges, list(zip(flat[::2], flat[1::2], strict=True)))

    assert torch.autograd.gradcheck(products, (x, y, *(tensor for pair in factors for tensor in pair)))


@pytest.mark.parametrize("layout", ["view", "transposed", "leaf"])
def test_an_output_that_may_not_be_written_to_is_left_as_it_was(layout):
    ranges, ranks = CASES["whole"]
    x, y, factors = made(ranks)
    given = {"view": (y * 1.0).view(14, 6)[:14].view(2, 7, 6), "transposed": (y * 1.0).mT.contiguous().mT, "leaf": y}[layout]
    before = given.detach().clone()
    found = add_products(given, x, ranges, factors)
    assert torch.equal(given, before)
    assert torch.allclose(found, naive_products(before, x, ranges, factors), atol=1e-12)


def test_factors_in_fp32_beside_a_base_in_bf16_get_gradients_in_fp32():
    ranges, ranks = CASES["whole"]
    x, y, _ = made(ranks, dtype=torch.bfloat16)
    _, _, factors = made(ranks, dtype=torch.float32)
    add_products(y * 1.0, x, ranges, factors).float().square().sum().backward()
    grads = [t.grad for pair in factors for t in pair]
    assert {grad.dtype for grad in grads} == {torch.float32}
    exact = [t.detach().double().requires_grad_() for pair in factors for t in pair]
    pairs = list(zip(exact[::2], exact[1::2], strict=True))
    naive_products(y.detach().double(), x.detach().double(), ranges, pairs).square().sum().backward()
    for grad, wanted in zip(grads, exact, strict=True):
        assert float((grad - wanted.grad).norm() / wanted.grad.norm()) < 2e-2
