"""pFedLoRA with clients of different architectures: a round written out, what is shared, and what is refused."""

from __future__ import annotations

import pytest
import torch
from tiny_models import draw_model
from torch.nn import functional
from transformers import BertConfig, BertLMHeadModel

import loraweave as lw
from loraweave.errors import CompositionError, TrainingError, UnknownName
from loraweave.extensions.federated.strategies._strategy import Order
from loraweave.hub.base import fingerprint

SIZES = {"upper": 4, "double": 3, "count": 2}
TARGETS = ("q_proj", "v_proj", "query", "intermediate.dense")
A, B = "lm_head.a_RI", "lm_head.b_OR"


@pytest.fixture
def deep(make_model):
    """A deeper and wider Llama than the others' model, with the same hidden size and vocabulary."""
    return make_model("llama", num_hidden_layers=3, intermediate_size=40, num_attention_heads=2)


@pytest.fixture
def bert():
    """Another kind of network, whose output layer has another path and a bias."""
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
    return draw_model(lambda: BertLMHeadModel(BertConfig(**sizes, **ids, is_decoder=True)))


@pytest.fixture
def run(federate, deep, bert):
    """A federation of three architectures."""

    def federated(**settings):
        given = {"models": {"double": deep, "count": bert}, "target_modules": TARGETS, "options": {"mu": 0.3}}
        return federate("pfedlora", **{**given, **settings})

    return federated


def hidden_states(model, ids_BT):
    """What the output layer is called with."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=ids_BT)
    handle.remove()
    return seen[0]


def losses_of(model, rows, a_RI, b_OR):
    """The mean losses of the rows' target tokens by the adapter b a h alone, and by the network W h."""
    count = sum(len(row.target) for row in rows)
    adapter, network = torch.zeros(()), torch.zeros(())
    for row in rows:
        hidden = hidden_states(model, torch.tensor([[*row.prompt, *row.target]]))[0, len(row.prompt) - 1 : -1]
        targets, head = torch.tensor(row.target), model.get_output_embeddings()
        adapter = adapter + functional.cross_entropy(hidden @ a_RI.T @ b_OR.T, targets, reduction="sum") / count
        network = network + functional.cross_entropy(head(hidden), targets, reduction="sum") / count
    return adapter, network


def is_first_step(moved, gradient, lr):
    """The first step of AdamW is lr against the gradient's sign."""
    clear = gradient.abs() > 1e-4 * gradient.abs().max()
    torch.testing.assert_close(moved[clear], -lr * gradient.sign()[clear], rtol=1e-2, atol=1e-6)


