"""Rewards of all experts in one pass, and what they learn from preferences."""

import pytest
import torch
from installed import needs_entry

import loraweave as lw
from loraweave.errors import CompositionError, InvalidTask, TrainingError, UnknownName
from loraweave.extensions.rewards.reward_mixture import expert_rewards, train_reward_experts

pytestmark = needs_entry("experts", "reward_ensemble")

MEMBERS = ("first", "second", "third")
PAIRS = [("good a", "bad a"), ("good be", "bad be"), ("good c", "bad c"), ("good dog", "bad dog")]
BATCH = {
    "input_ids": torch.tensor([[3, 9, 27, 20], [0, 0, 5, 25]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
}


@pytest.fixture
def reward_model(reward_model_of):
    return reward_model_of("llama")


@pytest.fixture
def make_ensemble(reward_model, tokenizer, trained):
    def make(recipe="reward_ensemble", *, random=True, **options):
        made = lw.experts(recipe, reward_model, tokenizer=tokenizer, **{"tasks": MEMBERS, "rank": 2, **options})
        return trained(made) if random else made

    return make


def test_each_member_gives_what_its_own_adapter_does(make_ensemble, reward_model):
    made = make_ensemble()
    with torch.no_grad():
        together = expert_rewards(made, BATCH).rewards_MB
    made.close()
    for number, member in enumerate(MEMBERS):
        adapter = made.adapter(member)
        # the head is a LoRA too
        assert "score" in adapter.layers
        with torch.no_grad(), lw.Composer(reward_model, lw.ExpertPool([adapter])).activate({adapter.name: 1.0}):
            for row, start in enumerate((0, 2)):
                alone = reward_model(input_ids=BATCH["input_ids"][row : row + 1, start:]).logits[0, 0]
                torch.testing.assert_close(together[number, row], alone, rtol=1e-4, atol=1e-5)


def test_members_that_are_alike_have_no_spread(make_ensemble):
    made = make_ensemble(random=False)
    with torch.no_grad():
        found = expert_rewards(made, BATCH)
    torch.testing.assert_close(found.std_B, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(found.aggregated("mean_minus_std", penalty=3.0), found.rewards_MB[0])


def test_the_penalised_reward_is_the_mean_less_eta_standard_deviations_in_any_order(make_ensemble):
    with torch.no_grad():
        found = expert_rewards(make_ensemble(), BATCH)
    values_MB = found.rewards_MB
    expected_B = values_MB.mean(dim=0) - 0.7 * (values_MB - values_MB.mean(dim=0)).square().mean(dim=0).sqrt()
    torch.testing.assert_close(found.aggregated("mean_minus_std", penalty=0.7), expected_B)
    reordered = type(found)(values_MB[[2, 0, 1]])
    torch.testing.assert_close(reordered.aggregated("mean_minus_std", penalty=0.7), expected_B)


def test_the_first_step_goes_down_the_pairwise_loss_of_all_members(make_ensemble, tokenizer):
    made = make_ensemble(diversity=0.0)
    before = {name: value.detach().clone() for name, value in made.expert_parameters().items()}
    total = 0
    for member in MEMBERS:
        for preferred, other in PAIRS:
            ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in (preferred, other)]
            rewards = [made(input_ids=each, task=member).logits[0, 0] for each in ids]
            total = total - torch.nn.functional.logsigmoid(rewards[0] - rewards[1]) / len(PAIRS)
    gradients = torch.autograd.grad(total, list(made.expert_parameters().values()), allow_unused=True)
    train_reward_experts(made, PAIRS, steps=1, lr=1e-3, batch_size=len(PAIRS), progress=False)
    for (name, parameter), gradient in zip(made.expert_parameters().items(), gradients, strict=True):
        # Adam's first step is lr against the gradient's sign
        clear = gradient.abs() > 1e-6
        torch.testing.assert_close((before[name] - parameter)[clear], 1e-3 * gradient.sign()[clear], rtol=1e-2, atol=1e-6)


def test_members_learn_what_is_preferred(make_ensemble, tokenizer):
    made = make_ensemble(random=False)
    train_reward_experts(made, PAIRS, steps=40, lr=1e-2, batch_size=4, progress=False)
    rows = tokenizer([text for pair in PAIRS for text in pair], padding=True, return_tensors="pt")
    with torch.no_grad():
        values_MB = expert_rewards(made, {key: rows[key] for key in ("input_ids", "attention_mask")}).rewards_MB
    assert (values_MB[:, 0::2] > values_MB[:, 1::2]).all()
    assert not made.training


def test_diversity_makes_members_factors_more_different(make_ensemble):
    from loraweave.extensions.recipes.losses.nuclear_norm import nuclear_norm

    def mean_norm(made):
        return float(torch.stack([nuclear_norm(layer.a_SI.detach()) for layer in made.layers.values()]).mean())

    norms = [
        mean_norm(train_reward_experts(make_ensemble(random=False, diversity=d), PAIRS, steps=10, lr=1e-2, progress=False))
        for d in (0.0, 10.0)
    ]
    assert norms[1] > norms[0] + 0.1


def test_a_capability_learns_from_its_own_pairs_alone(make_ensemble):
    made = make_ensemble("dmoerm", random=False)
    pairs = {"first": PAIRS, "second": [(b, a) for a, b in PAIRS], "third": PAIRS}
    train_reward_experts(made, pairs, steps=40, lr=1e-2, batch_size=4, progress=False)
    ids_BT = torch.tensor([made.tokenizer(text)["input_ids"] for text in ("good a", "bad aa")])
    with torch.no_grad():
        values_MB = expert_rewards(made, {"input_ids": ids_BT}).rewards_MB
    assert [bool(member[0] > member[1]) for member in values_MB] == [True, False, True]


def test_what_cannot_be_learned_from_is_refused(make_ensemble):
    made = make_ensemble()
    with pytest.raises(InvalidTask, match="prefers 'a' to itself"):
        train_reward_experts(made, [("a", "a")])
    with pytest.raises(UnknownName, match="no task 'frist', did you mean 'first'"):
        train_reward_experts(made, {"frist": PAIRS})
    with pytest.raises(TrainingError, match="task 'second' has no pairs to learn from"):
        train_reward_experts(made, {"first": PAIRS})
    with pytest.raises(TrainingError, match="the training got steps=0; it takes a whole number of at least 1"):
        train_reward_experts(made, PAIRS, steps=0)


def test_a_model_without_a_head_of_one_label_is_refused(make_model):
    made = lw.experts("reward_ensemble", make_model("llama"), target_modules=("q_proj",))
    with pytest.raises(CompositionError, match="LlamaForCausalLM has no head that gives one reward"):
        expert_rewards(made, BATCH)
