"""Layers whose update would not be the formula's are refused by name, before anything runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from loraweave.composer.composer import Composer
from loraweave.errors import CompositionError, LayerMismatch
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors, Kind


def refused(module: nn.Module, size: tuple[int, int], kind: Kind, kernel: tuple[int, ...] = ()) -> str:
    factors = Factors(torch.ones(1, size[1]), torch.ones(size[0], 1), kind=kind, kernel=kernel)
    with pytest.raises((LayerMismatch, CompositionError)) as caught:
        Composer(nn.Sequential(module), [Adapter("odd", "tiny", {"0": factors})])
    assert "'odd' updates layer '0'" in str(caught.value)
    return str(caught.value)


def test_factors_of_another_kind_are_named_with_the_kind_of_the_module() -> None:
    assert "kind 'linear', but a Embedding takes kind 'embedding'" in refused(nn.Embedding(5, 4), (4, 5), "linear")
    assert "kind 'embedding', but a Linear takes kind 'linear'" in refused(nn.Linear(5, 4), (4, 5), "embedding")
    assert "kind 'conv', but a Linear takes kind 'linear'" in refused(nn.Linear(5, 4), (4, 5), "conv", (1,))
    assert "kind 'linear', but a Conv2d takes kind 'conv'" in refused(nn.Conv2d(5, 4, 1), (4, 5), "linear")


def test_a_module_of_no_known_kind_is_named_with_what_is_known() -> None:
    message = refused(nn.LayerNorm(4), (4, 4), "linear")
    assert "LayerNorm" in message
    assert "torch.nn.Embedding" in message
    assert "ConvTranspose2d" in refused(nn.ConvTranspose2d(2, 4, 2), (4, 8), "conv", (2, 2))
    assert "EmbeddingBag" in refused(nn.EmbeddingBag(5, 4), (4, 5), "embedding")


def test_another_shape_or_kernel_is_named_with_both() -> None:
    message = refused(nn.Conv2d(3, 4, (2, 3)), (4, 18), "conv", (3, 2))
    assert "(4, 18, (3, 2))" in message
    assert "(4, 18, (2, 3))" in message
    assert "(4, 6), but the model's Embedding has (4, 5)" in refused(nn.Embedding(5, 4), (4, 6), "embedding")


def test_a_convolution_in_groups_is_refused() -> None:
    assert "groups=2" in refused(nn.Conv2d(4, 4, 3, groups=2), (4, 36), "conv", (3, 3))


def test_an_embedding_that_changes_its_weight_is_refused() -> None:
    assert "max_norm=1.0" in refused(nn.Embedding(5, 4, max_norm=1.0), (4, 5), "embedding")


@pytest.mark.parametrize(
    "module",
    [BartLearnedPositionalEmbedding(6, 4), OPTLearnedPositionalEmbedding(6, 4)],
    ids=lambda module: type(module).__name__,
)
def test_a_positional_embedding_that_looks_up_other_rows_is_refused(module: nn.Embedding) -> None:
    assert "forward is its own" in refused(module, (4, module.num_embeddings), "embedding")


def test_an_embedding_that_does_more_than_its_scale_says_is_refused() -> None:
    class Normed(nn.Embedding):
        embed_scale = 2.0

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.normalize(super().forward(ids)) * self.embed_scale

    assert "forward is its own" in refused(Normed(6, 4), (4, 6), "embedding")


def test_a_convolution_that_standardises_its_weight_is_refused() -> None:
    module = WeightStandardizedConv2d(3, 4, 2)
    assert "forward is its own" in refused(module, (4, 12), "conv", (2, 2))


def test_a_linear_layer_that_does_more_is_refused() -> None:
    router = Llama4Router(Llama4TextConfig(hidden_size=4, num_local_experts=3, num_experts_per_tok=1))
    assert "not W x + bias" in refused(router, (3, 4), "linear")

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Transposed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + self.bias

    assert "not W x + bias" in refused(Doubled(4, 3), (3, 4), "linear")
    Composer(nn.Sequential(Transposed(4, 3)), [Adapter("a", "tiny", {"0": Factors(torch.ones(1, 4), torch.ones(3, 1))})])


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_layer_without_values_is_refused(kind: Kind) -> None:
    module = nn.Linear(5, 4, device="meta") if kind == "linear" else nn.Embedding(5, 4, device="meta")
    assert "meta device and has no values" in refused(module, (4, 5), kind)


def test_the_second_name_of_a_module_is_answered_with_the_first_which_changes_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(2, 4).double()
    factors = Factors(torch.randn(1, 4), torch.randn(4, 1))
    with pytest.raises(LayerMismatch, match="'second', which the model does not have under this name: it is 'first'"):
        Composer(model, [Adapter("odd", "tiny", {"second": factors})])
    with Composer(model, [Adapter("a", "tiny", {"first": factors})]).activate({"a": 1.0}), torch.no_grad():
        found = model(x)
    weight_OI = model.first.weight + factors.b_OR.double() @ factors.a_RI.double()
    expected = nn.functional.linear(nn.functional.linear(x, weight_OI, model.first.bias), weight_OI, model.first.bias)
    assert torch.allclose(found, expected, rtol=1e-12)
