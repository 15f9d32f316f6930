"""ffa, flexlora and hetlora against their papers' formulas, written densely in float64."""

from __future__ import annotations

import pytest
import torch
from tiny_models import dense
from tiny_models import random_factors as factors

import loraweave as lw
from loraweave import registry
from loraweave.errors import LayerMismatch
from loraweave.extensions.federated.methods import hetlora as hetlora_module
from loraweave.extensions.federated.methods.ffa import ffa
from loraweave.extensions.federated.methods.flexlora import flexlora
from loraweave.extensions.federated.methods.hetlora import hetlora
from loraweave.types import Factors

CLIENTS = [factors(0, 1), factors(1, 4), factors(2, 3)]


def frozen(count: int) -> list[Factors]:
    a_RI = factors(0, 3).a_RI
    return [Factors(a_RI.clone(), factors(seed, 3).b_OR) for seed in range(count)]


def test_with_one_frozen_a_the_mean_of_b_is_the_mean_update() -> None:
    clients = frozen(3)
    found = ffa(clients, [1.0, 2.0, 5.0])
    assert found.rank == 3
    assert torch.equal(found.a_RI, clients[0].a_RI)
    expected = sum(w / 8 * dense(f) for w, f in zip([1, 2, 5], clients, strict=True))
    assert torch.allclose(dense(found), expected, rtol=1e-5, atol=1e-6)


def test_a_client_without_the_layer_trained_nothing_there() -> None:
    clients = frozen(1)
    assert torch.allclose(dense(ffa([clients[0], None], [1.0, 3.0])), dense(clients[0]) / 4, rtol=1e-6)


def test_clients_of_another_a_are_refused_with_the_way_out() -> None:
    clients = frozen(2)
    turned = Factors(clients[1].a_RI * (1 + 2.0**-20), clients[1].b_OR)
    with pytest.raises(LayerMismatch, match="use average"):
        ffa([clients[0], turned], [1.0, 1.0])
    with pytest.raises(LayerMismatch, match=r"\(3, 7\) and \(2, 7\)"):
        ffa([clients[0], factors(0, 2)], [1.0, 1.0])


@pytest.mark.parametrize("rank", [1, 3, 5, 50])
def test_flexlora_is_the_truncated_mean_with_sigma_on_b(rank: int) -> None:
    mean = sum(w / 10 * dense(f) for w, f in zip([2, 3, 5], CLIENTS, strict=True))
    u, sigma, vh = torch.linalg.svd(mean, full_matrices=False)
    found = flexlora(CLIENTS, [2.0, 3.0, 5.0], rank=rank).factors
    keep = min(rank, 5)
    assert found.rank == keep
    assert torch.allclose(dense(found), u[:, :keep] * sigma[:keep] @ vh[:keep], rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.a_RI @ found.a_RI.T, torch.eye(keep), atol=1e-5)
    assert torch.allclose(found.b_OR.norm(dim=0).double(), sigma[:keep], rtol=1e-5)


def test_flexlora_keeps_the_largest_clients_rank_by_default() -> None:
    assert flexlora(CLIENTS, [1.0, 1.0, 1.0]).factors.rank == 4
    assert flexlora(CLIENTS, [1.0, 0.0, 1.0]).factors.rank == 3


def test_a_client_without_the_layer_counts_with_its_size_in_flexlora() -> None:
    assert torch.allclose(
        dense(flexlora([CLIENTS[0], None], [1.0, 3.0]).factors), dense(CLIENTS[0]) / 4, rtol=1e-5, atol=1e-6
    )


def padded(clients: list[Factors], parts: list[float]) -> torch.Tensor:
    rank = max(f.rank for f in clients)
    a_RI, b_OR = torch.zeros(rank, 7).double(), torch.zeros(5, rank).double()
    for f, part in zip(clients, parts, strict=True):
        a_RI[: f.rank] += part * f.a_RI
        b_OR[:, : f.rank] += part * f.b_OR
    return b_OR @ a_RI


def test_hetlora_pads_with_zeros_and_weighs_by_norm() -> None:
    norms = [float(dense(f).norm()) for f in CLIENTS]
    expected = padded(CLIENTS, [norm / sum(norms) for norm in norms])
    found = hetlora(CLIENTS, [1.0, 1.0, 1.0])
    assert found.rank == 4
    assert torch.allclose(dense(found), expected, rtol=1e-5, atol=1e-5)


