"""One more domain or task for a trained mixture."""

import pytest
import torch

import loraweave as lw
from loraweave.composer.experts.make import with_options, with_task
from loraweave.errors import WeightingError

IDS_BT = torch.tensor([[3, 9, 27, 20, 41], [6, 2, 25, 3, 15]])


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
