"""Each row the expert of its task, which multiplies the weights or is added to them."""

import pytest
import torch

import loraweave as lw
from loraweave.errors import ScopeError, UnknownName

IDS = torch.tensor([[3, 9, 27, 20], [5, 25, 3, 15]])
TASKS = ("sums", "colours")


def test_additive_it_is_a_lora_for_each_task(make_model):
    model = make_model("llama", dtype=torch.float64)
    with lw.experts("flora", model, mode="additive", tasks=TASKS, rank=2, target_modules=("v_proj",)) as made:
        torch.manual_seed(0)
        for layer in made.layers.values():
            torch.nn.init.normal_(layer.b_SO)
        together = made(input_ids=IDS, task=["colours", "sums"]).logits
        adapters = [made.adapter(task) for task in ("colours", "sums")]
    for row, adapter in enumerate(adapters):
        with lw.Composer(model, lw.ExpertPool([adapter])).activate({adapter.name: 1.0}):
            alone = model(input_ids=IDS[row : row + 1]).logits
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5)


def test_at_the_beginning_the_weights_are_the_base_s_for_every_rank(make_model):
    model = make_model("llama", dtype=torch.float64)
    base = model(input_ids=IDS).logits
    for rank in (1, 4):
        with lw.experts("flora", model, tasks=TASKS, rank=rank) as made:
            torch.testing.assert_close(made(input_ids=IDS, task=["colours", "sums"]).logits, base)


def test_multiplied_weights_are_no_adapter(make_model):
    with lw.experts("flora", make_model("llama"), tasks=TASKS) as made:
        with pytest.raises(ScopeError, match="'flora' is not an update of layers"):
            made.adapter("sums")
        with pytest.raises(ScopeError, match="recipe 'flora' looks at the task of each row: give task="):
            made(input_ids=IDS)
        with pytest.raises(UnknownName, match="no task 'colour', did you mean 'colours'"):
            made(input_ids=IDS, task="colour")


def test_without_tasks_it_waits_for_those_of_fit(make_model):
    with lw.experts("flora", make_model("llama")) as made:
        assert {shape.num_experts for shape in made.shapes.values()} == {1}
        with pytest.raises(ScopeError, match="recipe 'flora' looks at the task of each row"):
            made(input_ids=IDS)