def test_the_weights_of_hetlora_multiply_the_norms() -> None:
    products = [w * float(dense(f).norm()) for w, f in zip([1.0, 2.0, 5.0], CLIENTS, strict=True)]
    expected = padded(CLIENTS, [product / sum(products) for product in products])
    for weights in ([1.0, 2.0, 5.0], [10.0, 20.0, 50.0]):
        assert torch.allclose(dense(hetlora(CLIENTS, weights)), expected, rtol=1e-5, atol=1e-5)


def test_norms_are_of_the_whole_model_unless_each_layer_is_asked_for() -> None:
    layers = [CLIENTS, [factors(7, 2), None, factors(8, 1)]]
    whole = [
        sum(float(dense(layer[place]).norm()) ** 2 for layer in layers if layer[place] is not None) ** 0.5
        for place in range(3)
    ]
    seen = hetlora_module.survey(layers, [1.0, 1.0, 1.0])
    assert seen == pytest.approx(whole)
    expected = padded(CLIENTS, [norm / sum(whole) for norm in whole])
    assert torch.allclose(dense(hetlora(CLIENTS, [1.0] * 3, survey=seen)), expected, rtol=1e-5, atol=1e-5)
    assert hetlora_module.survey(layers, [1.0, 1.0, 1.0], norms="layer") is None
    alone = hetlora(CLIENTS, [1.0] * 3)
    assert torch.equal(hetlora(CLIENTS, [1.0] * 3, norms="layer", survey=seen).a_RI, alone.a_RI)
    # the second client has no such layer: its share of the norms stays, with zeros
    second = hetlora(layers[1], [1.0] * 3, survey=seen)
    first, last = layers[1][0], layers[1][2]
    expected = padded([first, last], [whole[0] / sum(whole), whole[2] / sum(whole)])
    assert torch.allclose(dense(second), expected, rtol=1e-5, atol=1e-5)


def test_clients_of_equal_norm_are_averaged_factor_by_factor() -> None:
    clients = [Factors(f.a_RI, f.b_OR / float(dense(f).norm())) for f in CLIENTS]
    assert torch.allclose(dense(hetlora(clients, [1.0] * 3)), padded(clients, [1 / 3] * 3), rtol=1e-5, atol=1e-6)


def test_a_padded_client_alone_is_itself() -> None:
    client = CLIENTS[0]
    padding = Factors(torch.zeros(3, 7), torch.zeros(5, 3))
    assert torch.allclose(dense(hetlora([client, padding], [1.0, 1.0])), dense(client), rtol=1e-6)


def test_clients_that_trained_nothing_give_zeros() -> None:
    untrained = Factors(factors(0, 2).a_RI, torch.zeros(5, 2), bias_O=torch.ones(5))
    found = hetlora([untrained, untrained], [1.0, 3.0])
    assert not dense(found).any()
    assert torch.equal(found.bias_O, torch.ones(5))


def test_flexlora_averages_gains_and_biases() -> None:
    found = flexlora([factors(0, 3, gain_O=torch.ones(5)), factors(1, 3, bias_O=torch.ones(5))], [1.0, 3.0], rank=1).factors
    assert torch.equal(found.gain_O, torch.full((5,), 0.25))
    assert torch.equal(found.bias_O, torch.full((5,), 0.75))


@pytest.mark.parametrize("outer", ["core_space", "knots", "pico"])
@pytest.mark.parametrize("name", ["ffa", "hetlora"])
def test_in_other_coordinates_a_rule_on_factors_is_refused(outer: str, name: str) -> None:
    with pytest.raises(lw.WeightingError, match=f"inner='{name}' mixes the factors"):
        registry.get("methods", outer)(frozen(2), [1.0, 1.0], inner=name)


def test_norms_are_those_of_the_model_or_of_a_layer() -> None:
    clients = [lw.Adapter(str(seed), "tiny", {"q": factors(seed, 2)}) for seed in range(2)]
    with pytest.raises(lw.WeightingError, match="method 'hetlora' got norms="):
        lw.merge(clients, method="hetlora", norms="matrix", progress=False)
