"""Data sets whose rows say whose they are."""

from __future__ import annotations

import pytest

import loraweave as lw
from loraweave.errors import InvalidTask
from loraweave.routers.routing.labelled_tasks import labelled_tasks
from loraweave.routers.routing.labelled_texts import labelled_texts


def test_rows_are_gathered_by_their_expert_in_the_order_that_they_come_in():
    rows = [
        {"input": "1", "target": "one", "expert": "b"},
        {"input": "2", "target": "two", "expert": "a"},
        {"input": "3", "target": "three", "expert": "b"},
    ]
    found = labelled_tasks(iter(rows))
    assert {name: task.examples for name, task in found.items()} == {
        "b": (("1", "one"), ("3", "three")),
        "a": (("2", "two"),),
    }
    assert list(found) == ["b", "a"]


def test_texts_are_prompts_already_and_examples_become_prompts():
    assert labelled_texts({"a": ["x", "y"], "b": []}) == {"a": ["x", "y"], "b": []}
    assert labelled_texts({"a": lw.Task([("x", "y")], template="Q {input} A")}) == {"a": ["Q x A"]}


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "is empty"),
        ({}, "is empty"),
        ({"a": lw.Task([])}, "no examples of 'a'"),
        ({"a": [("x",)]}, "example 1 is"),
        ([{"input": "x", "target": "y", "expert": ""}], "row 1 of the data set names no expert"),
        ([{"input": "x"}], "row 1 of the data set is"),
    ],
)
def test_what_is_no_such_data_set_is_refused(dataset, message):
    with pytest.raises(InvalidTask, match=message):
        labelled_tasks(dataset)
