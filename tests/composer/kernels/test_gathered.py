"""Rows' own factors against the formula written out row by row."""

from __future__ import annotations

import pytest
import torch

from loraweave.composer.kernels.gathered import gather, multiplied


def factors(s, i=7, o=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(s, i, generator=generator, dtype=dtype), torch.randn(o, s, generator=generator, dtype=dtype)


def row_weights(pattern):
    return torch.tensor(pattern, dtype=torch.float64)[:, None]


def expected(x, a, b, w, copies=1):
    rows = []
    for number, x_TI in enumerate(x):
        w_S = w[number // copies, 0]
        rows.append(sum(w_S[s] * torch.outer(x_TI @ a[s], b[:, s]) for s in range(len(a))))
    return torch.stack(rows)


UNEVEN = [[0, 0, 2.0, 0, 0, 0, 0, -1.5], [0.0] * 8, [0, 0.3, 0, 0, 0, 1.0, 0.7, 0]]


@pytest.mark.parametrize("tokens", [1, 3, 0])
def test_rows_with_different_numbers_of_experts_get_their_own_sums(tokens):
    a, b = factors(8)
    w = row_weights(UNEVEN)
    x = torch.randn(3, tokens, 7, dtype=torch.float64)
    rows = gather(a, b, w)
    assert rows.a_BRI.shape == (3, 3, 7)
    assert torch.allclose(multiplied(x, rows), expected(x, a, b, w), rtol=1e-12, atol=1e-12)


def test_each_mixture_counts_for_as_many_rows_on_end_as_the_batch_is_larger():
    a, b = factors(8)
    w = row_weights(UNEVEN)
    x = torch.randn(6, 4, 7, dtype=torch.float64)
    assert torch.allclose(multiplied(x, gather(a, b, w)), expected(x, a, b, w, copies=2), rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_input_is_that_of_the_formula():
    a, b = factors(8)
    w = row_weights(UNEVEN)
    grads = []
    for function in (lambda x: multiplied(x, gather(a, b, w)), lambda x: expected(x, a, b, w)):
        x = torch.linspace(-1, 1, 3 * 2 * 7, dtype=torch.float64).view(3, 2, 7).requires_grad_()
        function(x).sin().sum().backward()
        grads.append(x.grad)
    assert torch.allclose(grads[0], grads[1], rtol=1e-12, atol=1e-12)


def test_a_rank_row_of_weight_zero_adds_nothing_even_after_an_overflow():
    a, b = torch.full((4, 2), 6e4, dtype=torch.float16), torch.ones(1, 4, dtype=torch.float16)
    a[3] = 1.0
    rows = gather(a, b, torch.tensor([[[0.0, 0, 0, 1.0]], [[0.0, 0, 0, 0.0]]]))
    assert multiplied(torch.full((2, 1, 2), 2.0, dtype=torch.float16), rows).flatten().tolist() == [4.0, 0.0]


def test_weights_are_applied_in_fp32():
    # 1 + 2^-8 is no bf16 number: rounding it first would lose it
    a, b = torch.ones(4, 1, dtype=torch.bfloat16), torch.ones(1, 4, dtype=torch.bfloat16)
    w = torch.tensor([[[1 + 2.0**-8, 0, 0, 0]], [[0, 1.0, 0, 0]]])
    assert multiplied(torch.full((2, 1, 1), 96.0, dtype=torch.bfloat16), gather(a, b, w)).flatten().tolist() == [96.5, 96.0]


@pytest.mark.parametrize(
    "w",
    [
        torch.ones(1, 1, 8),
        torch.eye(8)[:3, None].expand(3, 2, 8),
        torch.zeros(3, 1, 8),
        torch.ones(2, 1, 8),
        torch.eye(8)[[0] * 40, None],
    ],
    ids=["shared", "by token", "nothing", "all experts in every row", "copies far larger than the factors"],
)
def test_nothing_is_gathered_where_it_does_not_pay(w):
    a, b = factors(8, dtype=torch.float32)
    assert gather(a, b, w) is None
