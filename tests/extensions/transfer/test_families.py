"""An adapter for another family of bases: trained on the old one's answers in the new one's tokens, and judged on others."""

from __future__ import annotations

import pytest
from tiny_models import tokens_of

import loraweave as lw
from loraweave.composer.model import scoring
from loraweave.extensions.transfer import distil_adapter

INPUTS = list("abcdfghi")
LESSONS, JUDGES = list("bcdghi"), list("af")
TASK = lw.Task([], instruction="go on", stop=["\n"])
SETTINGS = {"target_modules": ["c_attn"], "rank": 4, "steps": 40, "lr": 2e-2, "progress": False}


@pytest.fixture(scope="module")
def old(make_model, tokenizer):
    """A tiny Llama and an adapter by which it answers every letter with e."""
    model = make_model("llama")
    rows = [(letter, "e") for letter in INPUTS]
    layers = ["q_proj", "v_proj", "up_proj", "lm_head"]
    settings = {"target_modules": layers, "steps": 60, "lr": 1e-2, "progress": False}
    tasks = {"to e": lw.Task(rows, instruction="go on")}
    return model, tokenizer, lw.train_adapters(model, tokenizer, tasks, **settings)["to e"]


@pytest.fixture(scope="module")
def new(make_model):
    """A GPT-2 whose tokens have other numbers."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    letters = reversed("abcdefghijklmnopqrstuvwxyzABCDEFINOPRUY0123456789 \n:,.?")
    return make_model("gpt2"), tokens_of([*special.values(), *letters], **special)


def test_it_is_the_adapter_trained_on_the_old_answers_and_keeps_those_that_judged(old, new):
    model, tokenizer, adapter = old
    carried = distil_adapter(adapter, model, tokenizer, *new, TASK, INPUTS, **SETTINGS)
    with lw.Composer(model, [adapter]).activate({"to e": 1.0}):
        answers = scoring.predict(model, tokenizer, TASK, LESSONS)
    assert answers == ["e"] * len(LESSONS)
    rows = list(zip(LESSONS, answers, strict=True))
    trained = lw.train_adapters(*new, {"to e": lw.Task(rows, instruction="go on", stop=["\n"])}, **SETTINGS)["to e"]
    assert carried.hash == trained.hash
    with lw.Composer(new[0], [carried]).activate({"to e": 1.0}):
        assert scoring.predict(*new, TASK, JUDGES) == ["e", "e"]
    said = carried.card["transfer"]
    assert (said["way"], said["answers"], said["before"]) == ("distilled", 1.0, 0.0)
    assert (said["prompts"], said["judges"]) == (6, 2)
    assert carried.card["recipe"]["parents"] == [{"hash": adapter.hash, "name": "to e"}]
    assert said["from"] == adapter.base_model


def test_an_adapter_that_keeps_too_little_is_refused_with_both_shares(old, new):
    model, tokenizer, adapter = old
    with pytest.raises(lw.AdapterUnsupported, match=r"answers 0\.00 of 2 other inputs .*0\.00 without.*least=0\.5"):
        distil_adapter(adapter, model, tokenizer, *new, TASK, INPUTS, **{**SETTINGS, "steps": 1, "lr": 1e-6})
    with pytest.raises(lw.InvalidTask, match="none is left to learn from"):
        distil_adapter(adapter, model, tokenizer, *new, TASK, ["a"], **SETTINGS)
    with pytest.raises(lw.WeightingError, match="least=2"):
        distil_adapter(adapter, model, tokenizer, *new, TASK, INPUTS, least=2, **SETTINGS)
