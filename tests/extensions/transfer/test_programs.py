"""An adapter that answers as a program does: what it learns from, and what was lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

import loraweave as lw
from loraweave.errors import CompositionError, InvalidTask, TrainingError
from loraweave.extensions.transfer import distil_program, programs
from loraweave.extensions.transfer.programs import card_inputs, recombined

EXAMPLES = [("a", "i"), ("b", "j"), ("c", "k"), ("d", "l")]


@pytest.fixture
def program(trained_letters, tokenizer, letter_hub):
    return lw.order(trained_letters[0], tokenizer, letter_hub, EXAMPLES, progress=False)


def test_a_distilled_program_answers_alike_in_one_pass_and_says_what_was_lost(program, tmp_path):
    made = distil_program(program, ["a", "b", "c", "d"], steps=150, lr=1e-2, progress=False)
    (row,) = made.report.rows
    assert "learned one > two from 0 inputs that it labelled; agrees with it on" in made.report.reason
    assert made.losses() == pytest.approx([row.loss] * 4, abs=2 * row.loss + 1e-3)
    assert made.task.instruction == "go on do it"
    assert [parent["name"] for parent in made.parents] == ["one", "two"]
    assert f"became {row.loss:.3f}" in made.report.reason
    trained = {layer.rsplit(".", 1)[-1] for layer in made.adapter.layers}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert made.predict(["a", "b", "c", "d"]) == program.predict(["a", "b", "c", "d"])
    made.export(tmp_path / "plain")
    assert lw.Adapter.from_pretrained(tmp_path / "plain").hash == made.adapter.hash


def test_without_inputs_the_cards_of_the_hub_are_asked(program, letter_hub):
    assert card_inputs(letter_hub, "one", ["a", "b"], 3, 0) == ["a", "b", "c"]
    # letters alone look like letters alone, whatever adapter they are of
    assert card_inputs(letter_hub, "two", ["a", "b"], 9, 0) == ["e", "f", "g", "h", "a", "b", "c", "d"]
    assert set(card_inputs(letter_hub, None, ["A: 1, 2, 3.", "B: 4, 5, 6."], 99, 0)) == {
        f"{mark}: {one}, {two}, {three}." for mark in "AB" for one in "14" for two in "25" for three in "36"
    } - {"A: 1, 2, 3.", "B: 4, 5, 6."}
    assert distil_program(program, num_inputs=6, steps=2, progress=False).report.chosen == "distilled"


def test_new_inputs_have_each_word_where_a_text_of_as_many_words_has_it():
    texts = ["1 2", "3 4", "5 6", "alone", "the other"]
    found = recombined(texts, 99, seed=0)
    assert set(found) == {f"{first} {last}" for first in ("1", "3", "5", "the") for last in ("2", "4", "6", "other")} - set(
        texts
    )
    assert found == recombined(texts, 99, seed=0)
    assert recombined(texts, 2, seed=0) == found[:2]
    assert recombined([], 9, seed=0) == recombined(["alone", "one"], 9, seed=0) == []


def test_a_program_has_nothing_to_learn_from_without_inputs(program):
    with pytest.raises(InvalidTask, match="nothing for program 'one > two' to label; inputs is empty"):
        distil_program(program, [], progress=False)
    with pytest.raises(TrainingError, match="steps=0"):
        distil_program(program, ["a"], steps=0)


@pytest.mark.usefixtures("warm_workers")
def test_two_workers_label_as_one_process_does_by_the_hub_alone(program, letter_hub, tmp_path, monkeypatch):
    for part in (program.model, program.tokenizer):
        part.save_pretrained(tmp_path / "base")
    model, tokenizer = lw.load_base(tmp_path / "base")
    there, settings = replace(program, model=model, tokenizer=tokenizer), {"steps": 2, "progress": False}
    monkeypatch.setattr(programs, "BATCH_SIZE", 2)
    # none of them an example, whose answer is known
    inputs = ["ab", "bc", "cd", "da"]
    alone = distil_program(there, inputs, **settings)
    found = distil_program(there, inputs, n_jobs=2, **settings)
    assert found.adapter.hash == alone.adapter.hash
    assert found.report.reason == alone.report.reason
    letter_hub.add(replace(letter_hub["two"], name="one"), replace=True)
    with pytest.raises(CompositionError, match="the program was made with adapter 'one' of content"):
        distil_program(there, ["a", "b"], n_jobs=1, **settings)
