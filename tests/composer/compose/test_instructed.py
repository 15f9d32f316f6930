"""compose() without an example: stored adapters are found by the task's instruction."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import loraweave as lw
from loraweave import registry
from loraweave.composer.compose import program_search, ways
from loraweave.composer.compose.compose import SHARE
from loraweave.errors import InvalidTask

WORDS = ["go", "on", "do", "it", "say", "no", "well"]


class Words:
    """An embedder whose vectors count words and letters, so that cosines can be computed by hand."""

    id, dim, max_tokens = "words", len(WORDS) + 26, None

    def embed(self, texts):
        rows = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().replace(",", " ").split():
                place = WORDS.index(word) if word in WORDS else len(WORDS) + ord(word[0]) % 26
                rows[row, place] += 1
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


@pytest.fixture
def compose(trained_letters, tokenizer, letter_hub, monkeypatch):
    get = registry.get
    monkeypatch.setattr(registry, "get", lambda folder, name: Words if folder == "embedders" else get(folder, name))
    return partial(_composed, trained_letters[0], tokenizer, letter_hub)


def _composed(model, tokenizer, hub, instruction, labels=None, **options):
    return lw.compose(model, tokenizer, hub, lw.Task([], instruction=instruction, labels=labels), progress=False, **options)


def answers_of(trained_letters, tokenizer, name, instruction, texts):
    model, adapters = trained_letters
    with lw.Composer(model, [adapters[name]]).activate({name: 1.0}):
        return lw.Composition.of(model, tokenizer, lw.Task([], instruction=instruction)).predict(texts)


@pytest.mark.parametrize("instruction", ["go on, do it", "do it, go on"])
def test_two_skills_in_an_instruction_are_answered_one_after_the_other(compose, trained_letters, tokenizer, instruction):
    composition = compose(instruction)
    # "one" writes what the samples of "two" are, whatever the instruction says first
    assert list(composition.steps) == ["one", "two"]
    between = answers_of(trained_letters, tokenizer, "one", "go on", ["a", "d"])
    assert composition.predict(["a", "d"]) == answers_of(trained_letters, tokenizer, "two", "do it", between) == ["i", "l"]
    # (1 1 1 1) / 2 with (1 1 0 0) / sqrt 2, and with the sum of both
    assert "both descriptions 1.00" in composition.report.reason
    assert "alone has 0.71" in composition.report.reason
    assert composition.report.chosen == "one > two"
    assert composition.mean_weights == {"one": 0.5, "two": 0.5}


def test_a_skill_that_is_stored_answers_alone_by_its_own_instruction(compose, trained_letters, tokenizer, letter_hub):
    composition = compose("go on")
    assert composition.report.chosen == "one"
    assert composition.task.instruction == "go on"
    assert composition.predict(["a", "b"]) == answers_of(trained_letters, tokenizer, "one", "go on", ["a", "b"])
    assert composition.weights == {"one": 1.0}
    assert composition.adapter.hash == letter_hub.record("one").hash


def test_where_nothing_has_the_skill_the_nearest_answer_beside_the_base(compose):
    # cosine 1/2 with "go on" and 0 with the others; with a sum of two, at most 1/2 as well
    composition = compose("go well well well")
    assert {name: member.share for name, member in composition.members.items()} == {
        "base": SHARE,
        "one": 1.0,
        "two": 1.0,
        "nothing": 1.0,
    }
    assert "no stored adapter is near enough" in composition.report.reason


def test_a_pair_no_nearer_than_one_adapter_is_no_program(compose):
    # (3 1) with "go on": 4 / sqrt(2 * 10) = 0.89; with the sum of it and another, 4 / sqrt(4 * 10) = 0.63
    composition = compose("go go go on")
    assert not composition.steps
    assert "one alone has 0.89" in composition.report.reason


def test_a_task_with_labels_has_no_program_and_its_labels_are_calibrated_by_the_inputs(compose):
    composition = compose("go on, do it", labels=["i", "j"], inputs=["a", "b"])
    assert list(composition.members) == ["base", "one", "two", "nothing"]
    assert all(member.task.labels == ("i", "j") for member in composition.members.values())
    assert composition.task.calibrated == ("a", "b")
    assert set(composition.predict(["a", "b", "c"])) <= {"i", "j"}


def test_a_composition_by_an_instruction_is_kept_whole(compose, trained_letters, tokenizer, letter_hub, tmp_path):
    for number, instruction in enumerate(["go on", "go on, do it", "go well well well"]):
        composition = compose(instruction)
        composition.save_pretrained(tmp_path / str(number))
        read = lw.Composition.from_pretrained(tmp_path / str(number), trained_letters[0], tokenizer)
        assert read.predict(["a", "d"]) == composition.predict(["a", "d"])
        assert read.report.reason == composition.report.reason


def test_the_in_context_adapter_answers_in_the_place_of_the_base(compose, trained_letters, letter_hub):
    letter_hub.add(trained_letters[1]["two"], name="reader", tags=["in-context"], description="Reads examples.")
    ranked = compose("go well well well", labels=["i", "j"])
    assert {name: member.share for name, member in ranked.members.items()} == {
        "reader": SHARE,
        "one": 1.0,
        "two": 1.0,
        "nothing": 1.0,
    }
    # what is written is the reader's alone
    written = compose("go well well well")
    assert written.report.chosen == written.stored.name == "reader"
    assert written.task.instruction == "go well well well"


def test_without_examples_it_takes_a_hub_and_an_instruction(compose, trained_letters, tokenizer, letter_hub):
    with pytest.raises(InvalidTask, match=r"no examples.*hub, and with an instruction"):
        compose("")
    with pytest.raises(InvalidTask, match="no examples"):
        _composed(trained_letters[0], tokenizer, letter_hub.pool(["one", "two"]), "go on")
    for name in ("one", "two", "nothing"):
        letter_hub.update(name, description="")
    with pytest.raises(InvalidTask, match=r"none of the 3 adapters found in .* has a description"):
        compose("go on")


def test_one_example_confirms_the_program_that_the_instruction_asks_for(compose, trained_letters, tokenizer, letter_hub):
    task = lw.Task([("a", "i")], instruction="go on, do it")
    composition = lw.compose(trained_letters[0], tokenizer, letter_hub, task, progress=False)
    assert list(composition.steps) == ["one", "two"]
    assert composition.predict(["b", "d"]) == ["j", "l"]
    assert "the instruction asks for both skills" in composition.report.reason
    losses = {row.name: row.loss for row in composition.report.rows}
    assert losses["program"] < 0.5 * losses["base"]
    # an example that the program does not answer: what prompts say stands
    other = lw.Task([("a", "d")], instruction="go on, do it")
    shown = lw.compose(trained_letters[0], tokenizer, letter_hub, other, progress=False)
    assert not shown.steps
    assert "program one > two was left out" in shown.report.reason
    assert "one example is shown in prompts" in shown.report.reason


def test_of_several_examples_the_stated_program_is_a_member_and_none_is_sought(
    compose, trained_letters, tokenizer, letter_hub, monkeypatch
):
    of_two_skills = [("a", "i"), ("b", "j"), ("c", "k"), ("d", "l")]

    def composed(examples):
        task = lw.Task(examples, instruction="go on, do it")
        return lw.compose(trained_letters[0], tokenizer, letter_hub, task, progress=False)

    def unasked(*_, **__):
        raise AssertionError("a program is sought")

    with monkeypatch.context() as patched:
        patched.setattr(program_search, "search_programs", unasked)
        # far better than prompts alone, it answers by itself
        assert list(composed(of_two_skills).steps) == ["one", "two"]
        patched.setattr(ways, "SURE", 0.0)
        averaged = composed(of_two_skills)
        assert list(averaged.members) == ["gradient", "few_shot", "program"]
        assert list(averaged.members["program"].steps) == ["one", "two"]
        # one of the two skills answers these better than both together: the stated program is none
        with pytest.raises(AssertionError, match="a program is sought"):
            composed([(text, chr(ord(answer) - 4)) for text, answer in of_two_skills])
