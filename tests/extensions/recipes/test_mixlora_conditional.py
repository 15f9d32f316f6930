"""Factors that the prompt of a row chooses: options and refusals."""

import pytest
import torch
from rounding import assert_near, num_terms

import loraweave as lw
from loraweave.composer.experts.parts import make_recipe
from loraweave.errors import ScopeError


def test_the_scale_is_that_of_the_released_script():
    assert make_recipe("mixlora_conditional", {"num_experts": 16, "rank": 4}).scale == 8.0
    assert make_recipe("mixlora_conditional", {"num_experts": 16, "rank": 4, "alpha": 4.0}).scale == 1.0


def test_its_factors_are_no_adapters(make_model):
    made = lw.experts("mixlora_conditional", make_model("llama"), target_modules=("q_proj",))
    with pytest.raises(ScopeError, match="expert 0 of recipe 'mixlora_conditional' is not an update of layers"):
        made.expert(0)


def test_what_was_chosen_by_the_prompt_holds_for_the_answer(make_model):
    with lw.experts("mixlora_conditional", make_model("llama"), num_experts=6, target_modules=("q_proj",)) as made:
        torch.manual_seed(0)
        for layer in made.layers.values():
            torch.nn.init.normal_(layer.b_EO)
        ids_BT = torch.tensor([[3, 9, 27, 20, 11, 7]])
        labels = ids_BT.clone()
        labels[:, :3] = -100
        answer = made(input_ids=ids_BT, labels=labels).logits
        longer = torch.cat([ids_BT, torch.tensor([[44, 58]])], dim=1)
        labels = torch.cat([labels, longer[:, -2:]], dim=1)
        assert_near(made(input_ids=longer, labels=labels).logits[:, :6], answer, num_terms(made))
