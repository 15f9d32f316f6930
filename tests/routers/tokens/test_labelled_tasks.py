"""Data sets whose rows say whose they are."""

from __future__ import annotations

import pytest

import loraweave as lw
from loraweave.errors import InvalidTask
from loraweave.routers.tokens._text import labelled_tasks, read_prompts


def test_rows_are_gathered_by_their_expert_in_the_order_that_they_come_in():
    rows = [
        {"input": "1", "target": "one", "expert": "b"},
        {"input": "2", "target": "two", "expert": "a"},
        {"input": "3", "target": "three", "expert": "b"},
    ]
    found = labelled_tasks(iter(rows))
    asked = {name: [(task.prompt(text), target) for text, target in task.examples] for name, task in found.items()}
    assert asked == {
        "b": [("\nInput: 1\nOutput:", "one"), ("\nInput: 3\nOutput:", "three")],
        "a": [("\nInput: 2\nOutput:", "two")],
    }
    assert list(found) == ["b", "a"]


def test_a_row_may_have_its_instruction_or_be_the_whole_prompt():
    rows = [("1", "one"), {"input": "2", "target": "two", "instruction": "Spell."}, {"prompt": "3 =", "target": "three"}]
    task = labelled_tasks({"a": rows})["a"]
    asked = [(task.prompt(text), target) for text, target in task.examples]
    assert asked == [("\nInput: 1\nOutput:", "one"), ("Spell.\nInput: 2\nOutput:", "two"), ("3 =", "three")]


def test_texts_are_prompts_already_and_examples_become_prompts():
    assert read_prompts({"a": ["x", "y"], "b": []}) == {"a": ["x", "y"], "b": []}
    assert read_prompts({"a": lw.Task([("x", "y")], template="Q {input} A")}) == {"a": ["Q x A"]}


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "is empty"),
        ({}, "is empty"),
        ({"a": lw.Task([])}, "no examples of 'a'"),
        ({"a": [("x", "y"), ("x",)]}, r"row 2 of 'a' is \('x',\), not a pair of texts"),
        ({"a": 3}, "'a': got 3, not rows"),
        ({"a": [{"input": "x"}]}, r"row 1 of 'a' has \['input'\], and no 'target'"),
        ([{"input": "x", "target": "y", "expert": ""}], "row 1 of the data set.* names no expert"),
        ([("x", "y")], "row 1 of the data set.* names no expert"),
    ],
)
def test_what_is_no_such_data_set_is_refused(dataset, message):
    with pytest.raises(InvalidTask, match=message):
        labelled_tasks(dataset)
