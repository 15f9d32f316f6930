"""Text-to-LoRA on a tiny model: what is made, what it learns of, and how it is kept."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from rounding import assert_near, num_terms

import loraweave as lw
from loraweave.composer.model.scoring import losses
from loraweave.composer.train import hypernetwork
from loraweave.composer.train.hypernetwork import Hypernetwork, squared_distance, train_hypernetwork
from loraweave.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    AdapterUnsupported,
    DimensionMismatch,
    InvalidLicense,
    InvalidTask,
    TrainingError,
)
from loraweave.hub.embedders.form import Form
from loraweave.hub.pool import OnDemand
from loraweave.lowrank import algebra

SAID = {
    "upper": ("Write it in capital letters.", [("a", "A"), ("b", "B"), ("c", "C")]),
    "count": ("Say how many there are", [("one", "1"), ("two", "2"), ("three", "3")]),
    "double": ("twice", [("ab", "abab"), ("f", "ff")]),
}
SMALL = {"embedder": "hashing", "width": 16, "rank": 2, "progress": False, "tasks_per_step": 3}


@pytest.fixture
def hub(tmp_path, tiny_llama, make_adapter):
    with lw.Hub(tmp_path / "hub") as made:
        for number, (name, (description, examples)) in enumerate(SAID.items()):
            adapter = make_adapter(tiny_llama, name, rank=number + 1, seed=number)
            made.add(adapter, description=description, examples=examples)
        yield made


@pytest.fixture
def network(hub):
    return train_hypernetwork(hub, steps=2, **SMALL)


def distance(one, other):
    """Of two adapters' dense updates, as a share of the first one's size."""
    deltas = [(one.delta(layer), other.delta(layer)) for layer in one.layers]
    return float(sum((a - b).square().sum() for a, b in deltas) / sum(a.square().sum() for a, _ in deltas))


def test_training_opens_an_adapter_once_however_many_steps_it_has_a_turn_in(hub, monkeypatch):
    monkeypatch.setitem(OnDemand.__init__.__kwdefaults__, "num_kept", 1)
    opened, own = Counter(), type(hub)._get_pinned
    monkeypatch.setattr(type(hub), "_get_pinned", lambda hub, name, *of: opened.update([name]) or own(hub, name, *of))
    train_hypernetwork(hub, steps=4, **SMALL)
    assert opened == dict.fromkeys(SAID, 1)


def test_the_distance_of_products_is_that_of_the_dense_updates():
    a, b, their_a, their_b = (torch.randn(2, 3, *size, dtype=torch.float64) for size in ((2, 7), (5, 2), (4, 7), (5, 4)))
    dense = (b @ a - their_b @ their_a).square().sum(dim=(-2, -1))
    assert torch.allclose(squared_distance(a, b, their_a, their_b), dense)


def test_it_gives_back_the_adapters_that_it_was_trained_on_when_it_is_told_of_their_tasks(hub):
    network = train_hypernetwork(hub, steps=400, lr=1e-2, **{**SMALL, "rank": 3})
    for name, (description, examples) in SAID.items():
        for said in (
            {"description": description},
            {"examples": examples},
            {"description": description, "examples": examples},
        ):
            made = network.adapter(name="made", **said)
            errors = {other: distance(hub[other], made) for other in SAID}
            assert errors[name] < 0.1 < 0.7 < min(errors[other] for other in SAID if other != name)


def test_through_the_model_it_learns_to_answer_each_task_by_its_description(hub, tiny_llama, tokenizer):
    before = [parameter.clone() for parameter in tiny_llama.parameters()]
    network = train_hypernetwork(hub, tiny_llama, tokenizer, steps=60, lr=1e-2, **SMALL)
    assert all(map(torch.equal, before, tiny_llama.parameters()))
    found = {}
    for told in SAID:
        engine = lw.Composer(tiny_llama, {"made": network.adapter(description=SAID[told][0])})
        for name, (description, examples) in SAID.items():
            task = lw.Task(examples, instruction=description)
            with engine.activate({"made": 1.0}):
                found[told, name] = sum(losses(tiny_llama, tokenizer, task, task.examples))
            if told == name:
                alone = sum(losses(tiny_llama, tokenizer, task, task.examples))
                assert found[told, name] < 0.7 * alone
    for name in SAID:
        assert found[name, name] == min(found[told, name] for told in SAID)


def test_its_first_loss_is_the_bases_and_its_loss_on_factors_the_mean_square_over_that_of_the_pool(
    hub, tiny_llama, tokenizer, monkeypatch
):
    seen = []
    original = hypernetwork.descend

    def noted(learners, loss, *rest, **settings):
        seen.append(float(loss(0).detach()))
        return original(learners, loss, *rest, **settings)

    monkeypatch.setattr(hypernetwork, "descend", noted)
    # all rows of all tasks
    train_hypernetwork(hub, tiny_llama, tokenizer, names=["upper", "count"], steps=1, rows_per_task=3, **SMALL)
    train_hypernetwork(hub, steps=1, **SMALL)
    means = []
    for name in ("upper", "count"):
        task = lw.Task(SAID[name][1], instruction=SAID[name][0])
        sizes = [len(tokenizer(target)["input_ids"]) for _, target in task.examples]
        assert len(set(sizes)) == 1
        means.append(sum(losses(tiny_llama, tokenizer, task, task.examples)) / 3)
    # a network that makes zeros is as far as the pool is large, by definition of the scales
    assert seen == [pytest.approx(sum(means) / 2, rel=1e-4), pytest.approx(1.0, rel=1e-4)]


def test_an_adapter_is_what_the_authors_network_computes_for_each_layer(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        made = network.adapter(description="Say how many there are", examples=SAID["count"][1][:1])
        said = torch.from_numpy(network.embedder.embed(["Say how many there are"])[0])
        shown = torch.from_numpy(network.embedder.embed(["one\n1"])[0])
        for layer, factors in made.layers.items():
            depth, module = int(layer.split(".")[2]), layer.split(".", 3)[3]
            types = [name.split(".", 3)[3] for name, *_ in network.types]
            number = types.index(module)
            x = torch.cat([network.of_text(torch.cat([said, shown])), network.of_depth(torch.tensor(depth))])
            x = torch.cat([x, network.of_type(torch.tensor(number))])
            first, act, second, _, block, other, norm, third, _, fourth, _ = network.trunk
            x = act(second(act(first(x))))
            for part in (block.inner, other.inner):
                x = x + act(part[3](act(part[1](part[0](x)))))
            x = act(fourth(act(third(norm(x)))))
            place = sorted(int(name.split(".")[2]) for name in network.layers if name.endswith(module)).index(depth)
            both = network.heads[number].weight @ x + network.offsets[number][place]
            num_out, num_in = network.layers[layer]
            scale = network.scales_L[list(network.layers).index(layer)]
            num_sums = num_terms(network)
            assert_near(factors.a_RI, both[: 2 * num_in].view(2, num_in), num_sums, both.abs().max())
            assert_near(factors.b_OR, scale * both[2 * num_in :].view(2, num_out).T, num_sums, scale * both.abs().max())


def test_it_begins_at_the_base_with_the_size_of_each_layers_updates(hub):
    base, layers, scales = hypernetwork._surveyed(hub.pool().__getitem__, hub.records(), False)
    fresh = Hypernetwork(base, layers, Form())
    assert all(algebra.is_zero(factors) for factors in fresh.adapter(description="x").layers.values())
    for layer, scale in scales.items():
        squares = [float(hub[name].delta(layer).square().sum()) for name in SAID]
        assert scale == pytest.approx((sum(squares) / 3) ** 0.5, rel=1e-4)


def test_it_is_saved_and_opened_and_its_adapters_are_stored(hub, network, tmp_path):
    folder = network.save_pretrained(tmp_path / "network")
    made = network.adapter(description="twice", name="made")
    opened = Hypernetwork.from_pretrained(folder, embedder="hashing")
    assert opened.adapter(description="twice").hash == made.hash
    hub.add(made)
    assert hub.record("made").parents == tuple(record.hash for record in hub.records() if record.name != "made")
    assert network.save_pretrained(folder) == folder
    again = train_hypernetwork(hub, names=list(SAID), steps=2, start=opened, **SMALL)
    assert again.adapter(description="twice").hash != made.hash == opened.adapter(description="twice").hash


def test_the_same_seed_gives_the_same_bits_and_leaves_the_callers_numbers(hub):
    state = torch.get_rng_state()
    one, other = (train_hypernetwork(hub, steps=2, seed=5, **SMALL).adapter(description="x") for _ in range(2))
    assert one.hash == other.hash != train_hypernetwork(hub, steps=2, seed=6, **SMALL).adapter(description="x").hash
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_that_was_changed_is_refused(network, tmp_path):
    folder = network.save_pretrained(tmp_path / "network")
    with pytest.raises(DimensionMismatch, match=r"reads vectors of embedder 'hashing.*, not 'form:1'"):
        Hypernetwork.from_pretrained(folder, embedder=Form())
    said = json.loads((folder / "hypernetwork.json").read_text())
    said["options"]["width"] = 10**6
    (folder / "hypernetwork.json").write_text(json.dumps(said))
    with pytest.raises(AdapterCorrupt, match="is no whole hypernetwork"):
        Hypernetwork.from_pretrained(folder, embedder="hashing")
    network.save_pretrained(folder)
    (folder / "hypernetwork.safetensors").write_bytes(b"")
    with pytest.raises(AdapterCorrupt):
        Hypernetwork.from_pretrained(folder, embedder="hashing")
    with pytest.raises(AdapterNotFound, match=r"is no hypernetwork: it has no hypernetwork\.json"):
        Hypernetwork.from_pretrained(tmp_path, embedder="hashing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(TrainingError, match="holds something that is no hypernetwork"):
        network.save_pretrained(tmp_path / "other")


def test_what_nothing_can_be_learned_from_is_refused_by_name(hub, network, tiny_llama, tokenizer, make_adapter):
    with pytest.raises(InvalidTask, match="nothing is said of the task"):
        network.adapter(description=" ")
    with pytest.raises(InvalidTask, match="description is None; it must be a text"):
        network.adapter(description=None)
    with pytest.raises(TrainingError, match="names 'upper', a list of names"):
        train_hypernetwork(hub, names="upper", **SMALL)
    with pytest.raises(TrainingError, match="1 adapters are no pool"):
        train_hypernetwork(hub, names=["upper"], **SMALL)
    with pytest.raises(TrainingError, match="pass model and tokenizer both"):
        train_hypernetwork(hub, tiny_llama, **SMALL)
    start = Hypernetwork(network.base, dict([*network.layers.items()][:1]), network.embedder)
    with pytest.raises(TrainingError, match="start makes 1 layers, the adapters have"):
        train_hypernetwork(hub, start=start, **SMALL)
    with pytest.raises(TrainingError, match="steps=0"):
        train_hypernetwork(hub, steps=0, **SMALL)
    hub.add(make_adapter(tiny_llama, "bare", rank=2, seed=9), description="b")
    with pytest.raises(InvalidTask, match="'bare' has no outputs"):
        train_hypernetwork(hub, tiny_llama, tokenizer, **SMALL)
    hub.update("bare", description="")
    with pytest.raises(InvalidTask, match="'bare' has neither description nor examples"):
        train_hypernetwork(hub, **SMALL)
    hub.update("bare", description="c", license="CC-BY-NC-ND-4.0")
    with pytest.raises(InvalidLicense):
        train_hypernetwork(hub, **SMALL)
    assert train_hypernetwork(hub, steps=1, allow_licenses=True, **SMALL).recipe["license"]
    layer, factors = next(iter(hub["upper"].layers.items()))
    biased = replace(hub["upper"], layers={layer: replace(factors, bias_O=torch.ones(len(factors.b_OR)))})
    hub.add(biased, name="biased", description="d")
    with pytest.raises(AdapterUnsupported, match=r"'biased': layer .* is no plain LoRA"):
        train_hypernetwork(hub, names=["upper", "biased"], **SMALL)
