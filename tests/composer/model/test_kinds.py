"""Embeddings and convolutions against W + sum of w_e b_e a_e put into the weight itself, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from live_models import in_whole_graphs
from rounding import unit
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from loraweave.composer.composer import Composer
from loraweave.composer.model.layers import target_layer
from loraweave.errors import CompositionError, ScopeError
from loraweave.hub.adapter import Adapter
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors, Kind

NUM_ROWS = 3


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    kind: Kind

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.make().kernel_size) if self.kind == "conv" else ()


CASES = {
    "embedding": Case(lambda: nn.Embedding(11, 6), (5,), "embedding"),
    "embedding with padding": Case(lambda: nn.Embedding(11, 6, padding_idx=2, scale_grad_by_freq=True), (5,), "embedding"),
    "embedding of two token axes": Case(lambda: nn.Embedding(11, 6), (5, 2), "embedding"),
    "gemma's embedding": Case(lambda: Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=2.5), (5,), "embedding"),
    "bart's embedding": Case(lambda: BartScaledWordEmbedding(11, 6, 0, embed_scale=2.5), (5,), "embedding"),
    "conv1d": Case(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9), "conv"),
    "conv2d": Case(lambda: nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 7, 6), "conv"),
    "conv2d of one pixel": Case(lambda: nn.Conv2d(3, 6, 1, bias=False), (3, 4, 3), "conv"),
    "dilated": Case(lambda: nn.Conv2d(3, 6, 3, dilation=2), (3, 7, 6), "conv"),
    "padded to the same size": Case(lambda: nn.Conv2d(3, 6, 3, padding="same"), (3, 5, 4), "conv"),
    "padded by reflection": Case(lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), (3, 5, 4), "conv"),
    "channels last": Case(lambda: nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last), (3, 5, 4), "conv"),
    "conv3d": Case(lambda: nn.Conv3d(2, 6, 2, padding=1), (2, 3, 2, 3), "conv"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def setting(
    case: Case, *, gain: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Tensor, list[Adapter]]:
    """A model of this one layer, an input of three rows, and adapters "a" and "b" of ranks 1 and 3."""
    torch.manual_seed(0)
    module = case.make()
    if case.kind == "embedding":
        x = torch.randint(11, (NUM_ROWS, *case.input_shape), generator=torch.Generator().manual_seed(1))
        num_in = 11
    else:
        x = random(NUM_ROWS, *case.input_shape, seed=1).to(dtype)
        num_in = module.weight[0].numel()
    adapters = []
    for seed, (name, rank) in enumerate((("a", 1), ("b", 3))):
        factors = Factors(
            random(rank, num_in, seed=10 + seed),
            random(6, rank, seed=20 + seed),
            gain_O=random(6, seed=30 + seed) if gain else None,
            bias_O=random(6, seed=40 + seed) if gain and getattr(module, "bias", None) is not None else None,
            kind=case.kind,
            kernel=case.kernel,
        )
        adapters.append(Adapter(name, "tiny", {"0": factors}))
    return nn.Sequential(module).to(dtype), x, adapters


def dense(model: nn.Module, adapters: list[Adapter], weights: list[float]) -> nn.Module:
    """A copy of the model whose weight is W (1 + sum of w gain) + sum of w b a, and whose bias is changed alike."""
    changed = copy.deepcopy(model)
    module = changed[0]
    with torch.no_grad():
        for adapter, w in zip(adapters, weights, strict=True):
            factors, base = adapter.layers["0"], model[0].weight
            update_OI = factors.b_OR.double() @ factors.a_RI.double()
            update = update_OI.T if factors.kind == "embedding" else update_OI.reshape(base.shape)
            if factors.gain_O is not None:
                across = (1, -1) if factors.kind == "embedding" else (-1, *(1 for _ in base.shape[1:]))
                update = update + factors.gain_O.double().reshape(across) * base
            module.weight += w * update
            if factors.bias_O is not None:
                module.bias += w * factors.bias_O
    return changed


@every_case
@pytest.mark.parametrize("gain", [False, True])
def test_live_and_fused_equal_the_dense_formula(gain: bool, case: Case) -> None:
    model, x, adapters = setting(case, gain=gain)
    expected = dense(model, adapters, [0.5, -0.25])(x)
    engine = Composer(model, adapters)
    base = model(x)
    with engine.activate({"a": 0.5, "b": -0.25}):
        live = model(x)
    with engine.fused({"a": 0.5, "b": -0.25}):
        fused = model(x)
    assert torch.allclose(live, expected, rtol=1e-12, atol=1e-12)
    assert live.stride() == expected.stride()
    # gains are summed in fp32 before they are written
    assert torch.allclose(fused, expected, rtol=1e-6 if gain else 1e-12, atol=1e-6 if gain else 1e-12)
    assert torch.equal(model(x), base)
    assert not torch.allclose(live, base, atol=1e-2)


@every_case
def test_rows_with_their_own_mixtures_equal_each_row_alone(case: Case) -> None:
    model, x, adapters = setting(case, gain=True)
    engine = Composer(model, adapters)
    with engine.activate([{"a": 1.0}, None, {"a": -0.5, "b": 2.0}]):
        found = model(x)
        twice = model(x.repeat_interleave(2, dim=0))
    weights = ([1.0, 0.0], [0.0, 0.0], [-0.5, 2.0])
    for row, each in enumerate(weights):
        assert torch.allclose(found[row], dense(model, adapters, each)(x)[row], rtol=1e-12, atol=1e-12)
    assert torch.equal(found[1], model(x)[1])
    assert torch.allclose(twice[::2], found)
    assert torch.allclose(twice[1::2], found)


@every_case
def test_every_token_or_position_has_its_own_weights(case: Case) -> None:
    model, x, adapters = setting(case)
    base = model(x)
    updates_E = [dense(model, [adapter], [1.0])(x) - base for adapter in adapters]
    if case.kind == "conv":
        num_tokens, across = base.shape[2:].numel(), (NUM_ROWS, 1, *base.shape[2:])
    else:
        num_tokens, across = base.shape[1:-1].numel(), (*base.shape[:-1], 1)
    values_BTE = random(NUM_ROWS, num_tokens, 2, seed=7)
    expected = base
    for index, update in enumerate(updates_E):
        expected = expected + values_BTE[..., index].double().reshape(across) * update
    engine = Composer(model, adapters)
    with engine.activate(MixtureWeights(values_BTE[:, :, None], ("a", "b"))):
        assert torch.allclose(model(x), expected, rtol=1e-12, atol=1e-12)
    with (
        engine.activate(MixtureWeights(values_BTE[:, :2, None], ("a", "b"))),
        pytest.raises(ScopeError, match=f"2 tokens.*'0' has {num_tokens}"),
    ):
        model(x)


@every_case
def test_a_router_sees_the_x_of_the_formula(case: Case) -> None:
    model, x, adapters = setting(case)
    seen: list[Tensor] = []

    class Watching:
        def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
            seen.append(x_BTI)
            return torch.ones(1, 1, 2)

    base = model(x)
    with Composer(model, adapters).activate(Watching()):
        assert torch.allclose(model(x), dense(model, adapters, [1.0, 1.0])(x), rtol=1e-12, atol=1e-12)
    layer = target_layer({"0": model[0]}, "0", adapters[0].layers["0"], "a")
    bias_O = layer.parameter("bias")
    y_BTO = seen[0] @ layer.dense_weight_OI().T + (0 if bias_O is None else bias_O)
    assert torch.allclose(y_BTO, layer.kind.rows(layer.module, base), rtol=1e-12, atol=1e-12)


@every_case
def test_weights_that_learn_get_the_gradient_of_the_formula(case: Case) -> None:
    model, x, adapters = setting(case)
    base = model(x).detach()
    updates_E = [dense(model, [adapter], [1.0])(x).detach() - base for adapter in adapters]
    values = torch.tensor([0.0, 0.5], dtype=torch.float64, requires_grad=True)
    y = base + 0.5 * updates_E[1]
    expected = torch.stack([(2 * y * update).sum() for update in updates_E])
    engine = Composer(model, adapters)
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        values.grad = None
        with engine.activate(MixtureWeights(values[None, None, None], ("a", "b"))):
            call(x).square().sum().backward()
        assert torch.allclose(values.grad, expected, rtol=1e-9)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_weighs_hidden_values_in_fp32_and_rounds_the_product_once(dtype: torch.dtype, case: Case) -> None:
    model, x, adapters = setting(case, dtype=dtype)
    # adapters that cancel each other out but for an eighth
    twin = Adapter("b", "tiny", {"0": adapters[0].layers["0"]})
    exact_model, exact_x, _ = setting(case)
    expected = dense(exact_model, [adapters[0]], [0.125])(exact_x)
    with Composer(model, [adapters[0], twin]).activate({"a": 16.125, "b": -16.0}):
        found = model(x)
    assert found.dtype == dtype
    # of rank 1, so that its size is that of a hidden value times b
    update = dense(exact_model, [adapters[0]], [1.0])(exact_x) - exact_model(exact_x)
    sizes = copy.deepcopy(exact_model)
    for parameter in sizes.parameters():
        parameter.abs_()
    # the base rounds its input, its weights and its output, to which the update is added
    limit = unit(dtype) * (2 * (16.125 + 16) * update.abs().max() + 4 * sizes(exact_x.abs()).max())
    assert float((found.double() - expected).abs().max()) <= limit


@every_case
def test_the_factors_follow_the_device_and_dtype_of_the_output(case: Case) -> None:
    class Constant:
        def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
            return torch.ones(1, 1, 2)

    model, x, adapters = setting(case, dtype=torch.float32)
    with Composer(model, adapters).activate(Constant()), torch.no_grad():
        before = model(x)
        model.double()
        x = x if case.kind == "embedding" else x.double()
        after = model(x)
        elsewhere = model.to("meta")(x.to("meta"))
    assert after.dtype == torch.float64
    assert torch.allclose(before.double(), after, rtol=1e-4, atol=1e-5)
    assert (elsewhere.device.type, elsewhere.shape) == ("meta", after.shape)


@in_whole_graphs
@pytest.mark.parametrize("name", ["gemma's embedding", "conv1d", "channels last"])
@torch.no_grad()
def test_compiled_code_gives_the_same_and_is_traced_once_for_all_mixtures(name: str) -> None:
    torch._dynamo.reset()
    model, x, adapters = setting(CASES[name], gain=True, dtype=torch.float32)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    engine = Composer(model, adapters)
    base = compiled(x)
    for mixture in ({"a": 1.0}, [{"a": 1.0}, None, {"b": 2.0}], {"a": 0.5, "b": 0.25}):
        with engine.activate(mixture):
            assert torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(compiled(x), base)
    # the base, and mixtures
    assert counter.frame_count == 2


def test_one_input_without_a_batch_axis_is_one_row() -> None:
    for case in (CASES["conv2d"], CASES["conv1d"]):
        model, x, adapters = setting(case)
        with Composer(model, adapters).activate([{"a": 1.0, "b": 0.5}]):
            assert torch.allclose(model(x[0]), model(x[:1])[0], rtol=1e-12)


def test_tokens_may_be_numbers_of_32_bits() -> None:
    model, x, adapters = setting(CASES["embedding"])

    class Constant:
        def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
            return torch.tensor([[[1.0, 0.5]]])

    engine = Composer(model, adapters)
    for mixture in ({"a": 1.0, "b": 0.5}, Constant()):
        with engine.activate(mixture):
            assert torch.equal(model(x.int()), model(x))


def test_tokens_that_lie_row_by_row_meet_their_own_weights() -> None:
    model, x, adapters = setting(CASES["embedding"])
    values_BTE = random(NUM_ROWS, 5, 2, seed=7)
    with Composer(model, adapters).activate(MixtureWeights(values_BTE[:, :, None], ("a", "b"))):
        assert torch.equal(model(x.flatten()), model(x).flatten(0, 1))


def test_a_fused_kernel_keeps_its_memory_format() -> None:
    model, _, adapters = setting(CASES["channels last"])
    with Composer(model, adapters).fused({"a": 1.0}):
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_weight_that_is_computed_on_the_way_mixes_live_and_is_not_fused_into() -> None:
    model, x, adapters = setting(CASES["conv1d"])
    base = model(x)
    update = dense(model, adapters[:1], [1.0])(x) - base
    nn.utils.parametrizations.weight_norm(model[0])
    engine = Composer(model, adapters)
    with engine.activate({"a": 0.5}):
        assert torch.allclose(model(x), base + 0.5 * update, rtol=1e-12, atol=1e-12)
    with pytest.raises(CompositionError, match="computed on the way"), engine.fused({"a": 1.0}):
        pass


def test_someone_elses_write_to_a_fused_kernel_is_noticed() -> None:
    model, x, adapters = setting(CASES["conv2d"], dtype=torch.bfloat16)
    base = model(x)
    with pytest.raises(CompositionError, match="changed by others"), Composer(model, adapters).fused({"a": 1.0}):
        model[0].weight.data[1, 2, 0, 1] += 1
    assert torch.equal(model(x), base)


def test_the_update_of_an_adapter_with_a_bias_alone_is_that_bias() -> None:
    for name in ("conv2d", "embedding"):
        case: Any = CASES[name]
        model, x, adapters = setting(case)
        factors = adapters[0].layers["0"]
        only = Factors(factors.a_RI[:0], factors.b_OR[:, :0], bias_O=random(6), kind=case.kind, kernel=case.kernel)
        expected = model(x) + random(6).reshape((-1, 1, 1) if name == "conv2d" else (-1,))
        with Composer(model, [Adapter("a", "tiny", {"0": only})]).activate({"a": 1.0}):
            assert torch.allclose(model(x), expected, rtol=1e-12)
