"""DMoERM's outer mixture: a question's category by a router that may have a LoRA of its own, and its head's reward."""

from __future__ import annotations

import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.errors import AdapterCorrupt, AdapterNotFound, BaseModelMismatch, InvalidTask, WeightingError
from loraweave.extensions.rewards.reward_heads import text_features
from loraweave.extensions.rewards.routed_rewards import RoutedRewards, train_routed_rewards

CATEGORIES = {"sums, and such": [{"a": 1.0}, {"b": 1.0}], "talk": [{"c": 1.0}]}
CATEGORY_PAIRS = {
    "sums, and such": [("1 2 3", "1 1 1"), ("4 5", "5 5")],
    "talk": [("yes, it is", "no"), ("to be", "or not")],
}


QUESTIONS = {"sums, and such": ["1 2 3", "4 5 0"], "talk": ["to be", "yes, it is", "is it"]}


@pytest.fixture
def routed(engine):
    return train_routed_rewards(engine, CATEGORIES, CATEGORY_PAIRS, rank=0, steps=150, lr=1e-2, progress=False)


@pytest.fixture
def adapted(engine):
    given = {"questions": QUESTIONS, "rank": 2, "steps": 25, "lr": 1e-2, "batch_size": 3}
    return train_routed_rewards(engine, CATEGORIES, CATEGORY_PAIRS, progress=False, **given)


def batch_of(engine, *texts):
    rows = engine.tokenizer(list(texts), padding=True, padding_side="left", return_tensors="pt")
    return {key: rows[key] for key in ("input_ids", "attention_mask")}


def test_texts_have_the_categories_that_they_were_trained_with(engine, routed):
    batch = batch_of(engine, "no", "1 2 3", "to be", "5 5")
    assert routed.categories_of(engine, batch) == ["talk", "sums, and such", "talk", "sums, and such"]


def test_a_category_is_the_highest_of_a_linear_map_of_the_base_s_features(engine, routed):
    texts = ["it is", "2 3 4", "or"]
    features_BH = text_features(engine, [None], texts, progress=False)[0]
    with torch.no_grad():
        places = (features_BH @ routed.outer.weight.T + routed.outer.bias).argmax(dim=1).tolist()
    assert routed.categories_of(engine, batch_of(engine, *texts)) == [list(CATEGORIES)[place] for place in places]


def test_a_row_s_reward_is_that_of_its_category_s_head_alone(engine, routed):
    texts = ["no", "1 2 3", "to be"]
    together_B = routed.rewards(engine, batch_of(engine, *texts))
    for row, head in enumerate((1, 0, 1)):
        alone = routed.heads[head].rewards(engine, batch_of(engine, texts[row]))[0]
        torch.testing.assert_close(together_B[row].detach(), alone, rtol=1e-4, atol=1e-5)


def test_the_question_can_decide_instead(engine, routed):
    answers, questions = batch_of(engine, "no", "no"), batch_of(engine, "to be", "1 2 3")
    rewards_B = routed.rewards(engine, answers, questions=questions)
    alone = [routed.heads[head].rewards(engine, batch_of(engine, "no"))[0] for head in (1, 0)]
    torch.testing.assert_close(rewards_B, torch.stack(alone), rtol=1e-4, atol=1e-5)
    with pytest.raises(WeightingError, match="there are 1 questions for 2 rows"):
        routed.rewards(engine, answers, questions=batch_of(engine, "no"))


def test_a_router_of_its_own_reads_questions_by_the_base_with_its_lora(engine, adapted):
    batch = batch_of(engine, *(text for own in QUESTIONS.values() for text in own))
    assert adapted.categories_of(engine, batch) == ["sums, and such"] * 2 + ["talk"] * 3
    # the same by a Composer whose only expert is that LoRA
    assert adapted.adapter.rank == 2
    alone = Composer(engine.model, {"router": adapted.adapter}, tokenizer=engine.tokenizer)
    texts = ["it is", "2 3 4", "or"]
    features_BH = text_features(alone, [{"router": 1.0}], texts, progress=False)[0]
    with torch.no_grad():
        places = (features_BH @ adapted.outer.weight.T + adapted.outer.bias).argmax(dim=1).tolist()
    assert adapted.categories_of(engine, batch_of(engine, *texts)) == [list(CATEGORIES)[place] for place in places]


def test_its_lora_learns_and_leaves_the_model_as_it_was(engine, tiny_llama):
    before = {key: value.clone() for key, value in tiny_llama.state_dict().items()}
    given = {"questions": QUESTIONS, "rank": 2, "steps": 3, "progress": False}
    first, second = (train_routed_rewards(engine, CATEGORIES, CATEGORY_PAIRS, **given) for _ in range(2))
    assert any(bool(factors.b_OR.any()) for factors in first.adapter.layers.values())
    assert first.adapter.hash == second.adapter.hash
    assert all(torch.equal(value, before[key]) for key, value in tiny_llama.state_dict().items())
    assert not tiny_llama.get_submodule("model.layers.0.self_attn.q_proj")._forward_hooks


@pytest.mark.parametrize("kind", ["routed", "adapted"])
def test_saved_and_read_again_it_gives_the_same(kind, engine, request, tmp_path):
    made = request.getfixturevalue(kind)
    again = RoutedRewards.from_pretrained(made.save_pretrained(tmp_path / "rewards"))
    batch = batch_of(engine, "no", "1 2 3", "to be")
    assert again.categories == made.categories
    assert torch.equal(again.rewards(engine, batch), made.rewards(engine, batch))
    with pytest.raises(AdapterNotFound, match=r"holds no routed_rewards\.safetensors"):
        RoutedRewards.from_pretrained(tmp_path)
    (tmp_path / "rewards" / "routed_rewards.safetensors").write_bytes(b"no tensors")
    with pytest.raises(AdapterCorrupt, match="is damaged"):
        RoutedRewards.from_pretrained(tmp_path / "rewards")


def test_another_base_than_the_routers_is_refused(engine, adapted, make_model, make_adapters, tokenizer):
    other = make_model("llama", hidden_size=24)
    with pytest.raises(BaseModelMismatch, match="the router of these rewards"):
        adapted.categories_of(Composer(other, make_adapters(other, "llama"), tokenizer=tokenizer), batch_of(engine, "no"))


def test_its_state_has_the_heads_of_all_categories(routed):
    assert {"outer.weight", "heads.0.inner.weight", "heads.1.outer.bias"} <= set(routed.state_dict())


def test_categories_have_members_and_pairs_and_texts_one_category(engine):
    with pytest.raises(WeightingError, match=r"members are for the categories \['x'\] and pairs for \['y'\]"):
        train_routed_rewards(engine, {"x": [{"a": 1.0}]}, {"y": [("a", "b")]})
    with pytest.raises(InvalidTask, match="text 'b' has two categories, 'x' and 'y'"):
        train_routed_rewards(engine, {"x": [None], "y": [None]}, {"x": [("a", "b")], "y": [("b", "c")]})
    with pytest.raises(InvalidTask, match="category 'talk' has no questions"):
        train_routed_rewards(engine, CATEGORIES, CATEGORY_PAIRS, questions={"sums, and such": ["1"]})
    with pytest.raises(WeightingError, match="rank=-1"):
        train_routed_rewards(engine, CATEGORIES, CATEGORY_PAIRS, rank=-1)
