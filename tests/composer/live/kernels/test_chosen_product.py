"""Experts that meet only the tokens which chose them, against the formula, in values and gradients."""

import pytest
import torch

from loraweave.composer.live.kernels._chosen_product import ChosenProduct

RANKS = (2, 3, 1, 2)
NAMES = ("x", "w", "a", "b")


def example(seed=0):
    """Seven tokens: the first chose none, and nobody chose expert 2."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"x": (7, 5), "w": (7, len(RANKS)), "a": (sum(RANKS), 5), "b": (sum(RANKS), 3)}
    tensors = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    chosen_NE = torch.rand(7, len(RANKS), generator=generator) < 0.5
    chosen_NE[0] = False
    chosen_NE[:, 2] = False
    tensors["w"] = tensors["w"] * chosen_NE
    return tensors, chosen_NE


def by_formula(x_NI, w_NE, a_SI, b_SO):
    """sum over e of w_ne * b_e a_e x_n, one token and one expert after the other."""
    starts = [sum(RANKS[:expert]) for expert in range(len(RANKS))]
    update = []
    for x_I, w_E in zip(x_NI, w_NE, strict=True):
        terms = [
            w_E[expert] * (b_SO[start : start + rank].T @ (a_SI[start : start + rank] @ x_I))
            for expert, (start, rank) in enumerate(zip(starts, RANKS, strict=True))
        ]
        update.append(torch.stack(terms).sum(dim=0))
    return torch.stack(update)


def test_it_equals_the_formula_in_values_and_gradients():
    tensors, chosen_NE = example()
    values = [tensors[name].requires_grad_() for name in NAMES]
    made, expected = ChosenProduct.apply(None, *values, RANKS), by_formula(*values)
    torch.testing.assert_close(made, expected)
    upstream = torch.randn(made.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own, by_hand = (torch.autograd.grad(each, values, upstream) for each in (made, expected))
    for name, found, wanted in zip(NAMES, own, by_hand, strict=True):
        # an expert left out has no gradient by its weight
        torch.testing.assert_close(found, wanted * chosen_NE if name == "w" else wanted)


def test_it_adds_into_the_given_memory_and_passes_its_gradient_on():
    tensors, _ = example()
    start = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    y = start * 1.0
    made = ChosenProduct.apply(y, *tensors.values(), RANKS)
    assert made.data_ptr() == y.data_ptr()
    torch.testing.assert_close(made, start.detach() + by_formula(*tensors.values()))
    made.sum().backward()
    assert torch.equal(start.grad, torch.ones(7, 3, dtype=torch.float64))


@pytest.mark.parametrize("learning", NAMES)
def test_each_gradient_can_be_asked_for_alone(learning):
    tensors, chosen_NE = example(seed=2)
    tensors[learning].requires_grad_()
    own = torch.autograd.grad(ChosenProduct.apply(None, *tensors.values(), RANKS).sum(), tensors[learning])[0]
    wanted = torch.autograd.grad(by_formula(*tensors.values()).sum(), tensors[learning])[0]
    torch.testing.assert_close(own, wanted * chosen_NE if learning == "w" else wanted)


def test_tokens_that_all_chose_nothing_have_no_update():
    tensors, _ = example()
    tensors["w"] = torch.zeros_like(tensors["w"])
    assert not ChosenProduct.apply(None, *tensors.values(), RANKS).any()


def test_products_run_in_the_dtype_of_the_factors_and_weights_count_in_their_own():
    tensors, _ = example()
    half = {name: value.to(torch.float32 if name == "w" else torch.bfloat16) for name, value in tensors.items()}
    made = ChosenProduct.apply(None, *half.values(), RANKS)
    assert made.dtype is torch.bfloat16
    torch.testing.assert_close(made.double(), by_formula(*(value.double() for value in half.values())), rtol=3e-2, atol=6e-2)
