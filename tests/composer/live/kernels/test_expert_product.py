"""The sum of experts' updates with its gradients, by every way that it may take, against the formula."""

import math

import pytest
import torch
from rounding import unit

from loraweave.composer.live.kernels import _expert_product
from loraweave.composer.live.kernels._expert_product import ChosenProduct, ExpertProduct, RankRows, add_experts

RANKS = (2, 3, 1, 2)
NAMES = ("x", "w", "a", "b")
# whether all experts share a, and b
SHARED = {"own": (False, False), "one a": (True, False), "one b": (False, True), "both": (True, True)}


class Example:
    """Seven tokens: the first chose none, and nobody chose expert 2. Every expert has rank 3 where some share a factor."""

    def __init__(self, form="own", *, one_row=False, num_tokens=7, all_chosen=False):
        self.shared_a, self.shared_b = SHARED[form]
        self.ranks = (3,) * len(RANKS) if self.shared_a or self.shared_b else RANKS
        num_ranks, count = sum(self.ranks), len(RANKS)
        own_row_S = torch.cat([torch.arange(rank) for rank in self.ranks])
        self.owner_S = torch.arange(count).repeat_interleave(torch.tensor(self.ranks))
        self.rows = RankRows(self.owner_S, own_row_S if self.shared_a else None, own_row_S if self.shared_b else None)
        sizes = {"x": (num_tokens, 5), "w": (1 if one_row else num_tokens, count)}
        sizes |= {"a": (3 if self.shared_a else num_ranks, 5), "b": (3 if self.shared_b else num_ranks, 4)}
        generator = torch.Generator().manual_seed(0)
        drawn = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
        self.x, self.w, self.a, self.b = drawn.values()
        if not all_chosen:
            chosen_NE = torch.rand(sizes["w"], generator=generator) < 0.5
            chosen_NE[0], chosen_NE[:, 2] = False, False
            self.w = self.w * chosen_NE

    @property
    def values(self):
        return [self.x, self.w, self.a, self.b]

    def learning(self, *names):
        for name in names or NAMES:
            getattr(self, name).requires_grad_()
        return self

    def formula(self):
        """sum over e of w_ne * b_e a_e x_n, one expert after the other."""
        update_NO = self.x.new_zeros(len(self.x), self.b.shape[1])
        for expert in range(len(RANKS)):
            own_S = (self.owner_S == expert).nonzero()[:, 0]
            a_RI = self.a[own_S if self.rows.a_row_S is None else self.rows.a_row_S[own_S]]
            b_RO = self.b[own_S if self.rows.b_row_S is None else self.rows.b_row_S[own_S]]
            update_NO = update_NO + self.w[:, expert, None] * (self.x @ a_RI.T @ b_RO)
        return update_NO

    def expert_product(self, y=None):
        return ExpertProduct.apply(y, *self.values, self.rows)

    def chosen_product(self, y=None):
        return ChosenProduct.apply(y, *self.values, self.ranks)

    def added(self, y=None, *, most=2):
        return add_experts(y, *self.values, self.rows, ranks=self.ranks, most=most)


PRODUCTS = [Example.expert_product, Example.chosen_product]


def assert_gradients_are_the_formulas(made, example, names, upstream):
    expected = example.formula()
    torch.testing.assert_close(made, expected)
    leaves = [getattr(example, name) for name in names]
    own, by_hand = (torch.autograd.grad(each, leaves, upstream) for each in (made, expected))
    for name, found, wanted in zip(names, own, by_hand, strict=True):
        # where tokens meet only their experts, a weight of 0 has no gradient
        skips = name == "w" and "ChosenProduct" in str(made.grad_fn)
        torch.testing.assert_close(found, wanted * (example.w != 0) if skips else wanted)


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("form", SHARED)
def test_all_experts_for_all_tokens_have_the_values_and_gradients_of_the_formula(form, one_row):
    example = Example(form, one_row=one_row, all_chosen=True).learning()
    assert_gradients_are_the_formulas(example.expert_product(), example, NAMES, torch.randn(7, 4, dtype=torch.float64))


def test_experts_with_their_own_tokens_have_the_values_and_gradients_of_the_formula():
    example = Example().learning()
    assert_gradients_are_the_formulas(example.chosen_product(), example, NAMES, torch.randn(7, 4, dtype=torch.float64))


