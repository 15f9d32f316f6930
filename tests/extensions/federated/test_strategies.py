"""Each strategy against its paper's formula, written out on a tiny model."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

import loraweave as lw
from loraweave.errors import TrainingError, WeightingError
from loraweave.extensions.federated.rounds import here
from loraweave.extensions.federated.strategies import slora as slora_module
from loraweave.extensions.federated.strategies._privacy import length
from loraweave.extensions.federated.strategies._strategy import Order, layers_of

SIZES = {"upper": 4, "double": 3, "count": 2}
LAYER = "model.layers.0.self_attn.q_proj"


def updates_of(found, *, state=None, number=1):
    """{client: what it trains in a round from a state of the server}, by the strategy's own methods."""
    course, strategy = found.course, found.strategy
    server = strategy.first(course) if state is None else state
    trained = {}
    for name, client in course.clients.items():
        order = Order(name, number, strategy.sent(course, server, client, {}), {})
        ((_, trained[name]),) = here(course, strategy, [order])
    return trained


def shares(names=SIZES):
    return {name: SIZES[name] / sum(SIZES[each] for each in names) for name in names}


def delta(update, layer=LAYER):
    factors = layers_of(update)[layer]
    return factors.b_OR.double() @ factors.a_RI.double()


def weighted(updates, name):
    return sum(share * updates[client].update[name].double() for client, share in shares().items())


def loss_with(found, client, delta_of):
    """The mean loss of a client's rows, every layer's weight being W + delta_of[layer], by transformers' own labels."""
    model, rows = found.course.model, found.course.clients[client].rows
    kept = {layer: model.get_submodule(layer).weight.data.clone() for layer in delta_of}
    try:
        for layer, change in delta_of.items():
            model.get_submodule(layer).weight.data += change.float()
        total, count = 0.0, 0
        with torch.no_grad():
            for row in rows:
                ids = torch.tensor([[*row.prompt, *row.target]])
                labels = torch.tensor([[*[-100] * len(row.prompt), *row.target]])
                total += float(model(input_ids=ids, labels=labels).loss) * len(row.target)
                count += len(row.target)
        return total / count
    finally:
        for layer, weight in kept.items():
            model.get_submodule(layer).weight.data = weight


def test_a_clients_round_is_a_training_of_its_rows_from_what_it_received(federate):
    found = federate("fedavg", rounds=1)
    trained = updates_of(found)
    for client in SIZES:
        changes = {layer: delta(trained[client].update, layer) for layer in found.course.layers}
        assert loss_with(found, client, changes) < loss_with(found, client, {})


def test_fedavg_averages_a_and_b_by_the_clients_sizes(federate):
    found = federate("fedavg", rounds=1)
    trained = updates_of(found)
    for name in (f"{LAYER}.a_RI", f"{LAYER}.b_OR"):
        torch.testing.assert_close(found.state.server[name].double(), weighted(trained, name), rtol=1e-6, atol=1e-7)


def test_the_second_round_begins_with_what_the_first_has_made(federate):
    once, twice = federate("fedavg", rounds=1), federate("fedavg", rounds=2)
    trained = updates_of(once, state=once.state.server, number=2)
    for name, value in twice.state.server.items():
        torch.testing.assert_close(value.double(), weighted(trained, name), rtol=1e-6, atol=1e-7)


def test_ffa_has_the_mean_update_because_no_a_has_moved(federate):
    found = federate("ffa", rounds=1)
    trained = updates_of(found)
    for layer in found.course.layers:
        a_RI = found.adapter.layers[layer].a_RI
        assert a_RI.any()
        mean = sum(
            share * trained[name].update[f"{layer}.b_OR"].double() @ a_RI.double() for name, share in shares().items()
        )
        torch.testing.assert_close(found.adapter.delta(layer).double(), mean, rtol=1e-5, atol=1e-8)
    assert all(name.endswith(".b_OR") for name in found.state.server)


def test_flexlora_has_the_best_cut_of_the_mean_update_and_each_client_the_cut_to_its_rank(federate):
    found = federate("flexlora", rounds=1, ranks={"double": 1, "count": 3})
    trained = updates_of(found)
    mean = sum(share * delta(trained[name].update) for name, share in shares().items())
    u_OK, sigma_K, vh_KI = torch.linalg.svd(mean)
    for client, rank in {"double": 1, "upper": 2, "count": 3}.items():
        best = u_OK[:, :rank] @ torch.diag(sigma_K[:rank]) @ vh_KI[:rank]
        got = found.client(client)
        assert got.layers[LAYER].rank == rank
        torch.testing.assert_close(got.delta(LAYER).double(), best, rtol=1e-4, atol=1e-7)


