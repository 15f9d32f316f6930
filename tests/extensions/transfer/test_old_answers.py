"""Answers of an adapter in its old base, and a carried adapter that learns them: from prompts alone, or not at all."""

import copy
from dataclasses import replace

import pytest
import torch

import loraweave as lw
from loraweave.composer.model.batches import batch
from loraweave.composer.train.jobs import row_losses
from loraweave.errors import AdapterUnsupported, BaseModelMismatch, InvalidTask, TrainingError
from loraweave.extensions.transfer.old_answers import MAX_ANSWER, Learning, answers, learned, split
from loraweave.hub.base import fingerprint

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# 40 texts of 6 to 10 characters in no order
TEXTS = ["".join(LETTERS[(7 * i * i + 3 * j * j + i * j) % 26] for j in range(6 + i % 5)) for i in range(40)]
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")


@pytest.fixture
def old(make_model):
    return make_model("llama")


@pytest.fixture
def adapter(old, make_adapter):
    return replace(make_adapter(old, "a", targets=TARGETS), fingerprint=fingerprint(old))


@pytest.fixture
def new(old):
    changed, generator = copy.deepcopy(old), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return changed


@pytest.fixture
def carried(adapter, new):
    return replace(adapter, fingerprint=fingerprint(new))


@pytest.fixture
def taught(old, adapter, tokenizer):
    """What teaches, and what judges."""
    return [answers(old, adapter, tokenizer, part, taught=True) for part in split(TEXTS)]


HOW = Learning(60, 1e-2, 0)


def test_an_answer_has_the_greedy_tokens_with_the_end_and_no_more(old, adapter, tokenizer):
    found = answers(old, adapter, tokenizer, TEXTS[:18])
    ends = old.generation_config.eos_token_id
    lengths = set()
    for text, row in zip(TEXTS, found, strict=False):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert row.prompt == tuple(ids[0].tolist())
        said: list[int] = []
        with torch.no_grad(), lw.Composer(old, [adapter]).activate({"a": 1.0}):
            while len(said) < MAX_ANSWER and ends not in said:
                said.append(int(old(input_ids=torch.cat([ids, torch.tensor([said]).long()], dim=1)).logits[0, -1].argmax()))
        assert row.target == tuple(said)
        lengths.add(len(said))
    assert len(lengths) > 1


def test_what_judges_never_teaches():
    prompts = ["a", "b", "c", "d", "e", "a", "f", "g", "h"]
    assert split(prompts) == (["b", "c", "d", "f", "g"], ["a", "e", "h"])
    for few in ([], ["a"], ["a", "a", "a"]):
        with pytest.raises(InvalidTask, match=f"of {len(few)} prompts none is left to learn from"):
            split(few)


def test_a_carried_adapter_comes_nearer_to_the_old_answers_on_prompts_that_it_has_not_seen(carried, new, tokenizer, taught):
    lessons, judges = taught
    state = {name: value.clone() for name, value in new.state_dict().items()}
    found, about = learned(carried, new, tokenizer, lessons, judges, Learning(60, 3e-3, 0), progress=False)

    @torch.no_grad()
    def apart(adapter):
        """The mean over the answers' tokens, each row alone."""
        with lw.Composer(new, [adapter]).activate({"a": 1.0}):
            losses = [row_losses(new, [row], batch(new, tokenizer, [row])) for row in judges]
        return float(torch.cat(losses, dim=1).mean())

    assert about["loss"] == pytest.approx([apart(carried), apart(found)], rel=1e-4)
    assert about["loss"][1] < 0.75 * about["loss"][0]
    assert (about["steps"], about["prompts"], about["judges"], about["rolled_back"]) == (60, 30, 10, False)
    assert {name: part.rank for name, part in found.layers.items()} == {n: p.rank for n, p in carried.layers.items()}
    assert all(torch.equal(value, state[name]) for name, value in new.state_dict().items())
    assert all(parameter.requires_grad for parameter in new.parameters())


def test_a_seed_gives_the_same_adapter_again(carried, new, tokenizer, taught):
    one, again, other = (
        learned(carried, new, tokenizer, *taught, Learning(3, 1e-3, seed), progress=False)[0].hash for seed in (0, 0, 1)
    )
    assert one == again != other


def test_steps_that_lead_away_from_the_old_answers_are_taken_back(carried, new, tokenizer, taught):
    found, about = learned(carried, new, tokenizer, *taught, Learning(2, 10.0, 0), progress=False)
    assert found.hash == carried.hash
    assert about["rolled_back"]
    assert about["loss"][1] > about["loss"][0]


def test_a_loss_that_is_not_finite_is_refused(carried, new, tokenizer, taught):
    with torch.no_grad():
        new.model.norm.weight[0] = torch.nan
    with pytest.raises(TrainingError, match="loss of job 'a' is nan"):
        learned(carried, new, tokenizer, *taught, HOW, progress=False)


def test_what_cannot_be_learned_in_the_new_base_is_refused(make_model, old, make_adapter, carried, new, tokenizer, taught):
    small = make_model("llama", vocab_size=20)
    with pytest.raises(BaseModelMismatch, match=r"old base's answers have token .* vocabulary has 20"):
        learned(carried, small, tokenizer, *taught, HOW, progress=False)
    biased = replace(make_adapter(old, "b", targets=("o_proj",), bias=True), fingerprint=fingerprint(new))
    with pytest.raises(AdapterUnsupported, match="has bias_O, and only a_RI and b_OR are trained"):
        learned(biased, new, tokenizer, *taught, HOW, progress=False)
