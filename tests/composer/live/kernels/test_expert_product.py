"""The sum of trained experts' updates against the formula, in values and gradients."""

import pytest
import torch

from loraweave.composer.live.kernels._expert_product import ExpertProduct, RankRows

RANKS = (2, 3, 2)
FORMS = {"own": (False, False), "one a": (True, False), "one b": (False, True), "both": (True, True)}


def example(shared_a, shared_b, *, one_row=False):
    generator = torch.Generator().manual_seed(0)
    ranks = (3, 3, 3) if shared_a or shared_b else RANKS
    owner_S = torch.arange(3).repeat_interleave(torch.tensor(ranks))
    own_row_S = torch.cat([torch.arange(rank) for rank in ranks])
    sizes = {"x": (5, 7), "w": (1 if one_row else 5, 3), "a": (3 if shared_a else sum(ranks), 7)}
    sizes["b"] = (3 if shared_b else sum(ranks), 4)
    tensors = {key: torch.randn(size, generator=generator, dtype=torch.float64) for key, size in sizes.items()}
    return tensors, RankRows(owner_S, own_row_S if shared_a else None, own_row_S if shared_b else None)


def by_formula(x_NI, w_NE, a, b, rows):
    """sum over e of w_ne * b_e a_e x_n, one expert after the other."""
    update_NO = x_NI.new_zeros(len(x_NI), b.shape[1])
    for expert in range(3):
        own_S = (rows.owner_S == expert).nonzero()[:, 0]
        a_RI = a[own_S if rows.a_row_S is None else rows.a_row_S[own_S]]
        b_RO = b[own_S if rows.b_row_S is None else rows.b_row_S[own_S]]
        update_NO = update_NO + w_NE[:, expert, None] * (x_NI @ a_RI.T @ b_RO)
    return update_NO


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_it_equals_the_formula_in_values_and_gradients(form, one_row):
    tensors, rows = example(*FORMS[form], one_row=one_row)
    values = [tensor.requires_grad_() for tensor in tensors.values()]
    made, expected = ExpertProduct.apply(None, *values, rows), by_formula(*values, rows)
    torch.testing.assert_close(made, expected)
    upstream = torch.randn(made.shape, dtype=torch.float64)
    for own, by_hand in zip(
        torch.autograd.grad(made, values, upstream), torch.autograd.grad(expected, values, upstream), strict=True
    ):
        torch.testing.assert_close(own, by_hand)


def test_it_adds_into_the_given_memory_and_passes_its_gradient_on():
    tensors, rows = example(False, False)
    start = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = start * 1.0
    made = ExpertProduct.apply(y, *tensors.values(), rows)
    assert made.data_ptr() == y.data_ptr()
    torch.testing.assert_close(made, start.detach() + by_formula(*tensors.values(), rows))
    made.sum().backward()
    assert torch.equal(start.grad, torch.ones(5, 4, dtype=torch.float64))


@pytest.mark.parametrize("learning", ["x", "w", "a", "b"])
def test_each_gradient_can_be_asked_for_alone(learning):
    tensors, rows = example(True, False)
    tensors[learning].requires_grad_()
    own = torch.autograd.grad(ExpertProduct.apply(None, *tensors.values(), rows).sum(), tensors[learning])[0]
    torch.testing.assert_close(own, torch.autograd.grad(by_formula(*tensors.values(), rows).sum(), tensors[learning])[0])


def test_a_weight_of_zero_adds_nothing_where_a_hidden_value_has_overflowed():
    tensors, rows = example(False, False)
    tensors["a"][:2] = torch.inf
    tensors["w"][:, 0] = 0.0
    assert bool(ExpertProduct.apply(None, *tensors.values(), rows).isfinite().all())