def test_hetlora_pads_with_zeros_and_weighs_by_the_norms_of_whole_updates(federate):
    found = federate("hetlora", rounds=1, ranks={"double": 1, "count": 3})
    trained = updates_of(found)
    norms = {
        name: math.sqrt(sum(float(delta(each.update, layer).square().sum()) for layer in found.course.layers))
        for name, each in trained.items()
    }
    a_RI, b_OR = torch.zeros(3, 16).double(), torch.zeros(16, 3).double()
    for name, each in trained.items():
        factors, weight = layers_of(each.update)[LAYER], norms[name] / sum(norms.values())
        a_RI[: factors.rank] += weight * factors.a_RI.double()
        b_OR[:, : factors.rank] += weight * factors.b_OR.double()
    torch.testing.assert_close(found.state.server[f"{LAYER}.a_RI"].double(), a_RI, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.state.server[f"{LAYER}.b_OR"].double(), b_OR, rtol=1e-5, atol=1e-7)
    small = found.client("double").layers[LAYER]
    torch.testing.assert_close(small.a_RI, found.state.server[f"{LAYER}.a_RI"][:1])
    torch.testing.assert_close(small.b_OR, found.state.server[f"{LAYER}.b_OR"][:, :1])


def tail(update, kept):
    return sum(float(f.b_OR[:, kept:].norm() * f.a_RI[kept:].norm()) for f in layers_of(update).values())


@pytest.mark.parametrize(("strength", "prunes"), [(1e4, True), (0.0, False)])
def test_a_client_of_hetlora_drops_its_last_rank_rows_where_their_norms_have_shrunk(federate, strength, prunes):
    found = federate("hetlora", rounds=1, ranks={"count": 3}, options={"strength": strength, "gamma": 0.7})
    state = {name: value + (0.1 if name.endswith(".b_OR") else 0.0) for name, value in found.state.server.items()}
    own = updates_of(found, state=state)["count"]
    # floor(0.7 * 3) rows stay
    rank = layers_of(own.update)[LAYER].rank
    assert (rank, int(own.own["rank"])) == ((2, 2) if prunes else (3, 3))
    if not prunes:
        assert tail(own.update, 2) >= tail(state, 2)
    sent = found.strategy.sent(found.course, state, found.course.clients["count"], own.own)
    assert layers_of(sent)[LAYER].rank == rank


def test_the_first_round_of_hetlora_prunes_nothing(federate):
    found = federate("hetlora", rounds=1, options={"strength": 1e4})
    assert {int(own["rank"]) for own in found.state.own.values()} == {2}


