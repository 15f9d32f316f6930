"""Rewards of members against one activation at a time, and their aggregates against the papers' formulas."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraweave.composer.composer import Composer
from loraweave.composer.ensembles.rewards import Rewards, features, rewards
from loraweave.errors import AdapterUnsupported, CompositionError, UnknownName, WeightingError

MEMBERS = [{"a": 1.0}, {"b": 0.7, "c": -0.4}, None]
LENGTHS = (7, 4, 6)
IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(5))


def padded(side: str) -> dict[str, Tensor]:
    ids, mask = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for row, length in enumerate(LENGTHS):
        place = slice(7 - length, 7) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = IDS[row, :length], 1
    return {"input_ids": ids, "attention_mask": mask}


def engine_of(kind: str, make_model: Any, make_adapters: Any) -> Composer:
    model = make_model(kind, dtype=torch.float64)
    return Composer(model, make_adapters(model, kind))


def reward_engine(kind: str, make_adapters: Any) -> Composer:
    """A tiny sequence classifier of one label, of weights that matter."""
    import transformers

    sizes = {"vocab_size": 61, "pad_token_id": 0, "num_labels": 1}
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **sizes
        )
        model = transformers.LlamaForSequenceClassification(config)
    elif kind == "gpt2":
        model = transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **sizes)
        )
    else:
        config = transformers.BertConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **sizes
        )
        model = transformers.BertForSequenceClassification(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    model = model.eval().double()
    model.name_or_path = "tiny"
    return Composer(model, make_adapters(model, kind))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_reward_models_own_head_is_read_under_each_member(kind: str, side: str, make_adapters: Any) -> None:
    engine = reward_engine(kind, make_adapters)
    found_MB = rewards(engine, MEMBERS, padded(side)).rewards_MB
    for number, member in enumerate(MEMBERS):
        for row, length in enumerate(LENGTHS):
            with torch.no_grad(), engine.activate(member or {}):
                alone = engine.model(input_ids=IDS[row : row + 1, :length]).logits
            assert float(found_MB[number, row]) == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_features_are_the_last_hidden_state_of_the_last_token(
    kind: str, side: str, make_model: Any, make_adapters: Any
) -> None:
    engine = engine_of(kind, make_model, make_adapters)
    found_MBH = features(engine, MEMBERS, padded(side))
    for number, member in enumerate(MEMBERS):
        for row, length in enumerate(LENGTHS):
            with torch.no_grad(), engine.activate(member or {}):
                output = engine.model(input_ids=IDS[row : row + 1, :length], output_hidden_states=True)
            assert torch.allclose(found_MBH[number, row], output.hidden_states[-1][0, -1], rtol=1e-5, atol=1e-8)
    assert not engine.model.base_model._forward_hooks


def test_features_of_an_encoder_decoder_are_those_of_its_decoder(make_model: Any, make_adapters: Any) -> None:
    engine = engine_of("t5", make_model, make_adapters)
    batch = {**padded("left"), "decoder_input_ids": torch.tensor([[0, 9], [0, 8], [0, 4]])}
    found_MBH = features(engine, MEMBERS, batch)
    for number, member in enumerate(MEMBERS):
        with torch.no_grad(), engine.activate(member or {}):
            hidden = engine.model(**batch, output_hidden_states=True).decoder_hidden_states[-1]
        assert torch.allclose(found_MBH[number], hidden[:, -1], rtol=1e-5, atol=1e-8)


def test_each_member_has_its_own_head_or_all_have_one(make_model: Any, make_adapters: Any) -> None:
    engine = engine_of("llama", make_model, make_adapters)
    heads = [nn.Linear(16, 1).double() for _ in MEMBERS]
    found_MBH = features(engine, MEMBERS, padded("right"))
    own = rewards(engine, MEMBERS, padded("right"), heads=heads).rewards_MB
    shared = rewards(engine, MEMBERS, padded("right"), heads=heads[0]).rewards_MB
    with torch.no_grad():
        expected = torch.stack([h @ head.weight[0] + head.bias for head, h in zip(heads, found_MBH, strict=True)])
        assert torch.allclose(own, expected)
        assert torch.allclose(shared, found_MBH @ heads[0].weight[0] + heads[0].bias)


def test_a_head_that_came_with_an_adapter_is_one_of_the_heads(make_model: Any, make_adapters: Any) -> None:
    model = make_model("llama", dtype=torch.float64)
    head_1H = torch.randn(1, 16, dtype=torch.float64)
    own = replace(make_adapters(model, "llama")[0], heads={"score.weight": head_1H})
    with pytest.raises(AdapterUnsupported, match=r"score\.weight"):
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
def test_an_aggregate_is_its_papers_formula(by: str, formula: Any) -> None:
    found = Rewards(torch.tensor(VALUES, dtype=torch.float64)).aggregated(by, penalty=0.3)
    assert found.tolist() == pytest.approx([formula(column) for column in zip(*VALUES, strict=True)])


@pytest.mark.parametrize("by", ["mean", "min", "mean_minus_std", "mean_minus_variance"])
def test_the_order_of_members_does_not_matter(by: str) -> None:
    rewards_MB = torch.tensor(VALUES, dtype=torch.float64)
    assert torch.allclose(Rewards(rewards_MB).aggregated(by), Rewards(rewards_MB[[2, 0, 3, 1]]).aggregated(by))


@pytest.mark.parametrize("by", ["mean", "min", "mean_minus_std", "mean_minus_variance"])
def test_identical_members_have_no_deviation_and_agree_with_the_single_one(by: str, make_adapters: Any) -> None:
    engine = reward_engine("llama", make_adapters)
    one = rewards(engine, [{"a": 1.0}], padded("right"))
    three = rewards(engine, [{"a": 1.0}] * 3, padded("right"))
    assert torch.allclose(three.std_B, torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(three.aggregated(by, penalty=5.0), one.rewards_MB[0], rtol=1e-4, atol=1e-5)
    assert one.std_B.tolist() == [0, 0, 0]


def test_what_is_no_reward_is_refused_by_name(make_model: Any, make_adapters: Any) -> None:
    engine = engine_of("llama", make_model, make_adapters)
    with pytest.raises(CompositionError, match="num_labels=1, or pass heads="):
        rewards(engine, MEMBERS, padded("right"))
    with pytest.raises(CompositionError, match="num_labels=1, or pass heads="):
        rewards(engine_of("bert", make_model, make_adapters), MEMBERS, padded("right"))
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