@pytest.mark.parametrize("learning", NAMES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_each_gradient_can_be_asked_for_alone(product, learning):
    example = Example("one a" if product is Example.expert_product else "own").learning(learning)
    assert_gradients_are_the_formulas(product(example), example, (learning,), torch.ones(7, 4, dtype=torch.float64))


@pytest.mark.parametrize("product", PRODUCTS)
def test_it_adds_into_the_given_memory_and_passes_its_gradient_on(product):
    example, start = Example(), torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    y = start * 1.0
    made = product(example, y)
    assert made.data_ptr() == y.data_ptr()
    torch.testing.assert_close(made, start.detach() + example.formula())
    made.sum().backward()
    assert torch.equal(start.grad, torch.ones(7, 4, dtype=torch.float64))


def test_a_weight_of_zero_adds_nothing_where_a_hidden_value_has_overflowed():
    example = Example()
    example.a[:2] = torch.inf
    example.w[:, 0] = 0.0
    assert bool(example.expert_product().isfinite().all())


def test_tokens_that_all_chose_nothing_have_no_update():
    example = Example()
    example.w = torch.zeros_like(example.w)
    assert not example.chosen_product().any()


def test_products_run_in_the_dtype_of_the_factors_and_weights_count_in_their_own():
    example, exact = Example(), Example()
    for name in NAMES:
        half = getattr(example, name).to(torch.float32 if name == "w" else torch.bfloat16)
        setattr(example, name, half)
        setattr(exact, name, half.double())
    made = example.chosen_product()
    assert made.dtype is torch.bfloat16
    expected = exact.formula()
    for name in NAMES:
        setattr(exact, name, getattr(exact, name).abs())
    # hidden values, weighted ones, their products and the sum of the experts so far
    assert bool(((made.double() - expected).abs() <= unit(torch.bfloat16) * (3 + len(RANKS)) * exact.formula()).all())


@pytest.fixture
def sorted_calls(monkeypatch):
    """How often tokens were sorted, where that always pays."""
    calls, apply = [], ChosenProduct.apply
    monkeypatch.setattr(_expert_product, "choosing_pays", lambda work, learns: True)
    monkeypatch.setattr(ChosenProduct, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_without_gradients_it_equals_the_formula(num_tokens, skips, monkeypatch):
    monkeypatch.setattr(_expert_product, "skipping_pays", lambda *args: skips)
    example = Example(num_tokens=num_tokens, all_chosen=num_tokens == 1)
    torch.testing.assert_close(example.added(), example.formula())
    torch.testing.assert_close(example.added(torch.ones(num_tokens, 4, dtype=torch.float64)), 1 + example.formula())


def test_one_token_reads_no_factors_of_an_expert_without_weight(monkeypatch):
    monkeypatch.setattr(_expert_product, "skipping_pays", lambda *args: True)
    example = Example(num_tokens=1, all_chosen=True)
    example.w[0, 1] = 0.0
    expected = 1 + example.formula()
    without_S = example.w[0, example.owner_S] == 0
    example.a[without_S], example.b[without_S] = math.nan, math.nan
    # as a layer gives it, with an axis for rows
    y = torch.ones(1, 1, 4, dtype=torch.float64)
    made = example.added(y)
    assert made is y
    torch.testing.assert_close(made[0], expected)


def test_tokens_are_sorted_where_that_pays_with_the_gradients_of_the_formula(sorted_calls):
    example = Example().learning()
    assert_gradients_are_the_formulas(example.added(), example, NAMES, torch.randn(7, 4, dtype=torch.float64))
    assert sorted_calls


def test_a_weight_of_zero_that_learns_keeps_its_gradient(sorted_calls):
    example = Example().learning()
    made, by_hand = (torch.autograd.grad(y.sum(), example.w)[0] for y in (example.added(most=4), example.formula()))
    assert not sorted_calls
    torch.testing.assert_close(made, by_hand)
    assert bool((made[example.w == 0] != 0).all())


def test_weights_that_all_tokens_share_are_never_sorted_by_token(sorted_calls):
    example = Example(one_row=True, all_chosen=True)
    torch.testing.assert_close(example.added(), example.formula())
    assert not sorted_calls
