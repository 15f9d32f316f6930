"""Answers of ensembles, against decoding written out with one member, one row and no cache at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.composer.ensembles.ensemble import answers
from loraweave.composer.model import scoring
from loraweave.errors import CompositionError
from loraweave.types import Task

MEMBERS = [{"a": 1.0}, {"b": 0.7, "c": -0.4}, None]
WEIGHTS = [2.0, 1.0, 1.0]
INPUTS = ["is it good?", "no", "what a very long question, and more", "to be"]
TASK = Task([], template="{input}")


def engine_of(kind: str, make_model: Any, make_adapters: Any, tokenizer: Any) -> Composer:
    model = make_model(kind, dtype=torch.float64)
    return Composer(model, make_adapters(model, kind), tokenizer=tokenizer)


@torch.no_grad()
def average(engine: Composer, ids: list[int], written: list[int]) -> torch.Tensor:
    """p_V of the next token: a member at a time, without cache or padding."""
    total = torch.zeros(())
    for member, weight in zip(MEMBERS, WEIGHTS, strict=True):
        with engine.activate(member or {}):
            if engine.model.config.is_encoder_decoder:
                decoder = torch.tensor([[engine.model.config.decoder_start_token_id, *written]])
                logits = engine.model(input_ids=torch.tensor([ids]), decoder_input_ids=decoder).logits
            else:
                logits = engine.model(input_ids=torch.tensor([ids + written])).logits
        total = total + weight / sum(WEIGHTS) * logits[0, -1].softmax(-1)
    return total


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_text_is_decoded_greedily_from_the_averaged_probabilities(
    kind: str, make_model: Any, make_adapters: Any, tokenizer: Any
) -> None:
    engine = engine_of(kind, make_model, make_adapters, tokenizer)
    found = answers(engine, MEMBERS, TASK, INPUTS, weights=WEIGHTS, max_new_tokens=9)
    newline = tokenizer("\n")["input_ids"][0]
    for text, answer in zip(INPUTS, found, strict=True):
        written: list[int] = []
        while len(written) < 9 and not {2, newline} & set(written):
            written.append(int(average(engine, tokenizer(text)["input_ids"], written).argmax()))
        expected = tokenizer.decode([token for token in written if token not in (2, newline)], skip_special_tokens=True)
        assert answer == expected.strip()
    assert found != scoring.predict(engine.model, tokenizer, TASK, INPUTS, max_new_tokens=9)


def test_labels_are_ranked_by_their_averaged_probabilities(make_model: Any, make_adapters: Any, tokenizer: Any) -> None:
    engine = engine_of("llama", make_model, make_adapters, tokenizer)
    labels = ("yes", "no", "maybe so", "it is")
    found = answers(engine, MEMBERS, Task([], template="{input}", labels=labels), INPUTS, weights=WEIGHTS)
    for text, answer in zip(INPUTS, found, strict=True):
        shares = torch.zeros(4, dtype=torch.float64)
        for member, weight in zip(MEMBERS, WEIGHTS, strict=True):
            inputs = scoring.pad_prompts(engine.model, tokenizer, [text])
            with torch.no_grad(), engine.activate(member or {}):
                losses_BL = scoring.label_losses(
                    engine.model, inputs["input_ids"], inputs["attention_mask"], scoring.label_ids(tokenizer, labels)
                )
            shares += weight * (-losses_BL[0]).softmax(0)
        assert answer == labels[int(shares.argmax())]


def test_one_member_answers_as_its_mixture_does(make_model: Any, make_adapters: Any, tokenizer: Any) -> None:
    engine = engine_of("llama", make_model, make_adapters, tokenizer)
    with engine.activate({"a": 1.0}):
        expected = scoring.predict(engine.model, tokenizer, TASK, INPUTS, max_new_tokens=9)
    assert answers(engine, [{"a": 1.0}], TASK, INPUTS, max_new_tokens=9) == expected


def test_no_inputs_get_no_answers(make_model: Any, make_adapters: Any, tokenizer: Any) -> None:
    assert answers(engine_of("llama", make_model, make_adapters, tokenizer), MEMBERS, TASK, []) == []


def test_an_engine_without_a_tokenizer_is_refused(make_model: Any, make_adapters: Any) -> None:
    with pytest.raises(CompositionError, match="tokenizer"):
        answers(engine_of("llama", make_model, make_adapters, None), MEMBERS, TASK, INPUTS)
