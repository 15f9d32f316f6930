"""Averaged probabilities, against the formula written out with one activation and one row at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.composer.ensembles import member_passes
from loraweave.composer.ensembles.ensemble import ensemble
from loraweave.errors import CompositionError, InvalidTask, ScopeError, UnknownExpert, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.routers.weights import MixtureWeights

MEMBERS = [{"a": 1.0}, {"b": 0.7, "c": -0.4}, None, {"c": 1.0}]
LENGTHS = (7, 4, 6)
IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(5))
LABELS = ("yes", "no", "maybe so")


def padded(side: str) -> dict[str, Tensor]:
    ids, mask = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for row, length in enumerate(LENGTHS):
        place = slice(7 - length, 7) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = IDS[row, :length], 1
    return {"input_ids": ids, "attention_mask": mask}


def double_engine(kind: str, make_model: Any, make_adapters: Any, tokenizer: Any = None) -> Composer:
    model = make_model(kind, dtype=torch.float64)
    return Composer(model, make_adapters(model, kind), tokenizer=tokenizer)


@torch.no_grad()
def alone(engine: Composer, member: Any, row: int) -> Tensor:
    """p_TV of one member for one row without padding."""
    with engine.activate({} if member is None else member):
        return engine.model(input_ids=IDS[row : row + 1, : LENGTHS[row]]).logits[0].softmax(-1)


@pytest.fixture
def engine(make_model: Callable[..., nn.Module], make_adapters: Callable[..., list[Adapter]]) -> Composer:
    return double_engine("llama", make_model, make_adapters)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_is_the_mean_of_the_members_probabilities(kind: str, side: str, make_model: Any, make_adapters: Any) -> None:
    engine = double_engine(kind, make_model, make_adapters)
    found = ensemble(engine, MEMBERS, padded(side), weights=[1, 2, 3, 2])
    expected_BV = torch.stack(
        [sum(w / 8 * alone(engine, m, row)[-1] for w, m in zip([1, 2, 3, 2], MEMBERS, strict=True)) for row in range(3)]
    )
    assert torch.allclose(found.probabilities, expected_BV, rtol=1e-5, atol=1e-9)
    assert found.members_MBV.dtype == torch.float64
    assert found.best == expected_BV.argmax(-1).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_positions_of_each_row_are_its_own_last_tokens(side: str, engine: Composer) -> None:
    found = ensemble(engine, MEMBERS, padded(side), num_positions=4).probabilities
    for row in range(3):
        expected_TV = sum(alone(engine, member, row) / 4 for member in MEMBERS)
        assert torch.allclose(found[row], expected_TV[-4:], rtol=1e-5, atol=1e-9)


def test_identical_members_are_the_single_model(engine: Composer) -> None:
    found = ensemble(engine, [{"a": 0.6}] * 3, {"input_ids": IDS})
    with torch.no_grad(), engine.activate({"a": 0.6}):
        expected = engine.model(input_ids=IDS).logits[:, -1].log_softmax(-1)
    assert torch.allclose(found.log_probabilities, expected, rtol=1e-6)
    assert found.disagreement.abs().max() < 1e-6


def test_the_loss_is_at_most_the_mean_of_the_members_for_every_token(engine: Composer) -> None:
    found = ensemble(engine, MEMBERS, padded("left"))
    assert bool((-found.log_probabilities <= -found.members_MBV.mean(dim=0) + 1e-12).all())


def test_the_order_of_members_does_not_matter(engine: Composer) -> None:
    one = ensemble(engine, MEMBERS, padded("left"), weights=[1, 2, 3, 4]).log_probabilities
    other = ensemble(engine, MEMBERS[::-1], padded("left"), weights=[4, 3, 2, 1]).log_probabilities
    assert torch.allclose(one, other, rtol=1e-6)


def test_a_row_does_not_depend_on_its_neighbours(engine: Composer) -> None:
    batch = padded("left")
    together = ensemble(engine, MEMBERS, batch).log_probabilities
    for row in range(3):
        one = ensemble(engine, MEMBERS, {key: value[row : row + 1] for key, value in batch.items()}).log_probabilities
        assert torch.allclose(together[row], one[0], rtol=1e-5)


@pytest.mark.parametrize("rows_per_pass", [1, 2, 5, 6, 100])
def test_it_does_not_depend_on_how_rows_are_put_into_passes(rows_per_pass: int, engine: Composer) -> None:
    expected = ensemble(engine, MEMBERS, padded("right"), num_positions=2).log_probabilities
    found = ensemble(engine, MEMBERS, padded("right"), num_positions=2, rows_per_pass=rows_per_pass).log_probabilities
    assert torch.allclose(found, expected, rtol=1e-5)


def test_all_members_share_one_forward_pass_where_they_fit(engine: Composer) -> None:
    rows = []
    handle = engine.model.register_forward_pre_hook(
        lambda model, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    ensemble(engine, MEMBERS, padded("left"))
    ensemble(engine, MEMBERS, padded("left"), rows_per_pass=6)
    handle.remove()
    assert rows == [12, 6, 6]


def test_passes_follow_from_the_tokens_and_logits_that_one_may_hold(engine: Composer, monkeypatch: Any) -> None:
    rows = []
    handle = engine.model.register_forward_pre_hook(
        lambda model, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr(member_passes, "MAX_TOKENS", 6 * 7)
    ensemble(engine, MEMBERS, padded("left"))
    monkeypatch.setattr(member_passes, "MAX_LOGITS", 3 * 61)
    ensemble(engine, MEMBERS, padded("left"))
    handle.remove()
    assert rows == [6, 6, 3, 3, 3, 3]


def test_no_keys_and_values_are_kept_unless_the_batch_asks_for_them(engine: Composer) -> None:
    kept = []
    handle = engine.model.register_forward_hook(lambda model, args, output: kept.append(output.past_key_values is not None))
    ensemble(engine, MEMBERS, padded("left"))
    ensemble(engine, MEMBERS, {**padded("left"), "use_cache": True})
    handle.remove()
    assert kept == [False, True]


def test_tokens_restrict_the_softmax_of_each_member(engine: Composer) -> None:
    tokens = [9, 40, 17]
    found = ensemble(engine, MEMBERS, padded("left"), tokens=tokens)
    for row in range(3):
        shares = torch.stack([alone(engine, member, row)[-1, tokens] for member in MEMBERS])
        expected = (shares / shares.sum(1, keepdim=True)).mean(0)
        assert torch.allclose(found.probabilities[row], expected, rtol=1e-5)
        assert found.best[row] == tokens[int(expected.argmax())]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_labels_restrict_the_softmax_to_their_summed_likelihoods(
    kind: str, side: str, make_model: Any, make_adapters: Any, tokenizer: Any
) -> None:
    engine = double_engine(kind, make_model, make_adapters, tokenizer)
    found = ensemble(engine, MEMBERS, padded(side), labels=LABELS, weights=[4, 1, 2, 1])
    targets = [tokenizer(f" {label}</s>", add_special_tokens=False)["input_ids"] for label in LABELS]
    for row in range(3):
        prompt = IDS[row, : LENGTHS[row]].tolist()
        shares = []
        for member in MEMBERS:
            with engine.activate(member or {}):
                sums = [summed(engine.model, prompt, target) for target in targets]
            shares.append(torch.tensor(sums, dtype=torch.float64).softmax(0))
        expected = torch.einsum("m,ml->l", torch.tensor([4.0, 1.0, 2.0, 1.0], dtype=torch.float64) / 8, torch.stack(shares))
        assert torch.allclose(found.probabilities[row], expected, rtol=1e-4, atol=1e-7)
        assert found.best[row] == LABELS[int(expected.argmax())]


def summed(model: Any, prompt: list[int], target: list[int]) -> float:
    if model.config.is_encoder_decoder:
        return -float(model(input_ids=torch.tensor([prompt]), labels=torch.tensor([target])).loss) * len(target)
    logs = model(input_ids=torch.tensor([prompt + target])).logits[0].log_softmax(-1)
    return sum(float(logs[len(prompt) - 1 + k, token]) for k, token in enumerate(target))


def test_an_encoder_decoder_predicts_after_the_last_token_of_its_answer(make_model: Any, make_adapters: Any) -> None:
    engine = double_engine("t5", make_model, make_adapters)
    batch = {**padded("left"), "decoder_input_ids": torch.tensor([[0, 9], [0, 8], [0, 4]])}
    found = ensemble(engine, MEMBERS, batch)
    expected = []
    for member in MEMBERS:
        with torch.no_grad(), engine.activate(member or {}):
            expected.append(engine.model(**batch).logits[:, -1].softmax(-1))
    assert torch.allclose(found.probabilities, torch.stack(expected).mean(0), rtol=1e-5)


def test_a_classifier_gives_its_classes(make_model: Any, make_adapters: Any) -> None:
    engine = double_engine("bert", make_model, make_adapters)
    found = ensemble(engine, MEMBERS, padded("right"))
    expected = []
    for member in MEMBERS:
        with torch.no_grad(), engine.activate(member or {}):
            expected.append(engine.model(**padded("right")).logits.softmax(-1))
    assert torch.allclose(found.probabilities, torch.stack(expected).mean(0), rtol=1e-5)
    with pytest.raises(CompositionError, match="classifies"):
        ensemble(engine, MEMBERS, padded("right"), num_positions=2)


class Halves:
    """A router: each token of a layer's input gets "a" where its first feature is positive, else "b"."""

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        positive_BT = (x_BTI[..., 0] > 0).to(x_BTI.dtype)
        return torch.stack([positive_BT, 1 - positive_BT, torch.zeros_like(positive_BT)], dim=-1)


