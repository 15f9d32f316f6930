"""DMoERM's outer mixture: a text's category, and the reward of its head alone."""

import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.composer.ensembles.reward_mixture import train_routed_rewards
from loraweave.composer.ensembles.rewards import text_features
from loraweave.errors import InvalidTask, WeightingError

MEMBERS = {"sums, and such": [{"a": 1.0}, {"b": 1.0}], "talk": [{"c": 1.0}]}
PAIRS = {"sums, and such": [("1 2 3", "1 1 1"), ("4 5", "5 5")], "talk": [("yes, it is", "no"), ("to be", "or not")]}


@pytest.fixture
def engine(tiny_llama, make_adapters, tokenizer):
    return Composer(tiny_llama, make_adapters(tiny_llama, "llama"), tokenizer=tokenizer)


@pytest.fixture
def routed(engine):
    return train_routed_rewards(engine, MEMBERS, PAIRS, steps=150, lr=1e-2, progress=False)


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
    assert routed.categories_of(engine, batch_of(engine, *texts)) == [list(MEMBERS)[place] for place in places]


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


def test_its_state_has_the_heads_of_all_categories(routed):
    assert {"outer.weight", "heads.0.inner.weight", "heads.1.outer.bias"} <= set(routed.state_dict())


def test_categories_have_members_and_pairs_and_texts_one_category(engine):
    with pytest.raises(WeightingError, match=r"members are for the categories \['x'\] and pairs for \['y'\]"):
        train_routed_rewards(engine, {"x": [{"a": 1.0}]}, {"y": [("a", "b")]})
    with pytest.raises(InvalidTask, match="text 'b' has two categories, 'x' and 'y'"):
        train_routed_rewards(engine, {"x": [None], "y": [None]}, {"x": [("a", "b")], "y": [("b", "c")]})
