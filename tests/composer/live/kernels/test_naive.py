"""Every kernel against the mixture written out token by token; a new file in the folder is tested when it exists."""

import os
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import unit

from loraweave import registry

KERNELS = registry.names("kernels")
SIZES = st.integers(1, 5)
# Triton's interpreter takes a hundred times as long
EXAMPLES = 8 if os.environ.get("TRITON_INTERPRET") else 25


def token_by_token(x_BTI, a_SI, b_OS, w_BTS):
    """sum over s of w_s (a_s . x) b_s, one token after the other."""
    w_BTS = w_BTS.expand(*x_BTI.shape[:2], -1)
    rows = [
        torch.stack([sum(w[s] * (a_SI[s] @ x) * b_OS[:, s] for s in range(len(w))) for x, w in zip(xs, ws, strict=True)])
        for xs, ws in zip(x_BTI, w_BTS, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("learning", [True, False], ids=["weights learn", "weights are fixed"])
@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    b=SIZES,
    t=SIZES,
    i=SIZES,
    o=SIZES,
    s=SIZES,
    shared=st.tuples(st.booleans(), st.booleans()),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_equal_the_formula(product, name, learning, b, t, i, o, s, shared, zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(b, t, i), (s, i), (o, s), (1 if shared[0] else b, 1 if shared[1] else t, s)]
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if zeros:
        tensors[3] *= torch.rand(shapes[3], generator=generator) < 0.5
    values, gradients = [], []
    for function in (partial(product, name), token_by_token):
        leaves = [tensor.clone().requires_grad_(learning or index < 3) for index, tensor in enumerate(tensors)]
        y_BTO = function(*leaves)
        # a mixture without a weight has no graph
        (y_BTO.sin() + 0 * leaves[0].sum()).sum().backward()
        values.append(y_BTO)
        gradients.append([leaf.grad for leaf in leaves])
    assert values[0].shape == (b, t, o)
    assert torch.allclose(values[0], values[1], rtol=1e-10, atol=1e-10)
    for mine, theirs in list(zip(*gradients, strict=True))[: 4 if learning else 3]:
        # one that takes no part in the result has no gradient, or one of zeros
        mine, theirs = (torch.zeros((), dtype=torch.float64) if grad is None else grad for grad in (mine, theirs))
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KERNELS)
def test_the_result_has_the_dtype_of_the_input(product, name):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x, a, b = torch.ones(2, 3, 4, dtype=dtype), torch.ones(2, 4, dtype=dtype), torch.ones(5, 2, dtype=dtype)
        y_BTO = product(name, x, a, b, torch.tensor([[[0.5, -1.5]]]))
        assert y_BTO.dtype == dtype
        assert torch.equal(y_BTO, torch.full((2, 3, 5), -4.0, dtype=dtype))


@pytest.mark.parametrize("tokens", [1, 3], ids=["by row", "by token"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_sums_are_the_same_in_half_precision_below_autocast(product, name, tokens):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 4), (20, 4), (5, 20), (2, tokens, 20))
    x, a, b, w = (torch.randn(*shape, generator=generator) for shape in shapes)
    w *= torch.rand(w.shape, generator=generator) < 0.3
    with torch.autocast("cpu", torch.bfloat16):
        found = product(name, x, a, b, w)
    expected, sizes = token_by_token(x, a, b, w), token_by_token(*(each.abs() for each in (x, a, b, w)))
    # x, a and b, the hidden values, the weighted ones and the result
    assert bool(((found - expected).abs() <= 6 * unit(torch.bfloat16) * sizes).all())


@pytest.mark.parametrize("name", KERNELS)
def test_weights_are_applied_in_fp32(product, name):
    # 1 + 2^-8 is no bf16 number: rounding it first would lose it. With it, 96 becomes 96.5, and the product 9264 rounds up.
    x, a, b = (torch.full((1,) * axes, value, dtype=torch.bfloat16) for axes, value in ((3, 96.0), (2, 1.0), (2, 96.0)))
    y_BTO = product(name, x, a, b, torch.tensor([[[1 + 2.0**-8]]]))
    assert float(y_BTO) == 9280.0


@pytest.mark.parametrize("name", KERNELS)
def test_a_row_of_weight_zero_adds_nothing_even_after_an_overflow(product, name):
    x = torch.ones(1, 1, 4, dtype=torch.float16)
    a = torch.tensor([[6e4] * 4, [1.0] * 4], dtype=torch.float16)
    y_BTO = product(name, x, a, torch.ones(2, 2, dtype=torch.float16), torch.tensor([[[0.0, 1.0]]]))
    assert y_BTO.tolist() == [[[4.0, 4.0]]]


@pytest.mark.parametrize("name", KERNELS)
def test_no_rows_no_tokens_and_no_ranks_are_fine(product, name):
    for b, t, s in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
        y_BTO = product(name, torch.ones(b, t, 4), torch.ones(s, 4), torch.ones(5, s), torch.ones(1, 1, s))
        assert y_BTO.shape == (b, t, 5)
        assert not y_BTO.any()