def test_a_router_and_weights_by_layer_are_members_like_any_other(engine: Composer) -> None:
    layers = tuple(engine.pool.layer_names)[:2]
    by_layer = MixtureWeights(torch.tensor([[[[0.5, -1.0], [0.2, 0.9]]]]), ("a", "c"), layers)
    members = [Halves(), by_layer, MixtureWeights.of({"b": 0.3}, ["b"])]
    found = ensemble(engine, members, {"input_ids": IDS}).probabilities
    expected = []
    for member in members:
        with torch.no_grad(), engine.activate(member):
            expected.append(engine.model(input_ids=IDS).logits[:, -1].softmax(-1))
    assert torch.allclose(found, torch.stack(expected).mean(0), rtol=1e-5)


def test_entropies_are_those_of_the_average_and_of_the_members(engine: Composer) -> None:
    found = ensemble(engine, MEMBERS, padded("left"))
    p_BV, p_MBV = found.probabilities, found.members_MBV.exp()
    total_B = -(p_BV * p_BV.log()).sum(-1)
    each_MB = -(p_MBV * p_MBV.log()).sum(-1)
    assert torch.allclose(found.entropy, total_B)
    assert torch.allclose(found.member_entropy, each_MB)
    # mutual information as the mean divergence of the members from the average
    divergence_B = (p_MBV * (p_MBV.log() - p_BV.log())).sum(-1).mean(0)
    assert torch.allclose(found.disagreement, divergence_B, atol=1e-9)
    assert float(found.disagreement.min()) > 1e-4


