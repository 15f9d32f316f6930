from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest
import torch

from loraweave.common.rows import Row
from loraweave.errors import InvalidTask
from loraweave.routers.weights import Router
from loraweave.types import Candidate, Factors, Fingerprint, Record, Task

RECORD = Record("x", "0" * 64, "base", 8, ("q_proj",), None, (), "", 1, "2026-01-01T00:00:00+00:00")


def factors(**parts):
    return Factors(torch.ones(3, 7), torch.ones(5, 3), **parts)


def test_the_rank_is_the_number_of_rows_of_a():
    assert factors().rank == 3


@pytest.mark.parametrize(
    ("part", "bound"), [("gain_O", True), ("bias_O", True), ("magnitude_O", False), ("base_bias_O", False)]
)
def test_factors_are_unbound_while_a_part_needs_the_base_layer(part, bound):
    assert factors(**{part: torch.ones(5)}).bound is bound


def test_tensors_are_those_present_by_field_name():
    assert list(factors(bias_O=torch.ones(5)).tensors()) == ["a_RI", "b_OR", "bias_O"]


@pytest.mark.parametrize(
    ("value", "field"),
    [(factors(), "a_RI"), (Fingerprint("x"), "shapes"), (RECORD, "name"), (Task([("a", "b")]), "examples")],
)
def test_the_nouns_are_frozen_and_replace_makes_another(value, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)
    assert dataclasses.replace(value) is not value


def test_a_candidate_bears_its_evidence():
    assert Candidate("x", 0.5, "matched the sample 'a cat'", RECORD).evidence == "matched the sample 'a cat'"


def test_whatever_has_weights_is_a_router():
    class Half:
        def weights(self, x_BTI, layer):
            return torch.full((1, 1, 2), 0.5)

    assert isinstance(Half(), Router)
    assert not isinstance(object(), Router)


def test_equal_fingerprints_do_not_differ():
    assert Fingerprint("a", (0.5, -1.0)).differs(Fingerprint("a", (0.5, -1.0))) == ""


def test_other_shapes_differ_and_both_hashes_are_named():
    reason = Fingerprint("aaa", (1.0,)).differs(Fingerprint("bbb", (1.0,)))
    assert "aaa" in reason
    assert "bbb" in reason


@pytest.mark.parametrize("samples", [(), (2.0,)])
def test_without_samples_on_both_sides_shapes_alone_decide(samples):
    assert Fingerprint("a").differs(Fingerprint("a", samples)) == ""
    assert Fingerprint("a", samples).differs(Fingerprint("a")) == ""


@pytest.mark.parametrize(("factor", "same"), [(1 + 2.0**-8, True), (1 - 2.0**-8, True), (1 + 2.0**-6, False), (-1.0, False)])
def test_samples_within_one_unit_of_bf16_are_the_same(factor, same):
    left, right = Fingerprint("a", (0.3, 5.0)), Fingerprint("a", (0.3, 5.0 * factor))
    assert (left.differs(right) == "") is same
    assert (right.differs(left) == "") is same


def test_different_samples_are_counted_and_the_first_pair_is_shown():
    reason = Fingerprint("a", (1.0, 2.0, 3.0)).differs(Fingerprint("a", (1.0, 2.5, 4.0)))
    assert reason == "2 of 3 sampled weights differ, the first 2 and 2.5"


def test_a_fingerprint_survives_json():
    fingerprint = Fingerprint("abc", (0.1, -3e-7))
    assert Fingerprint.from_json(json.loads(json.dumps(fingerprint.to_json()))) == fingerprint


def test_a_fingerprint_without_samples_is_read_from_json():
    assert Fingerprint.from_json({"shapes": "abc"}) == Fingerprint("abc")


def test_a_task_keeps_its_examples_as_tuples_in_order():
    assert Task([["a", "1"], ("b", "2")]).examples == (("a", "1"), ("b", "2"))


def test_a_task_without_examples_is_only_an_instruction():
    assert Task([], instruction="Translate.").examples == ()


def test_labels_make_the_metric_rank_classification():
    task = Task([("a", "yes")], labels=["yes", "no"])
    assert (task.metric, task.labels) == ("rank_classification", ("yes", "no"))


