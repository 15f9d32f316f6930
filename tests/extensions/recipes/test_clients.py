"""What clients of a federation exchange."""

from dataclasses import replace

import pytest
import torch

import loraweave as lw
from loraweave.errors import LayerMismatch, ScopeError, UnknownName, WeightingError
from loraweave.extend.recipes import put_expert
from loraweave.extensions.recipes import federated_average, fit_clusters

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


def test_it_is_the_average_of_factors_of_merge(make_model):
    clients = [client(make_model("llama"), seed) for seed in (1, 2, 3)]
    adapters = [replace(made.expert(0), name=str(number)) for number, made in enumerate(clients)]
    merged = lw.merge(adapters, [1.0, 2.0, 5.0], method="factor_average")
    federated_average(clients, [1, 2, 5], experts=(0,))
    for name in merged.layers:
        torch.testing.assert_close(clients[1].expert(0).delta(name), merged.delta(name))


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


@pytest.mark.parametrize("clients", [None, [], 3])
def test_no_list_of_clients_is_refused(clients):
    with pytest.raises(WeightingError, match="give a list of the expert models of all"):
        federated_average(clients, [1.0])


def test_experts_with_gains_are_not_exchanged(make_model, make_adapter):
    with lw.experts("multilora", make_model("llama"), rank=2) as made:
        before = {name: value.clone() for name, value in made.expert_state().items()}
        with pytest.raises(ScopeError, match="share a factor or have gains"):
            put_expert(made, 1, make_adapter(made.base_model, "one", rank=2))
        with pytest.raises(ScopeError, match="share a factor or have gains"):
            federated_average([made], [1.0], experts=(1,))
        assert all(torch.equal(value, before[name]) for name, value in made.expert_state().items())


@pytest.mark.parametrize(
    "ask", [lambda base: federated_average([base], [1.0], experts=(0,)), lambda base: fit_clusters(base, ["a text"])]
)
def test_a_base_alone_is_refused_with_the_way_out(make_model, ask):
    with pytest.raises(WeightingError, match=r"given LlamaForCausalLM, which has no experts: give what lw.experts"):
        ask(make_model("llama"))


def test_experts_that_are_no_updates_are_not_exchanged(make_model, make_adapter):
    model = make_model("llama")
    with lw.experts("mixlora", model) as made, pytest.raises(ScopeError, match="'mixlora' are not updates of layers"):
        put_expert(made, 0, make_adapter(model, "given"))
