"""What `experts` makes of a name, of stored adapters, and of a trained mixture with one more task or other options."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.composer.ensembles.reward_mixture import expert_rewards, train_reward_experts
from loraweave.composer.experts.make import fit_clusters, with_options, with_task
from loraweave.composer.experts.parts import closing_blocks, layer_sites
from loraweave.composer.merge import arithmetic
from loraweave.composer.model.kinds import conv, linear
from loraweave.errors import (
    AdapterUnsupported,
    BaseModelMismatch,
    CompositionError,
    LayerMismatch,
    ScopeError,
    UnknownName,
    WeightingError,
)
from loraweave.hub.base import fingerprint

IDS_BT = torch.tensor([[3, 9, 27, 20, 41], [6, 2, 25, 3, 15]])


def test_what_is_no_model_is_refused():
    with pytest.raises(CompositionError, match="'SmolLM2' is none: load it first"):
        lw.experts("mola", "SmolLM2")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_experts", 4, "a list, each of which is a whole number"),
        ("target_modules", "q_proj", "a list, each of which is a text"),
        ("as_released", 1, "True or False"),
        ("alpha", True, "a finite number above 0 or None"),
    ],
)
def test_an_option_of_another_type_says_what_it_should_be(make_model, option, value, message):
    with pytest.raises(WeightingError, match=f"recipe 'mola' got {option}={value!r}; it takes {message}"):
        lw.experts("mola", make_model("llama"), **{option: value})


@pytest.mark.parametrize("name", [None, 5])
def test_what_is_no_name_is_refused(make_model, name):
    with pytest.raises(UnknownName, match=f"{name} is no recipe's name and no folder; recipes are dmoerm, "):
        lw.experts(name, make_model("llama"))


@pytest.fixture
def adapters(model, make_adapters):
    """Of ranks 1, 4 and 3, in different layers."""
    return make_adapters(model, "llama")


def equal_weights(made):
    with torch.no_grad():
        for gate in made.gates.values():
            for parameter in gate.parameters():
                parameter.zero_()
    return made


def test_with_equal_weights_it_is_the_engines_mixture_of_the_adapters(model, adapters):
    with Composer(model, adapters).activate({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}):
        expected = model(input_ids=IDS_BT).logits
    with lw.experts("mixtral", model, pool=adapters, top_k=3) as made:
        torch.testing.assert_close(equal_weights(made)(input_ids=IDS_BT).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_each_expert_is_its_adapter(model, adapters, alpha):
    with lw.experts("mola", model, pool=adapters, alpha=alpha) as made:
        assert made.expert_names == ("a", "b", "c")
        for number, adapter in enumerate(adapters):
            found = made.expert(number)
            assert found.layers.keys() == adapter.layers.keys()
            for layer in adapter.layers:
                torch.testing.assert_close(found.delta(layer), adapter.delta(layer))


def test_an_adapter_alone_is_a_pool_of_one(model, adapters):
    with lw.experts("mixture_of_loras", model, pool=adapters[0]) as made:
        assert made.tasks == ("a",)


def test_fewer_experts_begin_as_the_means_of_alike_adapters(model, make_adapter):
    first, second = make_adapter(model, "first", seed=1), make_adapter(model, "second", seed=2)
    pool = [first, second, dataclasses.replace(first, name="again")]
    with lw.experts("mixtral", model, pool=pool, num_experts=2) as made:
        assert made.expert_names == ("first+again", "second")
        for number, adapter in enumerate([first, second]):
            for layer in adapter.layers:
                torch.testing.assert_close(made.expert(number).delta(layer), adapter.delta(layer))


def test_grouping_adapters_shows_no_bar_since_no_argument_could_leave_it_out(model, make_adapter, monkeypatch, capfd):
    monkeypatch.setattr(arithmetic, "BLOCK", 2)
    pool = [make_adapter(model, name, seed=seed) for seed, name in enumerate("abcde")]
    with lw.experts("mixtral", model, pool=pool, num_experts=2):
        assert capfd.readouterr().out == ""


def test_without_a_number_of_experts_each_adapter_is_a_task(model, adapters):
    with lw.experts("mixture_of_loras", model, pool=adapters) as made:
        assert made.tasks == ("a", "b", "c")
        assert {shape.num_experts for shape in made.shapes.values()} == {3}


def test_an_adapter_that_is_named_as_a_task_is_that_tasks_wherever_it_is_in_the_pool(model, adapters):
    with lw.experts("flora", model, pool=adapters, mode="additive", tasks=("c", "a", "b")) as made:
        for adapter in adapters:
            for layer in adapter.layers:
                torch.testing.assert_close(made.adapter(adapter.name).delta(layer), adapter.delta(layer))


def test_adapters_whose_names_are_those_of_other_places_are_refused(model, adapters):
    with pytest.raises(WeightingError, match=r"task 'b' of recipe 'flora' has place 0, but .* is at 1 in the pool"):
        lw.experts("flora", model, pool=adapters, mode="additive", tasks=("b", "law", "games"))


def test_what_a_search_found_is_taken_from_its_hub(model, adapters, tmp_path):
    hub = lw.Hub(tmp_path / "hub")
    for adapter in adapters:
        hub.add(adapter, description=f"task {adapter.name}")
    found = hub.search("task b", k=2)
    names = tuple(candidate.name for candidate in found)
    with lw.experts("mixtral", model, pool=found) as made:
        assert made.expert_names == names
    with lw.experts("mixtral", model, pool=hub) as made:
        assert made.expert_names == ("a", "b", "c")
    # candidates alone do not know it
    with pytest.raises(WeightingError, match=r"whose adapters are in a hub: pass hub=\.\.\. beside pool"):
        lw.experts("mixtral", model, pool=list(found))
    with lw.experts("mixtral", model, pool=list(found), hub=hub) as made:
        assert made.expert_names == names


def test_it_is_trained_saved_and_read_with_its_names(model, make_model, adapters, tmp_path):
    rows = [{"input_ids": [3 + i, 4, 5 + i, 6], "labels": [-100, -100, 5 + i, 6]} for i in range(5)]
    with lw.experts("mixtral", model, pool=adapters) as made:
        made.fit(rows, steps=3, batch_size=2, warmup=0, progress=False)
        assert made.training_report.experts == ("a", "b", "c")
        expected = made(input_ids=IDS_BT).logits
        made.save_pretrained(tmp_path / "saved")
    again = lw.experts(tmp_path / "saved", make_model("llama"))
    assert again.expert_names == ("a", "b", "c")
    assert torch.equal(again(input_ids=IDS_BT).logits, expected)


def test_the_adapters_are_not_changed_by_training(model, adapters):
    before = [adapter.hash for adapter in adapters]
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}]
    with lw.experts("mixtral", model, pool=adapters) as made:
        made.fit(rows, steps=2, batch_size=1, warmup=0, progress=False)
    assert [dataclasses.replace(adapter).hash for adapter in adapters] == before


def test_adapters_of_another_base_are_refused(model, make_model, adapters):
    other = fingerprint(make_model("llama", num_hidden_layers=3))
    pool = [dataclasses.replace(adapter, fingerprint=other) for adapter in adapters]
    with pytest.raises(BaseModelMismatch, match="expert 'a' was made for another base model"):
        lw.experts("mixtral", model, pool=pool)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_of_another_size_is_refused(make_model, adapters):
    with pytest.raises(LayerMismatch):
        lw.experts("mixtral", make_model("llama", hidden_size=32), pool=adapters)


def test_an_adapter_with_a_gain_is_refused_by_name(model, make_adapter):
    with pytest.raises(AdapterUnsupported, match=r"expert 'g' changes layer .* by more than a product of two factors"):
        lw.experts("mixtral", model, pool=[make_adapter(model, "g", gain=True)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ("q_proj",)}, WeightingError, "target_modules cannot be given with a pool"),
        ({"num_experts": 4}, WeightingError, "num_experts is 4, but the pool has 3 adapters"),
        ({"num_experts": 0}, WeightingError, "num_experts is 0"),
        ({"pool": [1]}, WeightingError, "the pool has 1, which is no adapter"),
        ({"pool": []}, WeightingError, "the pool is empty"),
    ],
)
def test_what_cannot_be_begun_from_is_refused(model, adapters, options, error, message):
    with pytest.raises(error, match=message):
        lw.experts("mixtral", model, **{"pool": adapters, **options})


@pytest.mark.parametrize("name", ["hydralora", "multilora"])
def test_a_recipe_whose_experts_share_a_factor_is_refused(model, adapters, name):
    with pytest.raises(ScopeError, match=f"the experts of recipe '{name}' are not each a product of two factors of its own"):
        lw.experts(name, model, pool=adapters)


def test_the_others_experts_and_gates_stay_the_same_bits(make_model, trained):
    first = trained(lw.experts("mixture_of_loras", make_model("llama"), tasks=("law", "games"), rank=3))
    before, adapters = (
        {name: value.clone() for name, value in first.expert_state().items()},
        [first.expert(0), first.expert(1)],
    )
    with with_task(first, "health") as made:
        assert made.tasks == ("law", "games", "health")
        assert [made.expert(number).hash for number in (0, 1)] == [adapter.hash for adapter in adapters]
        assert len(made.expert(2).layers) == 14
        for name, value in made.expert_state().items():
            assert torch.equal(value[: len(before[name])], before[name])
            assert len(value) == len(before[name]) * 3 // 2


def test_a_row_of_an_old_domain_is_answered_as_before(make_model, trained):
    base = make_model("llama", dtype=torch.float64)
    first = trained(lw.experts("mixture_of_loras", base, tasks=("law", "games"), oracle=True))
    before = first(input_ids=IDS_BT, task=["games", "law"]).logits
    with with_task(first, "health") as made:
        torch.testing.assert_close(made(input_ids=IDS_BT, task=["games", "law"]).logits, before)
        base = made.base_model(input_ids=IDS_BT).logits
        torch.testing.assert_close(made(input_ids=IDS_BT, task="health").logits, base)


def test_a_gate_of_tasks_has_one_more(make_model, trained):
    first = trained(lw.experts("moelora", make_model("llama"), tasks=("law", "games")))
    before = first.adapter("games")
    with with_task(first, "health") as made:
        assert made.adapter("games").hash == before.hash
        assert made.adapter("health").hash != before.hash


def test_a_task_that_it_has_is_refused_and_leaves_the_model_as_it_was(make_model, trained):
    with trained(lw.experts("mixture_of_loras", make_model("llama"), tasks=("law", "games"))) as made:
        before = made(input_ids=IDS_BT).logits
        with pytest.raises(WeightingError, match="each name once"):
            with_task(made, "law")
        assert torch.equal(made(input_ids=IDS_BT).logits, before)


def test_other_options_leave_experts_and_gates_the_same_bits(make_model, trained):
    first = trained(lw.experts("mola", make_model("llama"), num_experts=(2, 3), top_k=2))
    before = {name: value.clone() for name, value in first.expert_state().items()}
    with with_options(first, top_k=1, dropout=0.5) as made:
        assert (made.recipe.top_k, made.recipe.dropout) == (1, 0.5)
        assert not made.training
        assert all(torch.equal(value, before[name]) for name, value in made.expert_state().items())


def test_experts_of_another_rank_begin_anew(make_model, trained):
    first = trained(lw.experts("mola", make_model("llama"), num_experts=(2,), rank=3))
    gates = {name: value.clone() for name, value in first.gates.state_dict().items()}
    with with_options(first, rank=5) as made:
        assert torch.equal(made(input_ids=IDS_BT).logits, made.base_model(input_ids=IDS_BT).logits)
        assert all(torch.equal(value, gates[name]) for name, value in made.gates.state_dict().items())


def test_options_that_have_no_place_for_what_was_learned_are_refused(make_model, trained):
    with trained(lw.experts("mola", make_model("llama"), num_experts=(3,))) as made:
        before = made(input_ids=IDS_BT).logits
        with pytest.raises(WeightingError, match=r"expert 2 at .* and what it learned, would have no place"):
            with_options(made, num_experts=(2,))
        with pytest.raises(WeightingError, match="has no option 'top_n', did you mean 'top_k'"):
            with_options(made, top_n=1)
        assert torch.equal(made(input_ids=IDS_BT).logits, before)
        assert not any(parameter.requires_grad for parameter in made.base_model.parameters())
    assert all(parameter.requires_grad for parameter in made.base_model.parameters())


def test_features_of_tasks_that_were_learned_do_not_go(make_model, trained):
    made = trained(lw.experts("moelora", make_model("llama"), tasks=("law", "games"), num_features=6))
    with made, pytest.raises(WeightingError, match=r"e_KD' is \(2, 6\) and would be \(2, 5\), with no place for all"):
        with_options(made, num_features=5)


def test_more_target_modules_have_new_experts_beside_those_there_are(make_model, trained):
    first = trained(lw.experts("mola", make_model("llama"), num_experts=(2,), target_modules=("q_proj",)))
    before, logits = {name: value.clone() for name, value in first.expert_state().items()}, first(input_ids=IDS_BT).logits
    with with_options(first, target_modules=("q_proj", "v_proj")) as made:
        assert len(made.sites) == 4
        assert all(torch.equal(made.expert_state()[name], value) for name, value in before.items())
        torch.testing.assert_close(made(input_ids=IDS_BT).logits, logits)
        with pytest.raises(WeightingError, match=r"'model.layers.0.self_attn.v_proj' would have no experts"):
            with_options(made, target_modules=("q_proj",))


def test_experts_that_began_as_adapters_keep_their_names_and_ranks(make_model, make_adapter):
    model = make_model("llama")
    pool = [make_adapter(model, "plural", rank=2), make_adapter(model, "past tense", rank=3, seed=1)]
    first = lw.experts("mola", model, pool=pool)
    before = [first.expert(number).hash for number in (0, 1)]
    with with_options(first, top_k=1) as made:
        assert made.expert_names == ("plural", "past tense")
        assert [made.expert(number).hash for number in (0, 1)] == before


@pytest.mark.parametrize("tasks", [("games", "law"), ("law",), ("health", "law", "games")])
def test_tasks_that_have_learned_keep_their_places(make_model, tasks, trained):
    with trained(lw.experts("flora", make_model("llama"), tasks=("law", "games"), mode="additive")) as made:
        before = made.adapter("games").hash
        with pytest.raises(WeightingError, match="new ones come after those there are"):
            with_options(made, tasks=tasks)
        assert made.adapter("games").hash == before


def test_the_universal_expert_stays_the_universal_one(make_model, trained):
    options = {"by_task": True, "tasks": ("law", "games"), "num_experts": 2}
    first = trained(lw.experts("mocle", make_model("llama"), **options))
    before = [first.expert(number).hash for number in range(3)]
    with with_options(first, num_experts=3) as made:
        assert made.expert(3).layers["model.layers.0.self_attn.q_proj"].rank == 8
        found = [made.expert(number) for number in (0, 1, 3)]
        for number, adapter in zip((0, 1, 2), found, strict=True):
            assert adapter.hash == before[number]
        assert not made.expert(2).delta("model.layers.0.self_attn.q_proj").any()


def test_mixed_experts_of_another_number_are_refused(make_model, trained):
    options = {"tasks": ("depth", "edges"), "ranks": (1, 2, 3), "top_k": 2, "rank": 2}
    with trained(lw.experts("mlore", make_model("segformer"), target_modules=("linear_fuse",), **options)) as made:
        before = {name: value.clone() for name, value in made.expert_state().items()}
        with pytest.raises(WeightingError, match="would have no place"):
            with_options(made, ranks=(1, 2, 3, 4))
        assert all(torch.equal(value, before[name]) for name, value in made.expert_state().items())


def test_a_new_task_of_mlore_leaves_the_generic_expert_where_it_is(make_model, trained):
    options = {"tasks": ("depth",), "ranks": (1, 2, 3), "top_k": 2, "rank": 2}
    first = trained(lw.experts("mlore", make_model("segformer"), target_modules=("linear_fuse",), **options))
    (before,) = [layer.starts() for layer in first.layers.values()]
    with with_task(first, "edges") as made:
        (after,) = [layer.starts() for layer in made.layers.values()]
        assert len(after) == 6
        for (a_RI, b_RO), (old_a_RI, old_b_RO) in zip(after, before, strict=False):
            assert torch.equal(a_RI, old_a_RI)
            assert torch.equal(b_RO, old_b_RO)


def test_what_was_frozen_by_hand_stays_so(make_model):
    first = lw.experts("mixture_of_loras", make_model("llama"), tasks=("law", "games"))
    frozen = [name for name in first.expert_parameters() if "q_proj" in name]
    for name in frozen:
        first.expert_parameters()[name].requires_grad_(False)
    with with_task(first, "health") as made:
        learns = {name: parameter.requires_grad for name, parameter in made.expert_parameters().items()}
        assert [name for name, value in learns.items() if not value] == frozen
        assert len(frozen) < len(learns)


def test_what_the_recipe_froze_learns_where_its_other_options_let_it(make_model):
    first = lw.experts(
        "mixlora_conditional", make_model("llama"), num_experts=6, target_modules=("q_proj",), as_released=True
    )
    site = "layers.model/layers/0/self_attn/q_proj"
    first.expert_parameters()[f"{site}.b_EO"].requires_grad_(False)
    assert not first.expert_parameters()[f"{site}.k_REI"].requires_grad
    with with_options(first, as_released=False) as made:
        assert made.expert_parameters()[f"{site}.k_REI"].requires_grad
        assert not made.expert_parameters()[f"{site}.b_EO"].requires_grad


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("segformer", ["segformer.stages.0.blocks.1", "segformer.stages.1.blocks.0"]),
        ("upernet", ["backbone.swin.encoder.layers.0.blocks.1", "backbone.swin.encoder.layers.1.blocks.0"]),
        ("llama", ["model.layers.1"]),
        ("bart", ["model.encoder.layers.0", "model.decoder.layers.0"]),
        # its blocks have lists of layers of different classes, which are no stages
        ("t5", ["encoder.block.1", "decoder.block.1"]),
    ],
)
def test_the_last_block_of_each_stage_or_stack_is_closing(make_model, kind, expected):
    assert closing_blocks(make_model(kind)) == expected


def test_the_places_of_closing_blocks_and_outside_the_blocks_are_closing(make_model):
    sites = layer_sites(make_model("segformer"), ["fc1", "linear_fuse", "linear_projections.1.proj"], kinds=(linear, conv))
    assert {site.name: site.closing for site in sites} == {
        "segformer.stages.0.blocks.0.mlp.fc1": False,
        "segformer.stages.0.blocks.1.mlp.fc1": True,
        "segformer.stages.1.blocks.0.mlp.fc1": True,
        # numbered, but no stage
        "decode_head.linear_projections.1.proj": False,
        "decode_head.linear_fuse": True,
    }


@pytest.mark.parametrize(
    "ask",
    [
        lambda base: with_options(base, rank=3),
        lambda base: with_task(base, "games"),
        lambda base: fit_clusters(base, ["a text"]),
        lambda base: expert_rewards(base, {}),
        lambda base: train_reward_experts(base, [("a", "b")]),
    ],
)
def test_a_base_alone_is_refused_with_the_way_out(make_model, ask):
    with pytest.raises(WeightingError, match=r"given LlamaForCausalLM, which has no experts: give what lw.experts"):
        ask(make_model("llama"))
