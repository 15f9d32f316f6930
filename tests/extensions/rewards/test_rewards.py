"""Rewards of members against one activation at a time, and their aggregates against the papers' formulas."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.errors import CompositionError, LayerMismatch, UnknownName, WeightingError
from loraweave.extensions.rewards.reward_heads import Rewards, features, rewards

MEMBERS = [{"a": 1.0}, {"b": 0.7, "c": -0.4}, None]


@pytest.fixture
def reward_engine(reward_model_of, make_adapters):
    def make(kind):
        model = reward_model_of(kind)
        return Composer(model, make_adapters(model, kind))

    return make


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_reward_models_own_head_is_read_under_each_member(reward_engine, padded, kind, side, rows):
    engine = reward_engine(kind)
    found_MB = rewards(engine, MEMBERS, padded(side)).rewards_MB
    for number, member in enumerate(MEMBERS):
        for row, ids in enumerate(rows):
            with torch.no_grad(), engine.activate(member or {}):
                alone = engine.model(input_ids=ids[None]).logits
            assert float(found_MB[number, row]) == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_features_are_the_last_hidden_state_of_the_last_token(engine_of, padded, kind, side, rows):
    engine = engine_of(kind)
    found_MBH = features(engine, MEMBERS, padded(side))
    for number, member in enumerate(MEMBERS):
        for row, ids in enumerate(rows):
            with torch.no_grad(), engine.activate(member or {}):
                output = engine.model(input_ids=ids[None], output_hidden_states=True)
            assert torch.allclose(found_MBH[number, row], output.hidden_states[-1][0, -1], rtol=1e-5, atol=1e-8)
    assert not engine.model.base_model._forward_hooks


def test_features_of_an_encoder_decoder_are_those_of_its_decoder(engine_of, padded):
    engine = engine_of("t5")
    batch = {**padded("left"), "decoder_input_ids": torch.tensor([[0, 9], [0, 8], [0, 4]])}
    found_MBH = features(engine, MEMBERS, batch)
    for number, member in enumerate(MEMBERS):
        with torch.no_grad(), engine.activate(member or {}):
            hidden = engine.model(**batch, output_hidden_states=True).decoder_hidden_states[-1]
        assert torch.allclose(found_MBH[number], hidden[:, -1], rtol=1e-5, atol=1e-8)


def test_each_member_has_its_own_head_or_all_have_one(engine_of, padded):
    engine = engine_of("llama")
    heads = [nn.Linear(16, 1).double() for _ in MEMBERS]
    found_MBH = features(engine, MEMBERS, padded("right"))
    own = rewards(engine, MEMBERS, padded("right"), heads=heads).rewards_MB
    shared = rewards(engine, MEMBERS, padded("right"), heads=heads[0]).rewards_MB
    with torch.no_grad():
        expected = torch.stack([h @ head.weight[0] + head.bias for head, h in zip(heads, found_MBH, strict=True)])
        assert torch.allclose(own, expected)
        assert torch.allclose(shared, found_MBH @ heads[0].weight[0] + heads[0].bias)


def test_a_head_that_came_with_an_adapter_is_one_of_the_heads(padded, make_model, make_adapters):
    model = make_model("llama", dtype=torch.float64)
    head_1H = torch.randn(1, 16, dtype=torch.float64)
    own = replace(make_adapters(model, "llama")[0], heads={"score.weight": head_1H})
    with pytest.raises(LayerMismatch, match=r"head for 'score', which the model does not have.*heads=\{\}"):
        Composer(model, [own])
    engine = Composer(model, [replace(own, heads={})])
    head = nn.Linear(16, 1, bias=False, dtype=torch.float64)
    head.load_state_dict({"weight": own.heads["score.weight"]})
    found = rewards(engine, [{"a": 1.0}], padded("right"), heads=head).rewards_MB
    assert torch.allclose(found[0], features(engine, [{"a": 1.0}], padded("right"))[0] @ head_1H[0])


VALUES = [[1.0, -2.0, 3.0], [4.0, 0.5, 3.0], [1.5, -7.0, 3.0], [0.0, 2.0, 3.0]]


@pytest.mark.parametrize(
    ("by", "formula"),
    [
        ("mean", lambda column: statistics.fmean(column)),
        ("min", min),
        ("mean_minus_std", lambda column: statistics.fmean(column) - 0.3 * statistics.pstdev(column)),
        ("mean_minus_variance", lambda column: statistics.fmean(column) - 0.3 * statistics.pvariance(column)),
    ],
)
def test_an_aggregate_is_its_papers_formula(by, formula):
    found = Rewards(torch.tensor(VALUES, dtype=torch.float64)).aggregated(by, penalty=0.3)
    assert found.tolist() == pytest.approx([formula(column) for column in zip(*VALUES, strict=True)])


@pytest.mark.parametrize("by", ["mean", "min", "mean_minus_std", "mean_minus_variance"])
def test_the_order_of_members_does_not_matter(by):
    rewards_MB = torch.tensor(VALUES, dtype=torch.float64)
    assert torch.allclose(Rewards(rewards_MB).aggregated(by), Rewards(rewards_MB[[2, 0, 3, 1]]).aggregated(by))


@pytest.mark.parametrize("by", ["mean", "min", "mean_minus_std", "mean_minus_variance"])
def test_identical_members_have_no_deviation_and_agree_with_the_single_one(reward_engine, padded, by):
    engine = reward_engine("llama")
    one = rewards(engine, [{"a": 1.0}], padded("right"))
    three = rewards(engine, [{"a": 1.0}] * 3, padded("right"))
    assert torch.allclose(three.std_B, torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(three.aggregated(by, penalty=5.0), one.rewards_MB[0], rtol=1e-4, atol=1e-5)
    assert one.std_B.tolist() == [0, 0, 0]


def test_what_is_no_reward_is_refused_by_name(engine_of, padded):
    engine = engine_of("llama")
    with pytest.raises(CompositionError, match="num_labels=1, or pass heads="):
        rewards(engine, MEMBERS, padded("right"))
    with pytest.raises(CompositionError, match="num_labels=1, or pass heads="):
        rewards(engine_of("bert"), MEMBERS, padded("right"))
    with pytest.raises(WeightingError, match="2 heads for 3 members"):
        rewards(engine, MEMBERS, padded("right"), heads=[nn.Linear(16, 1).double()] * 2)
    with pytest.raises(CompositionError, match=r"head 0 makes \(3, 2\)"):
        rewards(engine, MEMBERS, padded("right"), heads=nn.Linear(16, 2).double())
    some = Rewards(torch.tensor(VALUES))
    with pytest.raises(UnknownName, match="did you mean 'mean_minus_std'"):
        some.aggregated("mean_minus_sdt")
    for penalty in (-0.1, float("nan")):
        with pytest.raises(WeightingError, match="penalty"):
            some.aggregated("mean_minus_std", penalty=penalty)
