"""What rerank() reads as examples, and what it refuses before anything runs."""

from __future__ import annotations

import json

import pytest
from expert_families import WARNINGS, make, save_families
from peft import LoraConfig, get_peft_model

import loraweave as lw
from loraweave.extensions.reranking import first_order, rerank

PAIRS = [("one", "1"), ("two", "2"), ("three", "3")]
pytestmark = WARNINGS

HIT = lw.Candidate("a", 0.0, "", lw.Record("a", "", "", 3, (), None, (), "", 0, ""))


def test_every_form_of_examples_gives_the_same_score(tiny_llama, tokenizer, pool, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"input": text, "target": target} for text, target in PAIRS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    forms = (PAIRS, rows, file, lw.Task(PAIRS))
    scores = [rerank(tiny_llama, tokenizer, pool, form, [HIT])[0].score for form in forms]
    assert scores == scores[:1] * 4
    assert rerank(tiny_llama, tokenizer, pool, [("four of them", "9")], [HIT])[0].score != scores[0]


def test_messages_without_a_template_are_refused_with_the_way_out(tiny_llama, tokenizer, pool):
    messages = [[{"role": "user", "content": text}, {"role": "assistant", "content": target}] for text, target in PAIRS]
    with pytest.raises(lw.InvalidTask, match=r"tokenizer has no chat template, .* chat=False"):
        rerank(tiny_llama, tokenizer, pool, [{"messages": turns} for turns in messages], [HIT])


@pytest.mark.parametrize("rows", [["ab", "cd"], [{"foo": 1}], "walk", 3, None, [("one", "1"), ("two", 2)]])
def test_what_is_no_rows_is_refused(tiny_llama, tokenizer, pool, rows):
    places = r"(row|example|input|text) [12]\b" if isinstance(rows, list) else rf"got {rows!r}, not rows"
    with pytest.raises(lw.InvalidTask, match=places):
        rerank(tiny_llama, tokenizer, pool, rows, [HIT])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("adapters", r"pass lw.Hub\('adapters'\)"),
        (None, "a list of adapters"),
        ([], "empty"),
        (["a"], "'a'"),
        (5, "a list of adapters"),
    ],
)
def test_what_is_no_hub_and_no_adapters_is_refused_with_the_way_out(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lw.WeightingError, match=message):
        rerank(None, None, given, PAIRS, [HIT])
    assert not list(tmp_path.iterdir())


def test_pefts_adapters_in_a_base_are_refused_with_the_way_out(make_model, tokenizer, pool):
    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(lw.CompositionError, match=r"PeftModel\w* of peft, .* pass model\.unload\(\)"):
        rerank(model, tokenizer, pool, PAIRS, [HIT])
    with pytest.raises(lw.CompositionError, match=r"'model\.layers\.0\.self_attn\.q_proj' is peft's Linear.* unload\(\)"):
        rerank(model.get_base_model(), tokenizer, pool, PAIRS, [HIT])


def test_slopes_say_that_they_know_no_fused_experts(tmp_path_factory, tokenizer):
    _, adapters = save_families(tmp_path_factory)("mixtral")
    with pytest.raises(lw.CompositionError, match="an expert of a fused parameter, whose slopes"):
        first_order(lw.Composer(make(), adapters), tokenizer, lw.Task([("a", "b")]))