def test_slora_trains_the_same_few_entries_at_all_clients_and_averages_them(federate):
    found = federate("slora", rounds=2, options={"density": 0.1})
    course, strategy = found.course, found.strategy
    places = {layer: strategy.places(course, layer) for layer in course.layers}
    assert len(places[LAYER]) == round(0.1 * 16 * 16) == len(places[LAYER].unique())
    trained = updates_of(found)
    mean = torch.zeros(16 * 16, dtype=torch.float64)
    mean[places[LAYER]] = weighted(trained, LAYER + slora_module.VALUES)
    # what a client has learned is an update of the weight at those places
    changes = {}
    for layer, shape in course.layers.items():
        flat = torch.zeros(shape[0] * shape[1])
        flat[places[layer]] = trained["upper"].update[layer + slora_module.VALUES]
        changes[layer] = flat.view(shape)
    assert loss_with(found, "upper", changes) < loss_with(found, "upper", {})
    # its cut to the rank begins the LoRA
    begun = strategy.aggregate(course, strategy.first(course), {n: t.update for n, t in trained.items()}, 1)
    u_OK, sigma_K, vh_KI = torch.linalg.svd(mean.view(16, 16))
    torch.testing.assert_close(delta(begun), u_OK[:, :2] @ torch.diag(sigma_K[:2]) @ vh_KI[:2], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(begun[f"{LAYER}.b_OR"].norm(dim=0).double(), sigma_K[:2].sqrt(), rtol=1e-4, atol=1e-6)
    # and the next round averages its factors
    second = updates_of(found, state=begun, number=2)
    name = f"{LAYER}.a_RI"
    torch.testing.assert_close(found.state.server[name].double(), weighted(second, name), rtol=1e-6, atol=1e-7)


def test_federa_begins_as_the_largest_singular_values_of_the_weight_and_changes_nothing_at_first(federate):
    found = federate("federa", rounds=1)
    first = found.strategy.first(found.course)
    weight_OI = found.course.model.get_submodule(LAYER).weight.detach().double()
    u_OK, sigma_K, vh_KI = torch.linalg.svd(weight_OI)
    factors = layers_of(first)[LAYER]
    torch.testing.assert_close(delta(first), u_OK[:, :2] @ torch.diag(sigma_K[:2]) @ vh_KI[:2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(factors.b_OR.norm(dim=0).double(), sigma_K[:2].sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(factors.a_RI.norm(dim=1).double(), sigma_K[:2].sqrt(), rtol=1e-5, atol=1e-6)
    begun = found.strategy.layers(found.course, first)[LAYER]
    assert float((begun.b_OR @ begun.a_RI).abs().max()) < 1e-6


def test_a_client_of_federa_trains_beside_the_rest_of_the_weight(federate):
    found = federate("federa", rounds=1)
    first = found.strategy.first(found.course)
    trained = updates_of(found)
    changes = {layer: delta(trained["upper"].update, layer) - delta(first, layer) for layer in found.course.layers}
    assert loss_with(found, "upper", changes) < loss_with(found, "upper", {})
    for name in (f"{LAYER}.a_RI", f"{LAYER}.b_OR"):
        torch.testing.assert_close(found.state.server[name].double(), weighted(trained, name), rtol=1e-6, atol=1e-7)
    moved = delta(found.state.server) - delta(first)
    torch.testing.assert_close(found.adapter.delta(LAYER).double(), moved, rtol=1e-3, atol=1e-6)


def test_dp_fedavg_adds_noise_to_the_sum_of_clipped_updates(federate):
    pytest.importorskip("opacus")
    clip = 0.05
    found = federate("dp_fedavg", rounds=1, options={"clip": clip, "epsilon": 5.0, "delta": 1e-3})
    course, strategy = found.course, found.strategy
    first = strategy.first(course)
    plain = updates_of(federate("fedavg", rounds=1))
    expected = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in first.items()}
    for trained in plain.values():
        moved = {name: value.double() - first[name].double() for name, value in trained.update.items()}
        size = math.sqrt(sum(float(value.square().sum()) for value in moved.values()))
        assert size > clip
        for name, value in moved.items():
            expected[name] += value * clip / size
    noises = [found.state.server[n].double() - first[n].double() - expected[n] / 3 for n in first]
    noise = torch.cat([value.flatten() for value in noises])
    sigma = found.figures["noise_multiplier"] * clip / 3
    # of so many normal numbers the mean square is within 4 standard errors, 4 sqrt(2 / n)
    assert float((noise / sigma).square().mean()) == pytest.approx(1.0, abs=4 * math.sqrt(2 / len(noise)))
    assert abs(float((noise / sigma).mean())) < 4 / math.sqrt(len(noise))


def test_what_a_client_of_dp_fedavg_sends_is_never_longer_than_the_clip(federate):
    pytest.importorskip("opacus")
    found = federate("dp_fedavg", rounds=1, options={"clip": 0.05})
    first = found.strategy.first(found.course)
    trained = updates_of(found)
    assert all(length(each.update.values()) <= 0.05 * (1 + 1e-6) for each in trained.values())
    # nor does the server count a client that does not keep to it with more
    honest = {name: each.update for name, each in trained.items()}
    greedy = honest | {"upper": {name: 1000 * value for name, value in honest["upper"].items()}}
    both = [found.strategy.aggregate(found.course, first, updates, 1) for updates in (honest, greedy)]
    for name in first:
        torch.testing.assert_close(both[0][name], both[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
def test_the_noise_of_dp_fedavg_keeps_to_its_epsilon(federate, epsilon):
    pytest.importorskip("opacus")
    found = federate("dp_fedavg", rounds=4, steps=1, options={"epsilon": epsilon, "delta": 1e-3})
    sigma = found.figures["noise_multiplier"]

    # every client in every round: T Gaussian mechanisms have Renyi divergence T a / (2 sigma^2) of order a
    # (Mironov 2017), which is epsilon by Balle et al. 2020
    def spent(order):
        renyi = 4 * order / (2 * sigma**2)
        return renyi + math.log((order - 1) / order) - (math.log(1e-3) + math.log(order)) / (order - 1)

    least = min(spent(1 + step / 100) for step in range(1, 20000))
    assert found.figures["epsilon"] == pytest.approx(least, rel=0.02)
    assert epsilon - 0.05 <= found.figures["epsilon"] <= epsilon


def test_dp_fedavg_draws_each_client_by_itself_and_a_round_without_any_is_noise(federate):
    pytest.importorskip("opacus")
    found = federate("dp_fedavg", rounds=6, steps=1, participation=0.3, options={"delta": 1e-3})
    drawn = [len(each.losses) for each in found.rounds]
    assert min(drawn) == 0 < max(drawn)
    assert found.figures["sample_rate"] == 0.3


def test_the_card_of_dp_fedavg_tells_nothing_of_clients_and_seed(federate):
    pytest.importorskip("opacus")
    card = federate("dp_fedavg", rounds=1, steps=1, seed=12345).adapter.card
    assert set(card["federation"]) == {"epsilon", "delta", "noise_multiplier", "sample_rate"}
    assert not any(said in str(card) for said in ("12345", *SIZES, "losses", "left_out"))


@pytest.mark.own_models
def test_pfedlora_weighs_the_losses_of_adapter_and_network_by_mu(federate):
    """The gradient of a client's weights, against autograd on mu CE(b a h) + (1 - mu) CE(W_out h) written out."""
    found = federate("pfedlora", rounds=1, steps=1, batch_size=4, options={"mu": 0.3}, warmup=0, lr=1e-3)
    course, model = found.course, found.course.model
    server = {"lm_head.a_RI": torch.randn(2, 16), "lm_head.b_OR": torch.randn(61, 2)}
    trained = updates_of(found, state=server)["upper"]
    weights = {layer: model.get_submodule(layer).weight for layer in course.layers}
    total = torch.zeros(())
    for weight in weights.values():
        weight.requires_grad_(True)
    rows = course.clients["upper"].rows
    count = sum(len(row.target) for row in rows)
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.target]])
        hidden = model.model(input_ids=ids).last_hidden_state[0, len(row.prompt) - 1 : -1]
        targets = torch.tensor(row.target)
        network = functional.cross_entropy(model.lm_head(hidden), targets, reduction="sum")
        adapter_logits = hidden @ server["lm_head.a_RI"].T @ server["lm_head.b_OR"].T
        adapter = functional.cross_entropy(adapter_logits, targets, reduction="sum")
        total = total + (0.3 * adapter + 0.7 * network) / count
    assert trained.losses[0] == pytest.approx(float(total.detach()), rel=1e-5)
    gradients = torch.autograd.grad(total, list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    for layer, gradient in zip(weights, gradients, strict=True):
        # the first step of AdamW is lr against the gradient's sign, and at most half of one step is warm-up
        moved = trained.own[layer]
        clear = gradient.abs() > 1e-4 * gradient.abs().max()
        torch.testing.assert_close(moved[clear], -1e-3 * gradient.sign()[clear], rtol=1e-2, atol=1e-6)


def test_a_client_of_pfedlora_answers_with_its_network_and_mu_times_the_shared_adapter(federate):
    found = federate("pfedlora", options={"mu": 0.3})
    own, shared = found.state.own["upper"], found.state.server
    got = found.client("upper")
    for layer in found.course.layers:
        torch.testing.assert_close(got.delta(layer), own[layer])
    torch.testing.assert_close(got.delta("lm_head"), 0.3 * shared["lm_head.b_OR"] @ shared["lm_head.a_RI"])
    assert not torch.equal(own[LAYER], found.state.own["count"][LAYER])
    with lw.Composer(found.course.model, {"it": got}).activate({"it": 1.0}):
        pass


def test_the_server_of_pfedlora_averages_the_adapters_alone(federate):
    found = federate("pfedlora", rounds=1)
    trained = updates_of(found)
    assert set(found.state.server) == {"lm_head.a_RI", "lm_head.b_OR"}
    for name, value in found.state.server.items():
        torch.testing.assert_close(value.double(), weighted(trained, name), rtol=1e-6, atol=1e-7)


def test_fedms_freezes_the_global_expert_and_averages_the_gates(federate):
    stage, found = federate("fedavg", rounds=1), federate("fedms", rounds=2)
    for name, value in stage.state.server.items():
        assert torch.equal(found.state.server[name], value)
    before = {name: value for name, value in found.state.server.items() if not name.startswith("gate/")}
    with found.client("upper") as made, found.client("count") as other:
        for model in (made, other):
            torch.testing.assert_close(model.expert(0).delta(LAYER), stage.adapter.delta(LAYER))
        assert not torch.equal(made.expert(1).delta(LAYER), other.expert(1).delta(LAYER))
        gate = dict(made.gates.named_parameters())
        for name, value in gate.items():
            mean = sum(share * found.state.own[client][f"gates.{name}"].double() for client, share in shares().items())
            torch.testing.assert_close(value.detach().double(), mean, rtol=1e-6, atol=1e-8)
    assert len(before) == 2 * len(found.course.layers)


@pytest.mark.parametrize(("strategy", "option"), [("slora", "sparse_rounds"), ("fedms", "global_rounds")])
def test_a_stage_without_rounds_is_refused(federate, strategy, option):
    with pytest.raises(TrainingError, match=f"{option}=2 of 2 rounds"):
        federate(strategy, options={option: 2})


def test_a_capability_beyond_the_models_blocks_is_refused_before_the_first_round(federate, tmp_path):
    with pytest.raises(WeightingError, match="the queue has 2 blocks"):
        federate("fedms", options={"capability": 3}, checkpoint=tmp_path)
    assert not list(tmp_path.iterdir())


def test_pfedlora_refuses_an_adapter_on_a_target(federate):
    with pytest.raises(TrainingError, match="'lm_head': leave it out"):
        federate("pfedlora", target_modules=("lm_head",))