def test_a_member_of_weight_zero_says_nothing(engine: Composer) -> None:
    found = ensemble(engine, [{"a": 1.0}, {"b": 1.0}], padded("left"), weights=[3, 0])
    expected = ensemble(engine, [{"a": 1.0}], padded("left"))
    assert torch.allclose(found.log_probabilities, expected.log_probabilities, rtol=1e-6)
    assert torch.allclose(found.disagreement, torch.zeros(3, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("members", [{"a": 1.0}, [], "a", ["a"], [[{"a": 1.0}, None, None]], [0.5]])
def test_members_that_are_none_are_refused_by_name(members: Any, engine: Composer) -> None:
    with pytest.raises(WeightingError, match=r"a list of at least one mixture|member 0 of the ensemble|mixture is"):
        ensemble(engine, members, padded("left"))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]])
def test_weights_that_are_no_shares_are_refused(weights: list[float], engine: Composer) -> None:
    with pytest.raises(WeightingError, match=r"weights for 2 members|shares of an average"):
        ensemble(engine, [None, {"a": 1.0}], padded("left"), weights=weights)


def test_what_cannot_be_asked_is_refused_before_the_model_runs(engine: Composer, tokenizer: Any) -> None:
    engine.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(UnknownExpert, match="'d'"):
        ensemble(engine, [{"d": 1.0}], padded("left"))
    with pytest.raises(ScopeError, match="2 rows"):
        ensemble(engine, [MixtureWeights.of([{"a": 1.0}, None], ["a"])], padded("left"))
    with pytest.raises(CompositionError, match="tokenizer"):
        ensemble(engine, MEMBERS, padded("left"), labels=LABELS)
    with pytest.raises(CompositionError, match="shortest row has 4"):
        ensemble(engine, MEMBERS, padded("left"), num_positions=5)
    with pytest.raises(CompositionError, match="no tensor with rows"):
        ensemble(engine, MEMBERS, {})
    for tokens in ([], [61], [3, 3], [0.5]):
        with pytest.raises(InvalidTask, match="below 61"):
            ensemble(engine, MEMBERS, padded("left"), tokens=tokens)
    speaking = Composer(engine.model, engine.pool, tokenizer=tokenizer)
    with pytest.raises(CompositionError, match="no cache"):
        ensemble(engine, MEMBERS, {**padded("left"), "past_key_values": object()})
    with pytest.raises(CompositionError, match=r"'pixel_values' of the batch \(shape \(6, 3, 2, 2\)\)"):
        ensemble(engine, MEMBERS, {**padded("left"), "pixel_values": torch.zeros(6, 3, 2, 2)})
    with pytest.raises(CompositionError, match="labels= follow a text"):
        ensemble(speaking, MEMBERS, {**padded("left"), "pixel_values": torch.zeros(3, 3, 2, 2)}, labels=LABELS)
    for labels in ([], ["no", "no"], ["no", " "]):
        with pytest.raises(InvalidTask, match="label"):
            ensemble(speaking, MEMBERS, padded("left"), labels=labels)
    with pytest.raises(InvalidTask, match="leave tokens="):
        ensemble(speaking, MEMBERS, padded("left"), labels=LABELS, tokens=[4])


@pytest.mark.parametrize("option", ["rows_per_pass", "num_positions"])
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_what_counts_rows_and_positions_is_a_whole_number(option: str, value: Any, engine: Composer) -> None:
    with pytest.raises(CompositionError, match=rf"{option} is {value}; it must be a whole number of at least 1"):
        ensemble(engine, MEMBERS, padded("right"), **{option: value})


def test_it_has_its_public_name() -> None:
    assert lw.ensemble is ensemble
