"""What is no expert model is refused by name where one is asked for."""

import pytest
import torch

import loraweave as lw
from loraweave.composer.ensembles.reward_mixture import expert_rewards, train_reward_experts
from loraweave.composer.experts.exchange import federated_average, put_expert
from loraweave.composer.experts.make import fit_clusters, with_options, with_task
from loraweave.errors import ScopeError, WeightingError


@pytest.mark.parametrize(
    "ask",
    [
        lambda base: with_options(base, rank=3),
        lambda base: with_task(base, "games"),
        lambda base: put_expert(base, 0, None),
        lambda base: federated_average([base], [1.0], experts=(0,)),
        lambda base: fit_clusters(base, ["a text"]),
        lambda base: expert_rewards(base, {}),
        lambda base: train_reward_experts(base, [("a", "b")]),
    ],
)
def test_a_base_alone_is_refused_with_the_way_out(make_model, ask):
    with pytest.raises(WeightingError, match=r"given LlamaForCausalLM, which has no experts: give what lw.experts"):
        ask(make_model("llama"))


@pytest.mark.parametrize("clients", [None, [], 3])
def test_no_list_of_clients_is_refused(clients):
    with pytest.raises(WeightingError, match="give a list of the expert models of all"):
        federated_average(clients, [1.0])


@pytest.mark.parametrize("name", ["mixtral", "octavius"])
def test_a_batch_of_no_rows_is_refused(make_model, name):
    made = lw.experts(name, make_model("llama"), rank=2)
    empty_BT = torch.zeros(0, 3, dtype=torch.long)
    with pytest.raises(ScopeError, match=r"inputs of shape \(0, 3\), which are no rows"):
        made(input_ids=empty_BT)
    with pytest.raises(ScopeError, match=r"inputs of shape \(0, 3\), which are no rows"):
        made.generate(input_ids=empty_BT, attention_mask=empty_BT, max_new_tokens=2)
