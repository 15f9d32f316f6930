"""DMoERM's inner mixture: its formula, training and file."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from loraweave.composer.composer import Composer
from loraweave.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    CompositionError,
    InvalidTask,
    TrainingError,
    UnknownExpert,
    WeightingError,
)
from loraweave.extensions.rewards.reward_heads import features, head_rewards, rewards, text_features, train_reward_heads
from loraweave.extensions.rewards.reward_mixture import FILE, RewardMixture, train_reward_mixture
from loraweave.routers.weights import MixtureWeights

MEMBERS = [{"a": 1.0}, {"b": 1.0}, None]
PAIRS = [("is it good", "no"), ("to be", "or not"), ("yes, it is", "0 1 2")]
BATCH = {
    "input_ids": torch.tensor([[5, 9, 30, 0], [7, 8, 9, 10]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
}


def short(engine, **changes):
    return train_reward_mixture(engine, MEMBERS, PAIRS, **{"steps": 3, "progress": False, **changes})


def test_it_is_a_perceptron_on_the_members_features_beside_each_other(engine):
    mixture = short(engine)
    found_B = mixture.rewards(engine, BATCH)
    for row in range(2):
        beside_F = torch.cat([h_BH[row] for h_BH in features(engine, MEMBERS, BATCH)])
        with torch.no_grad():
            inner_H = mixture.inner.weight @ beside_F + mixture.inner.bias
            slope = mixture.activation.weight
            hidden_H = torch.where(inner_H > 0, inner_H, slope * inner_H)
            expected = mixture.outer.weight[0] @ hidden_H + mixture.outer.bias
        assert float(found_B[row]) == pytest.approx(float(expected), rel=1e-4)
    assert mixture.inner.weight.shape == (16, 48)


def test_one_member_is_a_plain_perceptron_on_its_features(engine):
    mixture = train_reward_mixture(engine, [{"a": 1.0}], PAIRS, steps=2, progress=False)
    plain = nn.Sequential(mixture.inner, mixture.activation, mixture.outer)
    assert mixture.inner.weight.shape == (16, 16)
    found = rewards(engine, [{"a": 1.0}], BATCH, heads=plain).rewards_MB[0]
    assert torch.allclose(mixture.rewards(engine, BATCH), found, rtol=1e-5)


def test_a_step_follows_the_pairwise_logistic_loss(engine):
    """One step of AdamW from the same start, with the gradient of -log sigmoid of the margin written out."""
    features_MNH = text_features(engine, MEMBERS, [text for pair in PAIRS for text in pair], progress=False)
    start = short(engine, lr=1e-12)
    loss = -torch.log(torch.sigmoid(start(features_MNH[:, 0::2]) - start(features_MNH[:, 1::2]))).mean()
    loss.backward()
    first = short(engine, steps=1, lr=1e-3, batch_size=3)
    # AdamW's first step is the gradient's sign, however small the gradient
    gradient = start.outer.weight.grad
    assert torch.allclose(first.outer.weight, start.outer.weight - 1e-3 * gradient.sign(), atol=2e-5)


def test_features_are_made_once_for_each_text_whatever_the_steps(engine):
    rows = []
    handle = engine.model.register_forward_pre_hook(
        lambda model, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    pairs = [*PAIRS, ("is it good", "0 1 2")]
    train_reward_mixture(engine, MEMBERS, pairs, steps=20, progress=False)
    handle.remove()
    assert sum(rows) == 6 * len(MEMBERS)


def texts(count, seed):
    draw = random.Random(seed)
    return ["".join(draw.choice("abcdefghij ") for _ in range(draw.randint(4, 9))) for _ in range(count)]


def test_trained_on_preferences_it_beats_the_mean_of_the_members(engine):
    """The preferred text has the larger |u . f_a| - |v . f_b|, which no sum of linear heads can follow."""
    members = [{"a": 1.0}, {"b": 1.0}]
    all_texts = list(dict.fromkeys(texts(900, 1)))
    found_MNH = text_features(engine, members, all_texts, progress=False)
    direction_MH = functional.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(2)), dim=1)
    part_MN = torch.einsum("mh,mnh->mn", direction_MH, found_MNH - found_MNH.mean(dim=1, keepdim=True))
    value_N = part_MN[0].abs() - part_MN[1].abs()
    drawn = [(index, index + 1) for index in range(0, len(all_texts) - 1, 2)]
    ordered = [(i, j) if value_N[i] > value_N[j] else (j, i) for i, j in drawn]
    train, test = ordered[:300], ordered[300:]
    pairs = [(all_texts[i], all_texts[j]) for i, j in train]
    settings = {"steps": 1500, "lr": 3e-3, "progress": False}
    mixture = train_reward_mixture(engine, members, pairs, **settings)
    heads = train_reward_heads(engine, members, pairs, **settings)
    better, worse = ([pair[side] for pair in test] for side in (0, 1))
    with torch.no_grad():
        reward_N = mixture(found_MNH)
    mean_N = head_rewards(heads, found_MNH).mean(dim=0)
    agreement, of_mean = ((r[better] > r[worse]).float().mean().item() for r in (reward_N, mean_N))
    assert len(test) > 100
    assert agreement > of_mean + 0.1
    assert agreement > 0.75


def test_training_leaves_the_model_and_the_random_numbers_of_others_alone(engine):
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    wanted = torch.random.get_rng_state()
    one, other = short(engine), short(engine)
    assert torch.equal(torch.random.get_rng_state(), wanted)
    assert all(torch.equal(value, before[name]) for name, value in engine.model.state_dict().items())
    assert all(torch.equal(one.state_dict()[key], other.state_dict()[key]) for key in one.state_dict())
    assert not torch.equal(one.outer.weight, short(engine, seed=1).outer.weight)


def test_what_is_saved_and_loaded_gives_the_same_rewards(engine, tmp_path):
    mixture = short(engine)
    loaded = RewardMixture.from_pretrained(mixture.save_pretrained(tmp_path / "reward"))
    assert loaded.members == mixture.members
    assert torch.equal(loaded.rewards(engine, BATCH), mixture.rewards(engine, BATCH))
    assert [path.name for path in (tmp_path / "reward").iterdir()] == [FILE]


def test_a_missing_or_damaged_file_is_named(engine, tmp_path):
    with pytest.raises(AdapterNotFound, match=FILE):
        RewardMixture.from_pretrained(tmp_path)
    path = short(engine).save_pretrained(tmp_path) / FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AdapterCorrupt, match="damaged"):
        RewardMixture.from_pretrained(tmp_path)


def test_another_adapter_of_the_same_name_is_refused(engine, make_adapter):
    mixture = short(engine)
    adapters = dict(engine.pool.adapters)
    impostor = replace(make_adapter(engine.model, "a", seed=9), name="a")
    with pytest.raises(CompositionError, match="'a' is another adapter"):
        mixture.rewards(Composer(engine.model, {**adapters, "a": impostor}), BATCH)
    del adapters["a"]
    with pytest.raises(UnknownExpert, match="'a'"):
        mixture.rewards(Composer(engine.model, adapters), BATCH)


@pytest.mark.own_models
def test_bad_pairs_and_settings_are_refused_before_the_model_runs(engine):
    engine.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for pairs, told in ([[], "no pairs"], [[("a", "a")], "to itself"], [["ab"], "pair 1"], [[("a", "")], "no tokens"]):
        with pytest.raises(InvalidTask, match=told):
            train_reward_mixture(engine, MEMBERS, pairs, progress=False)
    for changes in ({"steps": 0}, {"batch_size": 0.5}, {"lr": 0.0}, {"lr": float("nan")}):
        with pytest.raises(TrainingError, match=next(iter(changes))):
            short(engine, **changes)
    by_layer = MixtureWeights(torch.ones(1, 1, 1, 1), ("a",), (engine.pool.layer_names[0],))
    with pytest.raises(WeightingError, match="member 1 is a MixtureWeights"):
        train_reward_mixture(engine, [None, by_layer], PAIRS)
    with pytest.raises(CompositionError, match="tokenizer"):
        train_reward_heads(Composer(engine.model, engine.pool), MEMBERS, PAIRS)


def test_a_loss_that_is_not_finite_ends_the_training(engine):
    with pytest.raises(TrainingError, match="lower lr"):
        short(engine, steps=50, lr=1e30)