@pytest.mark.own_models
@pytest.mark.parametrize("client", SIZES)
def test_a_round_of_each_architecture_is_that_of_the_formula(run, client):
    mu, lr = 0.3, 1e-3
    # a batch is all rows of the client
    found = run(rounds=1, steps=1, batch_size=SIZES[client], warmup=0, lr=lr)
    own, strategy = found.course.of(client), found.strategy
    generator = torch.Generator().manual_seed(1)
    server = {A: torch.randn(2, 16, generator=generator), B: torch.randn(61, 2, generator=generator)}
    trained = strategy.train(found.course, Order(client, 1, server, {}))
    rows = own.clients[client].rows

    # first the network, by both losses
    model, weights = own.model, {layer: own.model.get_submodule(layer).weight for layer in own.layers}
    for weight in weights.values():
        weight.requires_grad_(True)
    adapter, network = losses_of(model, rows, server[A], server[B])
    total = mu * adapter + (1 - mu) * network
    assert trained.losses[0] == pytest.approx(float(total.detach()), rel=1e-5)
    gradients = torch.autograd.grad(total, list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    for layer, gradient in zip(weights, gradients, strict=True):
        is_first_step(trained.own[layer], gradient, lr)

    # then the adapter, by its own, on the network as it is now
    for layer, weight in weights.items():
        weight += trained.own[layer]
    # in units in which the adapter is s b a
    parts = [server[A].clone().requires_grad_(), (server[B] / own.scale).requires_grad_()]
    adapter, _ = losses_of(model, rows, parts[0], own.scale * parts[1])
    assert trained.losses[1] == pytest.approx(float(adapter.detach()), rel=1e-5)
    for part, name, unit, gradient in zip(parts, (A, B), (1, own.scale), torch.autograd.grad(adapter, parts), strict=True):
        is_first_step(trained.update[name] / unit - part.detach(), gradient, lr)


@pytest.mark.own_models
def test_clients_of_all_architectures_send_the_same_small_adapter_which_is_averaged_by_size(run):
    found = run(rounds=1)
    course, strategy = found.course, found.strategy
    first = strategy.first(course)
    updates = {name: strategy.train(course, Order(name, 1, first, {})).update for name in SIZES}
    for name in (A, B):
        mean = sum(size / 9 * updates[client][name].double() for client, size in SIZES.items())
        torch.testing.assert_close(found.state.server[name].double(), mean, rtol=1e-6, atol=1e-7)
    assert set(found.state.server) == {A, B}
    # nothing of a network leaves its client
    assert found.rounds[0].bytes_up == 3 * 4 * 2 * (16 + 61)
    assert {len(own) for own in found.state.own.values()} == {2 * 2, 2 * 3, 2}


def test_a_client_has_an_adapter_of_its_own_model(run, deep, bert):
    found = run()
    for client, model, head in (("double", deep, "lm_head"), ("count", bert, "cls.predictions.decoder")):
        adapter, own = found.client(client), found.state.own[client]
        assert adapter.fingerprint == fingerprint(model)
        assert set(adapter.layers) == {*own, head}
        ids = torch.tensor([[5, 9, 7, 8]])
        with lw.Composer(model, {"it": adapter}).activate({"it": 1.0}), torch.no_grad():
            got = model(input_ids=ids).logits
        for layer, moved in own.items():
            model.get_submodule(layer).weight.data += moved
        with torch.no_grad():
            shared = 0.3 * found.state.server[B] @ found.state.server[A]
            expected = model(input_ids=ids).logits + hidden_states(model, ids) @ shared.T
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_same_models_go_on_where_they_were_and_others_begin_anew(run, bert, tmp_path, make_model):
    kept = run(checkpoint=tmp_path)
    again = run(checkpoint=tmp_path)
    assert again.adapter.hash == kept.adapter.hash
    assert again.rounds == kept.rounds
    run(checkpoint=tmp_path, models={"double": make_model("llama", num_hidden_layers=1), "count": bert})
    assert len(list((tmp_path / "running").iterdir())) == 2


def test_models_of_clients_are_as_they_were(run, deep, bert):
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (deep, bert)]
    run(rounds=1, steps=1)
    for values, model in zip(before, (deep, bert), strict=True):
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"hidden_size": 24},
            r"client 'double' has the shape \(61, 24\) \(vocabulary, hidden size\), and the model's \(61, 16",
        ),
        ({"vocab_size": 64}, r"client 'double' has the shape \(64, 16\)"),
    ],
)
def test_models_that_no_adapter_fits_alike_are_refused_before_the_first_round(federate, make_model, changes, says, tmp_path):
    with pytest.raises(TrainingError, match=says):
        federate("pfedlora", models={"double": make_model("llama", **changes)}, checkpoint=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_models_cannot_be_is_refused_by_name(federate, deep, bert):
    with pytest.raises(
        TrainingError, match="'fedavg' exchanges updates of one model, and models has one of client 'double'"
    ):
        federate("fedavg", models={"double": deep})
    with pytest.raises(UnknownName, match="models has 'doubel', did you mean 'double'"):
        federate("pfedlora", models={"doubel": deep})
    with pytest.raises(CompositionError):
        federate("pfedlora", models={"double": "a folder"})
    with pytest.raises(TrainingError, match="models is"):
        federate("pfedlora", models=[deep])
    with pytest.raises(UnknownName, match="the model of client 'double': no linear layer matches 'q_proj'"):
        federate("pfedlora", models={"double": bert})
    with pytest.raises(UnknownName, match="no linear layer matches 'nowhere'"):
        federate("pfedlora", models={"double": bert}, target_modules=(*TARGETS, "nowhere"))
    with pytest.raises(TrainingError, match=r"'cls\.predictions\.decoder': leave it out"):
        federate("pfedlora", models={"double": bert}, target_modules=(*TARGETS, "cls.predictions.decoder"))
