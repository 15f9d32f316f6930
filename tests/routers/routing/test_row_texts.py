"""The texts of one row."""

import pytest

import loraweave as lw
from loraweave.errors import InvalidTask
from loraweave.routers.routing.row_texts import row_texts

TASK = lw.Task([], instruction="Spell.", template="{instruction} {input} is")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (("2", "two"), "Spell. 2 is"),
        (["2", "two"], "Spell. 2 is"),
        ({"input": "2", "target": "two"}, "Spell. 2 is"),
        ({"input": "2", "target": "two", "instruction": None}, "Spell. 2 is"),
        ({"input": "2", "target": "two", "instruction": "Say."}, "Say. 2 is"),
        ({"prompt": "2?", "target": "two", "instruction": "Say."}, "2?"),
        ({"prompt": "2?", "input": "3", "target": "two"}, "2?"),
    ],
)
def test_a_row_has_its_own_prompt_or_that_of_its_task(row, prompt):
    assert row_texts(row, TASK, where="row 4", forms="rows are pairs") == (prompt, "two")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("ab", "row 4 is 'ab': rows are pairs"),
        (("2", 2), r"row 4 is \('2', 2\): rows are pairs"),
        (("1", "2", "3"), r"row 4 is .*: rows are pairs"),
        (7, "row 4 is 7: rows are pairs"),
        ({"prompt": 2, "target": "two"}, r"row 4 is \(2, 'two'\): rows are pairs"),
        ({"inputs": "2", "target": "two"}, r"row 4 has \['inputs', 'target'\], and no 'input': rows are pairs"),
        ({1: "2", "x": "two"}, r"row 4 has \['1', 'x'\], and no 'input' and no 'target'"),
        ({"prompt": "2?"}, r"row 4 has \['prompt'\], and no 'target'"),
        (("2", " "), r"row 4 \(input '2'\) has an empty target"),
    ],
)
def test_a_row_of_another_form_is_named(row, message):
    with pytest.raises(InvalidTask, match=message):
        row_texts(row, TASK, where="row 4", forms="rows are pairs")
