"""A trained mixture with one more task or other options."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.errors import WeightingError
from loraweave.extensions.recipes import with_options, with_task

IDS_BT = torch.tensor([[3, 9, 27, 20, 41], [6, 2, 25, 3, 15]])


@pytest.mark.parametrize("ask", [lambda base: with_options(base, rank=3), lambda base: with_task(base, "games")])
def test_a_base_alone_is_refused_with_the_way_out(make_model, ask):
    with pytest.raises(WeightingError, match=r"given LlamaForCausalLM, which has no experts: give what lw.experts"):
        ask(make_model("llama"))


def test_a_gate_of_tasks_has_one_more(make_model, trained):
    first = trained(lw.experts("moelora", make_model("llama"), tasks=("law", "games")))
    before = first.adapter("games")
    with with_task(first, "health") as made:
        assert made.adapter("games").hash == before.hash
        assert made.adapter("health").hash != before.hash


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
        with pytest.raises(WeightingError, match=r"expert 2 at .* and what it learned would be lost"):
            with_options(made, num_experts=(2,))
        with pytest.raises(WeightingError, match="has no option 'top_n', did you mean 'top_k'"):
            with_options(made, top_n=1)
        assert torch.equal(made(input_ids=IDS_BT).logits, before)
        assert not any(parameter.requires_grad for parameter in made.base_model.parameters())
    assert all(parameter.requires_grad for parameter in made.base_model.parameters())


def test_features_of_tasks_that_were_learned_do_not_go(make_model, trained):
    made = trained(lw.experts("moelora", make_model("llama"), tasks=("law", "games"), num_features=6))
    with made, pytest.raises(WeightingError, match=r"e_KD' is \(2, 6\) and would be \(2, 5\), too small for all"):
        with_options(made, num_features=5)


def test_more_target_modules_have_new_experts_beside_those_there_are(make_model, trained):
    first = trained(lw.experts("mola", make_model("llama"), num_experts=(2,), target_modules=("q_proj",)))
    before, logits = {name: value.clone() for name, value in first.expert_state().items()}, first(input_ids=IDS_BT).logits
    with with_options(first, target_modules=("q_proj", "v_proj")) as made:
        assert len(made.sites) == 4
        assert all(torch.equal(made.expert_state()[name], value) for name, value in before.items())
        torch.testing.assert_close(made(input_ids=IDS_BT).logits, logits)
        with pytest.raises(WeightingError, match=r"'model.layers.0.self_attn.v_proj' would lose its experts"):
            with_options(made, target_modules=("q_proj",))


def test_experts_that_began_as_adapters_keep_their_names_and_ranks(make_model, make_adapter):
    model = make_model("llama")
    pool = [make_adapter(model, "plural", rank=2), make_adapter(model, "past tense", rank=3, seed=1)]
    first = lw.experts("mola", model, pool=pool)
    before = [first.expert(number).hash for number in (0, 1)]
    with with_options(first, top_k=1) as made:
        assert made.expert_names == ("plural", "past tense")
        assert [made.expert(number).hash for number in (0, 1)] == before
