"""What must be true of the Triton kernels; test_triton.py runs this in a process with Triton's interpreter, or on a GPU."""

import os
from functools import partial

import pytest
import torch
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.composer.live.kernels._parts import Choice, row_kernels, row_sets
from loraweave.composer.live.kernels.naive import naive
from loraweave.composer.live.pages import PlacedFactors
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# of the largest value; the reference is calculated in fp64 from the rounded inputs
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# mixtures, rows on end for each, tokens, I, O and rank rows: none a multiple of a block
SHAPES = [(3, 1, 1, 17, 33, 5), (4, 1, 1, 300, 257, 21), (2, 3, 5, 65, 130, 9), (3, 1, 19, 31, 1, 40), (1, 4, 3, 16, 64, 16)]
KERNELS = ("triton_gathered", "triton_segments")


def case(shape, dtype, kernel="triton_segments"):
    """x, a, b, w and the gradient of the output; one mixture is empty and one there twice, where there are enough."""
    num_mixtures, on_end, tokens, num_inputs, num_outputs, num_ranks = shape
    # each token is a program of its own to this kernel, which the interpreter runs one after the other
    if kernel == "triton_gathered" and DEVICE == "cpu":
        tokens = min(tokens, 2)
    generator = torch.Generator().manual_seed(sum(shape))

    def random(*sizes):
        return torch.randn(*sizes, generator=generator)

    w_BTS = random(num_mixtures, 1, num_ranks) * (torch.rand(num_mixtures, 1, num_ranks, generator=generator) < 0.5)
    if num_mixtures > 2:
        w_BTS[1] = 0
        w_BTS[2] = w_BTS[0]
    x_BTI = random(num_mixtures * on_end, tokens, num_inputs)
    a_SI, b_OS = random(num_ranks, num_inputs) / num_inputs**0.5, random(num_outputs, num_ranks)
    grad_BTO = random(num_mixtures * on_end, tokens, num_outputs)
    x_BTI, a_SI, b_OS, grad_BTO = (each.to(DEVICE, dtype) for each in (x_BTI, a_SI, b_OS, grad_BTO))
    return x_BTI, a_SI, b_OS, w_BTS.to(DEVICE), grad_BTO


def exact(x_BTI, a_SI, b_OS, w_BTS, grad_BTO):
    """naive's values and gradient of x, in fp64."""
    x_BTI = x_BTI.double().requires_grad_()
    w_BTS = w_BTS.double().repeat_interleave(x_BTI.shape[0] // w_BTS.shape[0], dim=0)
    found = naive(x_BTI, a_SI.double(), b_OS.double(), w_BTS)
    found.backward(grad_BTO.double())
    assert x_BTI.grad is not None
    return found.detach(), x_BTI.grad


def close(found, wanted, dtype):
    assert found.dtype == dtype
    return float((found.double() - wanted).abs().max()) <= TOLERANCE[dtype] * max(float(wanted.abs().max()), 1.0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients_equal_naives(product, kernel, shape, dtype):
    x_BTI, a_SI, b_OS, w_BTS, grad_BTO = case(shape, dtype, kernel)
    wanted, wanted_grad = exact(x_BTI, a_SI, b_OS, w_BTS, grad_BTO)
    x_BTI.requires_grad_()
    found = product(kernel, x_BTI, a_SI, b_OS, w_BTS)
    found.backward(grad_BTO)
    assert x_BTI.grad is not None
    assert close(found.detach(), wanted, dtype)
    assert close(x_BTI.grad, wanted_grad, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_added_in_place_it_is_rounded_once(kernel, shape, dtype):
    x_BTI, a_SI, b_OS, w_BTS, y_BTO = case(shape, dtype, kernel)
    wanted, _ = exact(x_BTI, a_SI, b_OS, w_BTS, y_BTO)
    wanted += y_BTO.double()
    rows = row_sets(w_BTS)
    assert rows is not None
    base = y_BTO.clone()
    row_kernels()[kernel].of(
        [PlacedFactors(a_S1[None], b_1O[None]) for a_S1, b_1O in zip(a_SI, b_OS.T, strict=True)], rows, dtype
    ).add_(x_BTI, y_BTO)
    assert close(y_BTO, wanted, dtype)
    on_end = x_BTI.shape[0] // len(rows)
    for number, row in enumerate(rows):
        if not row:
            place = slice(number * on_end, (number + 1) * on_end)
            assert torch.equal(y_BTO[place], base[place])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_gradient_can_be_differentiated_again(product, kernel):
    x_BTI, a_SI, b_OS, w_BTS, _ = case((3, 1, 2, 5, 4, 3), torch.float32)
    found = []
    for function in (partial(product, kernel), naive):
        x = x_BTI.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(function(x, a_SI, b_OS, w_BTS).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        found.append(second)
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_input_without_tokens_or_mixtures_has_an_empty_or_no_update(product, kernel):
    x_BTI, a_SI, b_OS, w_BTS, _ = case((3, 1, 2, 5, 4, 3), torch.float32)
    assert product(kernel, x_BTI[:, :0], a_SI, b_OS, w_BTS).shape == (3, 0, 4)
    assert not product(kernel, x_BTI, a_SI, b_OS, torch.zeros_like(w_BTS)).any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_row_depends_on_another(product, kernel):
    x_BTI, a_SI, b_OS, w_BTS, _ = case((4, 1, 3, 33, 20, 9), torch.float32)
    together = product(kernel, x_BTI, a_SI, b_OS, w_BTS)
    for row in (0, 2, 3):
        assert torch.equal(product(kernel, x_BTI[row : row + 1], a_SI, b_OS, w_BTS[row : row + 1])[0], together[row])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("path", KERNELS)
def test_a_model_is_mixed_by_them_through_the_composer(path, training, monkeypatch):
    monkeypatch.setattr("loraweave.composer.live.row_weights.choose", lambda workload: Choice(path))
    generator = torch.Generator().manual_seed(0)
    factors = [Factors(*(torch.randn(*s, generator=generator) for s in ((r, 7), (5, r)))) for r in (2, 3)]
    model = nn.Sequential(nn.Linear(7, 5)).to(DEVICE)
    engine = Composer(model, [Adapter(name, "tiny", {"0": f}) for name, f in zip("ab", factors, strict=True)])
    x_BTI = torch.randn(4, 3, 7, generator=generator).to(DEVICE).requires_grad_(training)
    rows = [{"a": 1.0, "b": -0.5}, None, {"b": 2.0}, {"a": 1.0, "b": -0.5}]
    wanted = model(x_BTI).detach()
    dense_IO = [(f.b_OR @ f.a_RI).T.to(DEVICE) for f in factors]
    for number, row in enumerate(rows):
        for name, weight in (row or {}).items():
            wanted[number] += weight * x_BTI[number].detach() @ dense_IO["ab".index(name)]
    with engine.activate(rows), torch.set_grad_enabled(training):
        for _ in range(2):
            assert torch.allclose(model(x_BTI), wanted, rtol=1e-5, atol=1e-5)
