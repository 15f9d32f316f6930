"""AdapterFusion over LoRAs, against the published attention with all outputs formed."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.errors import ScopeError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._saved import router

LAYER = "q"


@pytest.fixture
def pool(random_pool):
    second = {LAYER: (2, 20, 12), "v": (3, 20, 25)}
    return random_pool({LAYER: (4, 20, 12)}, second, {LAYER: (30, 20, 12)}, {LAYER: (1, 20, 12)})


@pytest.fixture
def trained(trained_router):
    return partial(trained_router, "adapter_fusion", spread=0.2)


def outputs(pool, x_BTI):
    """E_e(x) of each expert, (B, T, E, O)."""
    parts = [each.layers[LAYER] for each in pool.adapters.values()]
    return torch.stack([x_BTI @ part.a_RI.double().T @ part.b_OR.double().T for part in parts], dim=2)


@pytest.mark.parametrize("options", [{}, {"dim": 3}, {"temperature": 7.0}])
@pytest.mark.parametrize("num_tokens", [1, 5, 200])
def test_weights_are_the_published_attention_whatever_bias_its_keys_have(pool, num_tokens, options, trained):
    x_BTI = torch.randn(2, num_tokens, 20, dtype=torch.float64)
    made = trained(pool, **options)
    q_DI, c_D, k_DO = (each[LAYER].detach() for each in (made.queries_, made.query_biases_, made.keys_))
    key_bias_D = torch.randn(len(c_D), dtype=torch.float64)
    query_BTD = x_BTI @ q_DI.T + c_D
    keys_BTED = outputs(pool, x_BTI) @ k_DO.T + key_bias_D
    scores_BTE = torch.einsum("btd,bted->bte", query_BTD, keys_BTED) / options.get("temperature", 1.0)
    assert torch.allclose(made.weights(x_BTI, LAYER), scores_BTE.softmax(dim=-1), atol=1e-5)


def run(model, pool, made, layer):
    """The input and output of a layer while the router is active."""
    seen = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    with Composer(model, pool).activate(made):
        model(torch.tensor([[5, 9, 11, 2, 30]]))
    hook.remove()
    return seen[0]


def published(model, pool, made, layer, x_BTI, v_OO):
    """The layer's own output, and the attention over formed outputs whose context goes through the value matrix."""
    parts = [each.layers[layer] for each in pool.adapters.values()]
    value_BTEO = torch.stack([x_BTI @ part.a_RI.double().T @ part.b_OR.double().T for part in parts], dim=2)
    query_BTD = x_BTI @ made.queries_[layer].T + made.query_biases_[layer]
    attention_BTE = torch.einsum("btd,bted->bte", query_BTD, value_BTEO @ made.keys_[layer].T).softmax(dim=-1)
    context_BTO = torch.einsum("bte,bteo->bto", attention_BTE, value_BTEO @ v_OO.T)
    return x_BTI @ model.get_submodule(layer).weight.T + context_BTO


@pytest.fixture
def fused(make_model, make_adapters, trained):
    model = make_model("llama", dtype=torch.float64)
    pool = ExpertPool(make_adapters(model, "llama"))
    return model, pool, lambda **options: trained(pool, **options)


VALUE_LAYER = "model.layers.1.self_attn.v_proj"


@pytest.mark.parametrize("values", [False, True])
def test_the_layer_adds_what_the_published_one_adds(fused, values):
    model, pool, make = fused
    made = make(values=values)
    with torch.no_grad():
        x_BTI, y_BTO = run(model, pool, made, VALUE_LAYER)
        v_OO = made.values_[VALUE_LAYER] if values else torch.eye(y_BTO.shape[-1], dtype=torch.float64)
        assert torch.allclose(y_BTO, published(model, pool, made, VALUE_LAYER, x_BTI, v_OO), atol=1e-6)


def test_a_changed_value_matrix_counts_in_the_next_call(fused):
    model, pool, make = fused
    made = make(values=True)
    with torch.no_grad():
        run(model, pool, made, VALUE_LAYER)
        made.values_[VALUE_LAYER].mul_(-2)
        x_BTI, y_BTO = run(model, pool, made, VALUE_LAYER)
        expected = published(model, pool, made, VALUE_LAYER, x_BTI, made.values_[VALUE_LAYER])
    assert torch.allclose(y_BTO, expected, atol=1e-6)


def test_the_value_matrix_has_the_gradient_of_the_published_layer(fused):
    model, pool, make = fused
    made = make(values=True)
    x_BTI, y_BTO = run(model, pool, made, VALUE_LAYER)
    v_OO = made.values_[VALUE_LAYER]
    (found,) = torch.autograd.grad(y_BTO.square().sum(), v_OO, retain_graph=True)
    again = published(model, pool, made, VALUE_LAYER, x_BTI.detach(), v_OO)
    (expected,) = torch.autograd.grad(again.square().sum(), v_OO)
    assert torch.allclose(found, expected, atol=1e-5)


def test_values_begin_as_in_the_authors_code_and_are_drawn_to_the_identity(pool):
    made = router("adapter_fusion", pool, values=True)
    v_OO = made.value_matrix(LAYER)
    assert torch.equal(v_OO.diagonal(), torch.ones(12))
    assert torch.equal(v_OO - torch.diag(v_OO.diagonal()), 1e-6 * (1 - torch.eye(12)))
    with torch.no_grad():
        v_OO[0, 3] = 2
    beside = sum(count * (count - 1) for count in (12, 25))
    assert made.losses(None)["value"].item() == pytest.approx(0.01 * (4 + (beside - 1) * 1e-12))
    assert router("adapter_fusion", pool).losses(None) == {}


def test_a_router_with_values_takes_part_in_no_other(fused):
    model, pool, make = fused
    engine = Composer(model, pool)
    with pytest.raises(ScopeError, match="cannot be a part of ByRow: activate it by itself"):
        engine.activate([make(values=True), None]).__enter__()
    with engine.activate([make(), None]):
        pass


def test_it_starts_as_published(pool):
    made = router("adapter_fusion", pool)
    # the smaller of inputs and outputs
    assert {layer: made.queries_[layer].shape for layer in made.layers} == {LAYER: (12, 20), "v": (20, 20)}
    assert {layer: made.keys_[layer].shape for layer in made.layers} == {LAYER: (12, 12), "v": (20, 25)}
    for drawn in (made.queries_["v"], made.keys_["v"]):
        # five standard deviations of that of n normal numbers
        assert drawn.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * drawn.numel()))
    assert not bool(made.query_biases_["v"].any())


def test_gradients_are_those_of_finite_differences(pool, x_BTI, has_exact_gradients, trained):
    names = [f"{name}.{LAYER}" for name in ("queries_", "query_biases_", "keys_")]
    assert has_exact_gradients(trained(pool, dim=2), LAYER, x_BTI[:1, :2] / 4, names)


def test_an_expert_cannot_leave(pool):
    with pytest.raises(ScopeError, match="without 'e1'"):
        router("adapter_fusion", pool).remove_expert("e1")
