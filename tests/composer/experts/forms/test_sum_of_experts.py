"""Experts of convolutions: one convolution with the weights W + sum of w b a for each row, values and gradients."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.composer.experts.forms.sum_of_experts import SumOfExperts
from loraweave.errors import LayerMismatch, ScopeError
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
# "same" padding of an even kernel pads a copy
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
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


SCALE = 12.0 / 8


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(make, w_BTE, **options):
    torch.manual_seed(0)
    base = nn.Sequential(make()).double()
    made = ExpertModel(base, Three(w_BTE=w_BTE, **options)).eval()
    layer = made.layers["0"]
    nn.init.normal_(layer.b_SO)
    return made, base[0], layer, made.gates["0"]


def image(module, rows=2):
    size = {1: (9,), 2: (7, 6), 3: (4, 3, 5)}[len(module.kernel_size)]
    return drawn(rows, 3, *size, seed=5)


def by_dense_convolutions(module, layer, x, w_BE):
    """Each row by one convolution with the updated weight."""
    a_SI = layer.a_SI if len(layer.a_SI) == len(layer.b_SO) else layer.a_SI.repeat(3, 1)
    rows, ranks = [], layer.shape.ranks
    for x_1, w_E in zip(x.split(1), w_BE, strict=True):
        w_S = torch.cat([w.expand(rank) for w, rank in zip(w_E, ranks, strict=True)])
        weight = module.weight + SCALE * (layer.b_SO.T * w_S @ a_SI).view(module.weight.shape)
        rows.append(module._conv_forward(x_1, weight, module.bias))
    return torch.cat(rows)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("shared", [False, True], ids=["own a", "one a"])
def test_a_convolution_has_the_values_and_gradients_of_one_with_the_updated_weight(kind, shared):
    made, module, layer, gate = built(CONVOLUTIONS[kind], drawn(2, 1, 3), shared=shared)
    x = image(module).requires_grad_()
    learned = [x, layer.a_SI, layer.b_SO, gate.w_BTE]
    found = made(x)
    expected = by_dense_convolutions(module, layer, x, gate.w_BTE[:, 0])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert found.is_contiguous(memory_format=torch.channels_last) == module(x).is_contiguous(
        memory_format=torch.channels_last
    )
    grad = drawn(*found.shape, seed=7)
    own, written = torch.autograd.grad(found, learned, grad), torch.autograd.grad(expected, learned, grad)
    torch.testing.assert_close(own, written, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_weights_of_each_position_scale_the_updates_there(kind):
    module = CONVOLUTIONS[kind]().double()
    places = module(image(module)).shape[2:]
    w_BTE = drawn(2, places.numel(), 3, seed=8)
    made, module, layer, _ = built(CONVOLUTIONS[kind], w_BTE)
    x = image(module)
    expected = base = module(x)
    for expert in range(3):
        alone_E = torch.eye(3, dtype=torch.float64)[expert].expand(2, 3)
        update = by_dense_convolutions(module, layer, x, alone_E) - base
        expected = expected + w_BTE[..., expert].view(2, 1, *places) * update
    torch.testing.assert_close(made(x), expected, rtol=1e-10, atol=1e-10)


def test_a_gate_sees_the_patch_below_the_kernel_at_each_position():
    made, module, _, gate = built(lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)), drawn(1, 1, 3))
    x = image(module)
    made(x)
    expected = functional.unfold(x, (3, 2), stride=(2, 1), padding=(1, 0)).mT
    torch.testing.assert_close(gate.seen[0], expected)


def test_the_update_of_a_convolution_is_an_adapter_of_its_own():
    made, module, layer, gate = built(lambda: nn.Conv2d(3, 5, 3, padding=1), drawn(1, 1, 3))
    factors = layer.factors(gate.w_BTE.detach()[0, 0])
    assert (factors.kind, factors.kernel) == ("conv", (3, 3))
    x = image(module)
    weight = module.weight + (factors.b_OR @ factors.a_RI).view(5, 3, 3, 3)
    torch.testing.assert_close(made(x), functional.conv2d(x, weight, module.bias, padding=1), rtol=1e-5, atol=1e-5)


def test_a_convolution_in_groups_is_refused():
    base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(LayerMismatch, match="groups=2 see different channels"):
        ExpertModel(base, Three(w_BTE=torch.ones(1, 1, 3)))


def form_of(num_rows_of_weights):
    torch.manual_seed(0)
    form = SumOfExperts(Three(), Site("0", 3, 4), ExpertShape(RANKS)).double()
    nn.init.normal_(form.a_SI)
    nn.init.normal_(form.b_SO)
    return form, drawn(num_rows_of_weights, 1, 3, seed=2)


def test_windows_of_a_row_on_end_have_the_rows_weights():
    form, w_BTE = form_of(2)
    module, x = nn.Linear(3, 4).double(), drawn(6, 5, 3, seed=1)
    with torch.no_grad():
        found = form(module, (x,), module(x), lambda _: w_BTE)
        for window in range(6):
            own = form(module, (x[window],), module(x[window]), lambda _, row=window // 3: w_BTE[row : row + 1])
            torch.testing.assert_close(found[window], own)


@pytest.mark.parametrize("shape", [(6, 2, 3), (6, 3), (5, 4, 3)], ids=["tokens first", "no tokens", "no multiple"])
def test_rows_that_cannot_be_told_to_be_windows_are_refused(shape):
    form, w_BTE = form_of(2)
    module, x = nn.Linear(3, 4).double(), drawn(*shape)
    with (
        torch.no_grad(),
        pytest.raises(ScopeError, match=rf"weights are for 2 rows of 1 tokens, but layer '0' sees {shape[0]}"),
    ):
        form(module, (x,), module(x), lambda _: w_BTE)
