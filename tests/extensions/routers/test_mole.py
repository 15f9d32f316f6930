"""MoLE's gate, against the outputs of all experts written out."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from loraweave.errors import ScopeError, UnknownExpert
from loraweave.routers.tokens._learned import Step
from loraweave.routers.tokens._saved import router

LAYER = "q"


@pytest.fixture
def pool(random_pool):
    # "v" is a layer of two of them; the third has more ranks than outputs
    second, last = {LAYER: (2, 20, 12), "v": (3, 20, 7)}, {LAYER: (1, 20, 12), "v": (2, 20, 7)}
    return random_pool({LAYER: (4, 20, 12)}, second, {LAYER: (30, 20, 12)}, last)


@pytest.fixture
def trained(trained_router):
    return partial(trained_router, "mole")


def written_out(pool, made, x_I, layer):
    """softmax(flatten of the normalised outputs . e / tau) of one token over the layer's experts."""
    flat, present = [], []
    for place, adapter in enumerate(pool.adapters.values()):
        num_outputs = made.gates_[layer].shape[1]
        output_O = torch.zeros(num_outputs, dtype=torch.float64)
        if layer in adapter.layers:
            part = adapter.layers[layer]
            output_O = part.b_OR.double() @ part.a_RI.double() @ x_I
            output_O = output_O / output_O.norm()
            present.append(place)
        flat.append(output_O)
    e_FE = made.gates_[layer].detach().reshape(-1, len(pool))
    scores_E = torch.cat(flat) @ e_FE / made.log_temperatures_[layer].detach().exp()
    w_E = torch.zeros(len(pool), dtype=torch.float64)
    w_E[present] = scores_E[present].softmax(dim=0)
    return w_E


@pytest.mark.parametrize("layer", [LAYER, "v"])
def test_weights_are_the_softmax_of_the_projected_normalised_outputs(pool, x_BTI, layer, trained):
    made = trained(pool)
    found = made.weights(x_BTI, layer)
    for b in range(2):
        for t in range(5):
            assert torch.allclose(found[b, t], written_out(pool, made, x_BTI[b, t], layer), atol=1e-5)


def test_it_begins_close_to_uniform(pool, x_BTI):
    found = router("mole", pool).weights(x_BTI, LAYER)
    # a score deviates by 0.02 for each of four experts, and a weight by sqrt(12) / 16 of that: five times this
    assert torch.allclose(found, torch.full_like(found, 1 / 4), atol=5 * 0.02 * math.sqrt(4) * math.sqrt(12) / 16)
    assert not torch.equal(found[0, 0], found[0, 1])


def test_a_high_temperature_weighs_all_alike_and_a_low_one_chooses(pool, x_BTI, trained):
    made = trained(pool)
    with torch.no_grad():
        made.log_temperatures_[LAYER].fill_(math.log(1e6))
        assert torch.allclose(made.weights(x_BTI, LAYER), torch.tensor(1 / 4, dtype=torch.float64), atol=1e-4)
        made.log_temperatures_[LAYER].fill_(math.log(1e-4))
        assert bool((made.weights(x_BTI, LAYER).max(dim=-1).values > 0.999).all())


def test_the_length_of_an_output_does_not_count(pool, x_BTI, trained):
    made = trained(pool)
    assert torch.allclose(made.weights(3 * x_BTI, LAYER), made.weights(x_BTI, LAYER), atol=1e-12)


def test_experts_in_another_order_with_their_parameters_get_the_same_weights(pool, x_BTI, trained):
    order = [2, 0, 3, 1]
    made, turned = trained(pool), trained(pool.subset(pool.names[place] for place in order))
    with torch.no_grad():
        for layer in (LAYER, "v"):
            turned.gates_[layer].copy_(made.gates_[layer][order][..., order])
            turned.log_temperatures_[layer].copy_(made.log_temperatures_[layer])
            assert torch.allclose(turned.weights(x_BTI, layer), made.weights(x_BTI, layer)[..., order], atol=1e-12)


def test_gradients_are_those_of_finite_differences(pool, x_BTI, trained, has_exact_gradients):
    names = (f"gates_.{LAYER}", f"log_temperatures_.{LAYER}")
    assert has_exact_gradients(trained(pool), LAYER, x_BTI[:1, :2], names)


def test_an_input_of_zeros_has_finite_weights_and_gradients(pool):
    made = router("mole", pool)
    x_BTI = torch.zeros(1, 1, 20, requires_grad=True)
    made.weights(x_BTI, LAYER)[0, 0, 0].backward()
    assert bool(torch.isfinite(x_BTI.grad).all())


def noted(made, x_BTI, mask_BT):
    made.step = Step(mask_BT, torch.full((2,), -1))
    for layer in made.layers:
        made.weights(x_BTI, layer)
    return made.step


def test_the_balance_loss_is_minus_the_log_of_the_product_of_mean_weights(pool, x_BTI, trained):
    made = trained(pool, balance=0.3)
    mask_BT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    step = noted(made, x_BTI, mask_BT)
    tokens = [(0, 2), (0, 3), (0, 4), *((1, t) for t in range(5))]
    q = []
    for place in range(4):
        layers = [LAYER, "v"] if place in (1, 3) else [LAYER]
        means = [sum(step.weights[layer][b, t, place].item() for b, t in tokens) / len(tokens) for layer in layers]
        q.append(sum(means) / len(means))
    assert made.losses(step)["balance"].item() == pytest.approx(-0.3 * math.log(math.prod(q)), rel=1e-6)


def test_the_balance_loss_is_least_where_all_weigh_alike(pool, x_BTI, trained):
    full = pool.subset(["e1", "e3"])
    made = trained(full, balance=1.0)
    with torch.no_grad():
        for layer in full.layer_names:
            made.gates_[layer].zero_()
    step = noted(made, x_BTI, torch.ones(2, 5))
    assert made.losses(step)["balance"].item() == pytest.approx(2 * math.log(2))
    collapsed = noted(trained(full, balance=1.0), x_BTI, torch.ones(2, 5))
    assert made.losses(collapsed)["balance"].item() > 2 * math.log(2)
    assert trained(full, balance=0.0).losses(step) == {}


def test_masking_an_expert_keeps_the_ratios_of_the_others(pool, x_BTI, trained):
    made = trained(pool)
    masked = made.masking("e2")
    before, after = made.weights(x_BTI, LAYER), masked.weights(x_BTI, LAYER)
    assert not bool(after[..., 2].any())
    kept = before[..., [0, 1, 3]]
    assert torch.allclose(after[..., [0, 1, 3]], kept / kept.sum(dim=-1, keepdim=True), atol=1e-12)
    assert made.masked == ()
    assert masked.options["masked"] == ("e2",)
    # both experts of "v"
    assert not bool(made.masking("e1", "e3").weights(x_BTI, "v").any())


def test_what_is_no_expert_is_refused_by_name(pool):
    with pytest.raises(UnknownExpert, match="e22"):
        router("mole", pool).masking("e22")
    with pytest.raises(UnknownExpert, match="e22"):
        router("mole", pool, masked=["e22"])
    with pytest.raises(ScopeError, match=r"masking\('e2'\)"):
        router("mole", pool).remove_expert("e2")