def test_the_prompt_of_the_default_template():
    assert Task([("a", "b")], instruction="Name it.").prompt("cat") == "Name it.\nInput: cat\nOutput:"


def test_a_template_of_its_own_is_filled():
    assert Task([("a", "b")], instruction="Do", template="Q: {input} [{instruction}] A:").prompt("x") == "Q: x [Do] A:"


def test_a_prompt_shows_the_demonstrations_but_never_its_own_input():
    task = Task([("a", "A"), ("b", "B")], instruction="Up.", demonstrations=True)
    assert task.prompt("c") == "Up.\nInput: a\nOutput: A\n\nUp.\nInput: b\nOutput: B\n\nUp.\nInput: c\nOutput:"
    assert task.prompt("a") == "Up.\nInput: b\nOutput: B\n\nUp.\nInput: a\nOutput:"
    assert replace(task, examples=[("d", "D")]).prompt("c") == task.prompt("c")


def test_demonstrations_are_rows_in_any_form_and_fill_the_template():
    given = [{"question": "a", "answer": "A"}, ["b", "B"]]
    task = Task((), template="{input}={instruction}", instruction="?", demonstrations=given)
    assert task.demonstrations == (("a", "A"), ("b", "B"))
    assert task.prompt("{input}") == "a=? A\n\nb=? B\n\n{input}=?"
    assert task.prompt_of(Row("c", instruction="!")) == "a=! A\n\nb=! B\n\nc=!"


@pytest.mark.parametrize("text", ["{instruction}", "{input}", "{", "}}{0}", "\\n", ""])
def test_braces_in_an_input_stay_what_they_are(text):
    assert Task([("a", "b")], instruction="I").prompt(text) == f"I\nInput: {text}\nOutput:"


@pytest.mark.parametrize("instruction", ["{input}", "{instruction}", "{x}"])
def test_braces_in_an_instruction_stay_what_they_are(instruction):
    assert Task([("a", "b")], instruction=instruction).prompt("t") == f"{instruction}\nInput: t\nOutput:"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"examples": [("a", "")]}, r"example 1 \(input 'a'\) has an empty target"),
        ({"examples": [("a", "b"), ("c", " \n")]}, r"example 2 \(input 'c'\) has an empty target"),
        ({"examples": [("a", "b", "c")]}, r"example 1 is \('a', 'b', 'c'\), not a pair"),
        ({"examples": [("a", 3)]}, r"example 1 is \('a', 3\), not a pair of texts"),
        ({"examples": [(None, "b")]}, "example 1 .* not a pair of texts"),
        ({"examples": ["ab"]}, "example 1 is 'ab', not a pair"),
        ({"examples": [("a", "b")], "metric": "bleu"}, "metric 'bleu' is neither"),
        ({"examples": [("a", "b")], "metric": "rank_classification"}, "needs labels"),
        ({"examples": [("a", "b")], "labels": []}, "needs labels"),
        ({"examples": [("a", "b")], "labels": ["b", "d", "b"]}, "give each once"),
        ({"examples": [("a", "b")], "labels": ["c", "d"]}, "example 1 has target 'b', which is not one of the labels"),
        ({"examples": [("a", "b")], "template": "no field"}, "'no field' has no field {input}"),
        ({"examples": [("a", "b")], "demonstrations": [("a", "")]}, r"demonstration 1 \(input 'a'\) has an empty target"),
    ],
)
def test_what_cannot_be_a_task_is_refused_with_what_was_found(arguments, message):
    with pytest.raises(InvalidTask, match=message):
        Task(**arguments)


def test_a_candidate_is_shown_in_a_line_without_its_card_and_examples():
    record = Record("a", "0" * 64, "base", 8, ("q",), None, (), "", 0, "", ("x" * 10_000,), card={"note": "y" * 10_000})
    assert repr(Candidate("a", 0.5, "sample input 'x' (0.50)", record)) == (
        "Candidate(name='a', score=0.5, evidence=\"sample input 'x' (0.50)\")"
    )
    assert len(repr(record)) < 500
