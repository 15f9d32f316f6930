"""What clients of a federation exchange."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import loraweave as lw
from loraweave.errors import LayerMismatch, ScopeError, UnknownName, WeightingError
from loraweave.extensions.federated import federated_average, put_expert

IDS_BT = torch.tensor([[3, 9, 27, 20, 41], [6, 2, 25, 3, 15]])
SIZES = (100.0, 300.0)


def client(model, seed, **options):
    """One of recipe local_and_shared, or another, with experts and gates of its own."""
    made = lw.experts(
        options.pop("recipe", "local_and_shared"), model, **{"target_modules": ("q_proj", "v_proj"), **options}
    )
    generator = torch.Generator().manual_seed(seed)
    for layer in made.layers.values():
        random = [tuple(torch.randn(part.shape, generator=generator) for part in start) for start in layer.starts()]
        layer.reset(random)
    with torch.no_grad():
        for gate in made.gates.parameters():
            gate.copy_(torch.randn(gate.shape, generator=generator))
    return made


def test_what_is_exchanged_is_the_mean_by_shares_of_the_data(make_model):
    first, other = client(make_model("llama"), 1, alpha=4.0), client(make_model("llama"), 2, alpha=12.0)
    before = [made.expert(0) for made in (first, other)]
    federated_average([first, other], SIZES, experts=(0,))
    for name, factors in first.expert(0).layers.items():
        a, b = (each.layers[name] for each in before)
        torch.testing.assert_close(factors.a_RI, 0.25 * a.a_RI + 0.75 * b.a_RI)
        torch.testing.assert_close(factors.b_OR, 0.25 * a.b_OR + 0.75 * b.b_OR)
        torch.testing.assert_close(other.expert(0).delta(name), first.expert(0).delta(name))


def test_all_clients_get_the_product_of_the_averages_of_both_factors(make_model):
    clients = [client(make_model("llama"), seed) for seed in (1, 2, 3)]
    adapters = [replace(made.expert(0), name=str(number)) for number, made in enumerate(clients)]
    federated_average(clients, [1, 2, 5], experts=(0,))
    for name in adapters[0].layers:
        layers = [adapter.layers[name] for adapter in adapters]
        a_RI, b_OR = (
            sum(share * getattr(f, part) for share, f in zip((1 / 8, 2 / 8, 5 / 8), layers, strict=True))
            for part in ("a_RI", "b_OR")
        )
        torch.testing.assert_close(clients[1].expert(0).delta(name), b_OR @ a_RI)


def test_what_is_not_exchanged_stays_the_same_bits(make_model):
    clients = [client(make_model("llama"), seed) for seed in (1, 2)]
    before = [made.expert(1).hash for made in clients]
    federated_average(clients, SIZES, experts=(0,))
    assert [made.expert(1).hash for made in clients] == before


def test_clients_may_have_different_bases(make_model):
    site = ("model.layers.1.self_attn.q_proj",)
    deep = client(make_model("llama", num_hidden_layers=3), 1, target_modules=site)
    flat = client(make_model("llama"), 2, target_modules=site, rank=5)
    federated_average([deep, flat], SIZES, experts=(0,))
    torch.testing.assert_close(deep.expert(0).delta(site[0]), flat.expert(0).delta(site[0]), rtol=1e-5, atol=1e-5)


def test_gates_are_averaged_where_they_are_asked_for(make_model):
    clients = [client(make_model("llama"), seed, recipe="fedms") for seed in (1, 2)]
    gates = [made.gates["all"].r_EH.detach().clone() for made in clients]
    locals_before = [made.expert(1).hash for made in clients]
    federated_average(clients, SIZES)
    assert torch.equal(clients[0].gates["all"].r_EH, gates[0])
    federated_average(clients, SIZES, gates=True)
    for made in clients:
        torch.testing.assert_close(made.gates["all"].r_EH.detach(), 0.25 * gates[0] + 0.75 * gates[1])
    assert [made.expert(1).hash for made in clients] == locals_before


def test_clients_that_differ_in_what_they_exchange_are_refused_and_stay_as_they_were(make_model):
    first = client(make_model("llama"), 1)
    before = first.expert(0).hash
    for other, what in (
        (
            client(make_model("llama"), 2, shared_rank=3),
            r"expert 0 at 'model.layers.0.self_attn.q_proj' of client 1 \(local_and_shared\)",
        ),
        (client(make_model("llama"), 2, target_modules=("q_proj",)), "the layers with these experts of client 1"),
    ):
        with pytest.raises(LayerMismatch, match=f"{what} .* clients exchange what all have alike"):
            federated_average([first, other], SIZES, experts=(0,))
    assert first.expert(0).hash == before


@pytest.mark.parametrize("sizes", [None, 2.0, ("a", 1.0), (1.0,), (0.0, 0.0), (1.0, float("nan")), (2.0, -1.0)])
def test_sizes_that_are_none_are_refused(make_model, sizes):
    clients = [client(make_model("llama"), seed) for seed in (1, 2)]
    with pytest.raises(WeightingError, match="are not 2 amounts of data"):
        federated_average(clients, sizes, experts=(0,))


def test_an_expert_is_an_adapter_from_now_on(make_model, make_adapter):
    model = make_model("llama")
    adapter = make_adapter(model, "given", rank=3, targets=("q_proj",))
    made = put_expert(client(model, 1), 1, adapter)
    back = made.expert(1)
    for name in made.sites:
        expected = adapter.delta(name) if name in adapter.layers else torch.zeros_like(back.delta(name))
        torch.testing.assert_close(back.delta(name), expected)


def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(make_model, make_adapter):
    model = make_model("llama")
    made = client(model, 1)
    before = made.expert(0).hash
    with pytest.raises(LayerMismatch, match=r"updates 'model.layers.0.mlp.down_proj', which has no experts here"):
        put_expert(made, 0, make_adapter(model, "given", targets=("q_proj", "down_proj")))
    with pytest.raises(LayerMismatch, match=r"inputs and outputs \(5, 16, 16\) .* and expert 0 takes \(4, 16, 16\)"):
        put_expert(made, 0, make_adapter(model, "given", rank=5))
    with pytest.raises(UnknownName, match="recipe 'local_and_shared' has no expert 2 in any layer"):
        put_expert(made, 2, make_adapter(model, "given", rank=2))
    assert made.expert(0).hash == before


def test_experts_that_are_no_updates_are_not_exchanged(make_model, make_adapter):
    model = make_model("llama")
    with lw.experts("mixlora", model) as made, pytest.raises(ScopeError, match="'mixlora' are no updates of layers"):
        put_expert(made, 0, make_adapter(model, "given"))


@pytest.mark.parametrize("name", ["hydralora", "multilora"])
def test_experts_that_share_a_factor_or_have_gains_are_not_exchanged(make_model, make_adapter, name):
    with lw.experts(name, make_model("llama"), rank=2) as made:
        before = {name: value.clone() for name, value in made.expert_state().items()}
        with pytest.raises(ScopeError, match="share a factor or have gains"):
            put_expert(made, 1, make_adapter(made.base_model, "one", rank=2))
        with pytest.raises(ScopeError, match="share a factor or have gains"):
            federated_average([made], [1.0], experts=(1,))
        assert all(torch.equal(value, before[name]) for name, value in made.expert_state().items())


def test_an_expert_that_some_layers_have_not_is_averaged_in_the_others(make_model):
    clients = [lw.experts("mola", make_model("llama"), num_experts=(2, 3), rank=2, seed=seed) for seed in (0, 1)]
    own = [client.expert(2) for client in clients]
    federated_average(clients, [1.0, 3.0], experts=(0, 2))
    for client in clients:
        found = client.expert(2)
        assert {name.split(".")[2] for name in found.layers} == {"1"}
        for name, factors in found.layers.items():
            expected = own[0].layers[name].a_RI / 4 + own[1].layers[name].a_RI * 3 / 4
            torch.testing.assert_close(factors.a_RI, expected)


def test_an_expert_that_no_layer_has_is_refused(make_model):
    with lw.experts("switch", make_model("llama"), num_experts=2) as made, pytest.raises(UnknownName, match="no expert 9"):
        federated_average([made], [1.0], experts=(0, 9))


@pytest.mark.parametrize("given", [None, "adapter"])
def test_what_is_no_adapter_is_not_put_in(make_model, given):
    made = client(make_model("llama"), 1)
    before = made.expert(0).hash
    with pytest.raises(
        WeightingError, match=f"expert 0 of recipe 'local_and_shared' would be {given!r}, which is no adapter"
    ):
        put_expert(made, 0, given)
    assert made.expert(0).hash == before


@pytest.mark.parametrize(
    "ask",
    [
        lambda base: put_expert(base, 0, None),
        lambda base: federated_average([base], [1.0], experts=(0,)),
    ],
)
def test_a_base_alone_is_refused_with_the_way_out(make_model, ask):
    with pytest.raises(WeightingError, match=r"given LlamaForCausalLM, which has no experts: give what lw.experts"):
        ask(make_model("llama"))


@pytest.mark.parametrize("clients", [None, [], 3])
def test_no_list_of_clients_is_refused(clients):
    with pytest.raises(WeightingError, match="give a list of the expert models of all"):
        federated_average(clients, [1.0])
