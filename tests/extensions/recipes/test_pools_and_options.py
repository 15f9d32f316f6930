"""Recipes on stored adapters, and trained ones with one more task or other options."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.errors import ScopeError, WeightingError
from loraweave.extensions.recipes import with_options, with_task

IDS_BT = torch.tensor([[3, 9, 27, 20, 41], [6, 2, 25, 3, 15]])


@pytest.fixture
def adapters(model, make_adapters):
    """Of ranks 1, 4 and 3, in different layers."""
    return make_adapters(model, "llama")


def test_an_adapter_alone_is_a_pool_of_one(model, adapters):
    with lw.experts("mixture_of_loras", model, pool=adapters[0]) as made:
        assert made.tasks == ("a",)


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


def test_a_task_that_it_has_is_refused_and_leaves_the_model_as_it_was(make_model, trained):
    with trained(lw.experts("mixture_of_loras", make_model("llama"), tasks=("law", "games"))) as made:
        before = made(input_ids=IDS_BT).logits
        with pytest.raises(WeightingError, match="each name once"):
            with_task(made, "law")
        assert torch.equal(made(input_ids=IDS_BT).logits, before)


@pytest.mark.parametrize("tasks", [("games", "law"), ("law",), ("health", "law", "games")])
def test_tasks_that_have_learned_keep_their_places(make_model, tasks, trained):
    with trained(lw.experts("flora", make_model("llama"), tasks=("law", "games"), mode="additive")) as made:
        before = made.adapter("games").hash
        with pytest.raises(WeightingError, match="new tasks go to the end"):
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
        with pytest.raises(WeightingError, match="would be lost"):
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


@pytest.mark.parametrize("name", ["multilora", "flylora"])
def test_a_recipe_whose_experts_are_no_two_factors_is_refused(model, adapters, name):
    with pytest.raises(ScopeError, match=f"the experts of recipe '{name}' are not each a product of two factors of its own"):
        lw.experts(name, model, pool=adapters)
