"""What gates see in the forms of these recipes, and experts that do not learn."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.composer.experts.forms.sum_of_experts import SumOfExperts
from loraweave.extensions.recipes.forms.partly_frozen import PartlyFrozen
from loraweave.extensions.recipes.recipes.local_and_shared import LocalAndShared
from loraweave.routers.recipes._gate import Gate, Weighing
from loraweave.routers.recipes._recipe import ExpertShape, Recipe, Site

CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(3, 5, 3),
    "of one pixel": lambda: nn.Conv2d(3, 5, 1, bias=False),
    "strided": lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1)),
    "padded": lambda: nn.Conv2d(3, 5, 3, padding=1),
    "dilated": lambda: nn.Conv2d(3, 5, (2, 3), padding=(0, 2), dilation=(1, 2)),
    "padded by reflection": lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
    "padded to the same size": lambda: nn.Conv2d(3, 5, 4, padding="same", dilation=2),
    "channels last": lambda: nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last),
    "of a line": lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1),
    "of a volume": lambda: nn.Conv3d(3, 5, 2, stride=(1, 2, 1), padding=1),
}


RANKS = (2, 1, 3)


class Constant(Gate):
    """Weights of three experts that it was given, for each row and position or for all."""

    def __init__(self, w_BTE):
        super().__init__(3)
        self.w_BTE = nn.Parameter(w_BTE)
        self.seen = []

    def forward(self, x_BTI, call):
        self.seen.append(x_BTI)
        return Weighing(self.w_BTE)


@dataclass(frozen=True, kw_only=True)
class Three(Recipe):
    target_modules: tuple[str, ...] = ("0",)
    alpha: float | None = 12.0
    w_BTE: torch.Tensor | None = None
    shared: bool = False

    def shape(self, site):
        return ExpertShape((2, 2, 2), shared_a=True) if self.shared else ExpertShape(RANKS)

    def gate(self, site, num_experts):
        return Constant(self.w_BTE)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image(module, rows=2):
    size = {1: (9,), 2: (7, 6), 3: (4, 3, 5)}[len(module.kernel_size)]
    return drawn(rows, 3, *size, seed=5)


class Middle(Three):
    form = "convolution_block"
    ranks, generic, as_released = RANKS, False, False


class Nothing(Three):
    form = "task_branches"
    mode, num_streams = "matrix", 1

    def is_branched(self, site):
        return False


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_gate_may_see_the_middle_of_the_kernel_alone_and_have_the_same_gradients(kind):
    torch.manual_seed(0)
    base = nn.Sequential(CONVOLUTIONS[kind]()).double()
    gates = []
    for recipe in (Three, Middle):
        made = ExpertModel(base, recipe(w_BTE=drawn(2, 1, 3)))
        x = image(base[0]).requires_grad_()
        made(x)
        gates.append((made.gates["0"].seen[0], x))
    (patches, x), (middle, x_again) = gates
    taps = patches.unflatten(-1, (3, -1))
    expected = taps[..., taps.shape[-1] // 2]
    assert torch.equal(middle, expected)
    grad = drawn(*middle.shape, seed=4)
    assert torch.equal(torch.autograd.grad(middle, x_again, grad)[0], torch.autograd.grad(expected, x, grad)[0])


def test_a_gate_that_sees_nothing_costs_no_look_at_the_input():
    made = ExpertModel(nn.Sequential(nn.Conv2d(3, 5, 3)).double(), Nothing(w_BTE=drawn(2, 1, 3)))
    made(drawn(2, 3, 7, 6))
    assert made.gates["0"].seen[0].numel() == 0


SITE = Site("layer", 5, 7)


SHAPE = ExpertShape((2, 3))


def frozen_starts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(rank, 5, generator=generator), torch.randn(rank, 7, generator=generator)) for rank in SHAPE.ranks]


@pytest.mark.parametrize("phase", ["local", "shared"])
def test_it_is_the_sum_of_experts(phase):
    frozen, learned = (
        PartlyFrozen(LocalAndShared(phase=phase), SITE, SHAPE),
        SumOfExperts(Recipe(), SITE, SHAPE),
    )
    for layer in (frozen, learned):
        layer.reset(frozen_starts())
    module, x_BTI = torch.nn.Linear(5, 7), torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    w_BTE = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        made, expected = (layer(module, (x_BTI,), module(x_BTI), lambda _: w_BTE) for layer in (frozen, learned))
    torch.testing.assert_close(made, expected)
    for number in (0, 1):
        w_E = torch.eye(2)[number]
        torch.testing.assert_close(frozen.factors(w_E).a_RI, learned.factors(w_E).a_RI)
        torch.testing.assert_close(frozen.factors(w_E).b_OR, learned.factors(w_E).b_OR)


@pytest.mark.parametrize(("phase", "own_rank"), [("local", 3), ("shared", 2)])
def test_what_learns_has_the_gradient_that_it_has_beside_others_that_learn(phase, own_rank):
    frozen, learned = (
        PartlyFrozen(LocalAndShared(phase=phase), SITE, SHAPE),
        SumOfExperts(Recipe(), SITE, SHAPE),
    )
    module, x_BTI = torch.nn.Linear(5, 7), torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    for layer in (frozen, learned):
        layer.reset(frozen_starts())
        layer(module, (x_BTI,), module(x_BTI).detach(), lambda _: torch.ones(1, 1, 2)).square().sum().backward()
    assert {name for name, _ in frozen.named_parameters()} == {"a_SI", "b_SO"}
    rows = slice(2, 5) if own_rank == 3 else slice(0, 2)
    torch.testing.assert_close(frozen.a_SI.grad, learned.a_SI.grad[rows])
    torch.testing.assert_close(frozen.b_SO.grad, learned.b_SO.grad[rows])


@pytest.mark.parametrize("phase", ["local", "shared"])
def test_what_was_put_in_is_given_back(phase):
    layer = PartlyFrozen(LocalAndShared(phase=phase), SITE, SHAPE)
    layer.reset(frozen_starts())
    for (a_RI, b_RO), (given_a_RI, given_b_RO) in zip(layer.starts(), frozen_starts(), strict=True):
        assert torch.equal(a_RI, given_a_RI)
        assert torch.equal(b_RO, given_b_RO)
