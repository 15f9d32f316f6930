"""The Composer against the formula written out densely; rows, and the base bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rounding import assert_near, num_terms
from tiny_models import Make, logits
from tiny_models import model_inputs as inputs
from torch import Tensor, nn

from loraweave.composer.composer import Composer
from loraweave.errors import ScopeError
from loraweave.hub.adapter import Adapter
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

KINDS = ["llama", "gpt2", "t5", "bert"]
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_live_equals_the_dense_formula(
    kind: str, dtype: torch.dtype, make_model: Make, make_adapters: Make, with_dense_update: Make
) -> None:
    model = make_model(kind, dtype=dtype)
    adapters = make_adapters(model, kind)
    # numbers that fp32, which weights pass through, holds exactly
    expected = logits(with_dense_update(kind, adapters, [0.5, -0.25, 1.5], dtype=dtype), inputs(kind))
    with Composer(model, adapters).activate({"a": 0.5, "b": -0.25, "c": 1.5}):
        found = logits(model, inputs(kind))
    if dtype == torch.float64:
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11 * float(expected.abs().max()))
    else:
        assert_near(found, expected, num_terms(model))
    assert not torch.allclose(found, logits(model, inputs(kind)), atol=1e-2)


@pytest.mark.parametrize("mode", ["live", "fused"])
def test_gain_and_bias_enter_with_their_weight(
    mode: str, make_model: Make, make_adapter: Make, with_dense_update: Make
) -> None:
    model = make_model("gpt2")
    adapters = [
        make_adapter(model, "a", targets=("c_attn",), seed=1, gain=True, bias=True),
        make_adapter(model, "b", targets=("c_attn", "c_fc"), seed=2, bias=True),
    ]
    # a bias in the base, so that y0 without it is not y0 with it
    for each in (model, dense := with_dense_update("gpt2", adapters, [0.6, -0.3])):
        with torch.no_grad():
            for layer in adapters[1].layers:
                each.get_submodule(layer).bias += 0.3
    engine = Composer(model, adapters)
    with engine.activate({"a": 0.6, "b": -0.3}) if mode == "live" else engine.fused({"a": 0.6, "b": -0.3}):
        assert torch.allclose(logits(model, inputs("gpt2")), logits(dense, inputs("gpt2")), rtol=1e-4, atol=1e-4)


def test_weights_may_differ_between_layers(make_model: Make, make_adapter: Make, with_dense_update: Make) -> None:
    model = make_model("llama", dtype=torch.float64)
    adapter = make_adapter(model, "a")
    layers = tuple(sorted(adapter.layers))
    values_L = torch.tensor([0.5, 0.0, -1.0, 2.0])
    mixture = MixtureWeights(values_L[None, None, :, None], ("a",), layers)
    scaled = {
        name: replace(adapter.layers[name], b_OR=adapter.layers[name].b_OR * w)
        for name, w in zip(layers, values_L, strict=True)
    }
    expected = logits(
        with_dense_update("llama", [replace(adapter, layers=scaled)], [1.0], dtype=torch.float64), inputs("llama")
    )
    engine = Composer(model, [adapter])
    with engine.activate(mixture):
        assert torch.allclose(logits(model, inputs("llama")), expected, rtol=1e-10, atol=1e-10)
    with engine.fused(mixture):
        assert torch.allclose(logits(model, inputs("llama")), expected, rtol=1e-10, atol=1e-10)


def test_token_scope_equals_each_token_alone(tiny_llama: nn.Module, make_adapter: Make) -> None:
    # on lm_head alone, a token's logits depend on its own weights and on nothing else
    adapters = [make_adapter(tiny_llama, name, targets=("lm_head",), seed=seed) for seed, name in enumerate("ab")]
    engine = Composer(tiny_llama, adapters)
    values_TE = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    with engine.activate(MixtureWeights(values_TE[None, :, None, :], ("a", "b"))):
        together = logits(tiny_llama, inputs("llama"))
    for token, (a, b) in enumerate(values_TE.tolist()):
        with engine.activate({"a": a, "b": b}):
            assert torch.allclose(together[:, token], logits(tiny_llama, inputs("llama"))[:, token], atol=1e-5)


def test_a_router_sees_each_layers_input(tiny_llama: nn.Module, make_adapter: Make) -> None:
    seen: dict[str, tuple[int, ...]] = {}

    class ByInput:
        def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
            seen[layer] = tuple(x_BTI.shape)
            return torch.stack([x_BTI[..., 0], -x_BTI[..., 1]], dim=-1)

    adapters = [make_adapter(tiny_llama, name, targets=("lm_head",), seed=seed) for seed, name in enumerate("ab")]
    factors = [adapter.layers["lm_head"] for adapter in adapters]
    batch = inputs("llama")
    with torch.no_grad():
        x_BTI = tiny_llama.model(**batch).last_hidden_state
        terms = [(x_BTI @ f.a_RI.T) @ f.b_OR.T for f in factors]
        expected = logits(tiny_llama, batch) + x_BTI[..., :1] * terms[0] - x_BTI[..., 1:2] * terms[1]
    with Composer(tiny_llama, adapters).activate(ByInput()):
        assert torch.allclose(logits(tiny_llama, batch), expected, rtol=1e-4, atol=1e-4)
    assert seen == {"lm_head": (3, 7, 16)}


def test_mixture_weights_are_matched_by_name_not_by_place(engine: Composer) -> None:
    with engine.activate({"a": 0.25, "c": 1.0}):
        expected = logits(engine.model, inputs("llama"))
    with engine.activate(MixtureWeights(torch.tensor([[[[1.0, 0.25]]]]), ("c", "a"))):
        assert torch.equal(logits(engine.model, inputs("llama")), expected)


def test_the_order_of_the_pool_does_not_matter(tiny_llama: nn.Module, make_adapters: Make) -> None:
    adapters = make_adapters(tiny_llama, "llama")
    found = []
    for order in (adapters, adapters[::-1]):
        with Composer(tiny_llama, order).activate({"a": 0.7, "b": -0.4, "c": 1.3}):
            found.append(logits(tiny_llama, inputs("llama")))
    assert_near(found[0], found[1], num_terms(tiny_llama))


def test_a_large_pool_costs_only_its_active_experts(tiny_llama: nn.Module, make_adapter: Make) -> None:
    adapters = [make_adapter(tiny_llama, f"expert {n}", rank=2, seed=n) for n in range(40)]
    engine = Composer(tiny_llama, adapters)
    with engine.activate({"expert 3": 1.0, "expert 30": 0.5}) as handle:
        logits(tiny_llama, inputs("llama"))
    assert handle.plan.experts == ("expert 3", "expert 30")
    # no more than the two experts multiply out to, on q (16, 16) and v (8, 16) of two layers
    assert 0 < handle.plan.num_bytes <= 2 * (16 * 16 + 8 * 16) * 4


def test_a_dora_adapter_equals_its_own_formula(make_model: Make, make_adapter: Make) -> None:
    model = make_model("llama")
    plain = make_adapter(model, "d", targets=("q_proj",))
    layers = {name: replace(f, magnitude_O=torch.linspace(0.5, 2.0, f.b_OR.shape[0])) for name, f in plain.layers.items()}
    dense = make_model("llama")
    with torch.no_grad():
        for name, f in layers.items():
            module = dense.get_submodule(name)
            direction_OI = module.weight + f.b_OR @ f.a_RI
            module.weight.copy_(f.magnitude_O[:, None] * direction_OI / direction_OI.norm(dim=1, keepdim=True))
    engine = Composer(model, [replace(plain, layers=layers)])
    with engine.activate({"d": 1.0}):
        assert torch.allclose(logits(model, inputs("llama")), logits(dense, inputs("llama")), rtol=1e-4, atol=1e-5)
    with engine.fused({"d": 1.0}):
        assert torch.allclose(logits(model, inputs("llama")), logits(dense, inputs("llama")), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixture", [{}, {"a": 0.0, "b": 0.0}, [None, None, None], [{}, {"c": 0.0}, None]])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_weights_are_the_base_bit_for_bit(kind: str, mixture: Any, make_model: Make, make_adapters: Make) -> None:
    model = make_model(kind)
    base = logits(model, inputs(kind))
    with Composer(model, make_adapters(model, kind)).activate(mixture):
        assert torch.equal(logits(model, inputs(kind)), base)


def test_a_row_of_zero_weights_is_the_base_bit_for_bit(tiny_llama: nn.Module, make_adapters: Make) -> None:
    base = logits(tiny_llama, inputs("llama"))
    with Composer(tiny_llama, make_adapters(tiny_llama, "llama")).activate([{"a": 1.0}, None, {"b": 2.0, "c": 1.0}]):
        found = logits(tiny_llama, inputs("llama"))
    assert torch.equal(found[1], base[1])
    assert not torch.allclose(found[0], base[0], atol=1e-2)


def test_an_overflowing_expert_does_not_reach_the_rows_of_others(make_adapter: Make) -> None:
    model = nn.Sequential(nn.Linear(4, 3)).half()
    huge = Adapter("huge", "tiny", {"0": Factors(torch.full((1, 4), 6e4), torch.ones(3, 1))})
    mild = Adapter("mild", "tiny", {"0": Factors(torch.ones(1, 4), torch.ones(3, 1))})
    x = torch.ones(3, 4, dtype=torch.float16)
    with torch.no_grad(), Composer(model, [huge, mild]).activate([{"huge": 1.0}, {"mild": 1.0}, None]):
        found = model(x)
        assert not bool(torch.isfinite(found[0]).any())
        assert torch.allclose(found[1], torch.nn.functional.linear(x[1], model[0].weight, model[0].bias) + 4.0, atol=1e-2)
        assert torch.equal(found[2], torch.nn.functional.linear(x, model[0].weight, model[0].bias)[2])


def test_rows_of_a_two_axis_input_hold_their_tokens_on_end() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    adapter = Adapter("a", "tiny", {"0": Factors(torch.randn(2, 4), torch.randn(3, 2))})
    x_BTI = torch.randn(2, 5, 4)
    with torch.no_grad(), Composer(model, [adapter]).activate([{"a": 1.0}, {"a": -2.0}]):
        assert torch.allclose(model(x_BTI.reshape(10, 4)).reshape(2, 5, 3), model(x_BTI), atol=1e-6)


def test_tokens_that_do_not_fit_the_input_are_named(tiny_llama: nn.Module, make_adapter: Make) -> None:
    engine = Composer(tiny_llama, [make_adapter(tiny_llama, "a")])
    mixture = MixtureWeights(torch.ones(1, 5, 1, 1), ("a",))
    with engine.activate(mixture), pytest.raises(ScopeError, match=r"5 tokens.*has 7"):
        logits(tiny_llama, inputs("llama"))
