"""The one reader of rows: every form by what it says, and everything else by its number and what it has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loraweave.common.chat import Conversation
from loraweave.common.rows import Row, located, read_asked, read_row, read_rows
from loraweave.errors import InvalidTask
from loraweave.types import Task

WANT = [Row("cat", ("cats",)), Row("dog", ("dogs",))]
SYSTEM = {"role": "system", "content": "Write the plural."}
CHAT = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "cats"}]


class ClassLabel:
    """Like that of datasets: a column of integers with names."""

    names = ("cats", "dogs")


class Dataset:
    """Like datasets.Dataset: iteration gives a mapping for each row, `features` tells of the columns."""

    def __init__(self, rows, **features):
        self.rows, self.features = rows, features
        self.column_names = list(rows[0])

    def __iter__(self):
        return iter(self.rows)


def mappings(column, answer):
    return [{column: text, answer: target, "id": 7} for text, target in (("cat", "cats"), ("dog", "dogs"))]


@pytest.mark.parametrize(
    "rows",
    [
        [("cat", "cats"), ["dog", "dogs"]],
        (pair for pair in [("cat", "cats"), ("dog", "dogs")]),
        zip(["cat", "dog"], ["cats", "dogs"], strict=True),
        mappings("input", "target"),
        mappings("input", "output"),
        mappings("question", "answer"),
        mappings("text", "label"),
        Dataset(mappings("input", "target")),
        Dataset([{"text": "cat", "label": 0}, {"text": "dog", "label": 1}], text=None, label=ClassLabel()),
        [{"input": "cat", "target": "cats", "text": None, "label": float("nan")}, ("dog", "dogs")],
        [{"input": "cat", "target": ["cats"], "also_ok": []}, ("dog", "dogs")],
    ],
)
def test_rows_of_every_form_are_the_same(rows):
    assert read_rows(rows, targets="several") == WANT


@pytest.mark.parametrize("answer", ["completion", "target"])
def test_a_prompt_is_a_whole_prompt_whatever_stands_beside_it(answer):
    row = {"prompt": "cat:", answer: "cats", "input": "cat"}
    assert read_rows([row]) == [Row("cat:", ("cats",), whole_prompt=True)]


def test_a_pandas_frame_is_its_rows_and_not_its_columns():
    pandas = pytest.importorskip("pandas")
    assert read_rows(pandas.DataFrame(mappings("text", "label"))) == WANT
    with pytest.raises(InvalidTask, match=r"row 2 has \['id', 'text'\], and no 'label'"):
        read_rows(pandas.DataFrame([*mappings("text", "label")[:1], {"text": "dog", "id": 8}]))


@pytest.mark.parametrize("given", [str, Path])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".JSONL"])
def test_a_jsonl_file_is_its_lines(tmp_path, given, ending):
    file = tmp_path / f"rows{ending}"
    file.write_text('\ufeff{"input": "cat", "target": "cats"}\n\n["dog", "dogs"]\n', encoding="utf-8")
    assert read_rows(given(file)) == WANT


def test_line_separators_inside_a_text_end_no_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"input": "a\u2028b\x85c", "target": "d\re"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(file) == [Row("a\u2028b\x85c", ("d\re",))]


@pytest.mark.parametrize("given", [str, Path])
def test_a_csv_file_is_its_rows(tmp_path, given):
    file = tmp_path / "rows.csv"
    file.write_text('question,id,answer\ncat,1,cats\n"dog\u2028,\n""big""",2,"do\r\ngs"\n', encoding="utf-8", newline="")
    assert read_rows(given(file)) == [Row("cat", ("cats",)), Row('dog\u2028,\n"big"', ("do\r\ngs",))]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"input": "a", "target": "b"}\n{"input"', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl line 1 is not JSON"),
        ("a.jsonl", b'{"input": "a"}', r"a.jsonl line 1 has \['input'\], and no 'target'"),
        ("a.jsonl", b"\xff", r"a.jsonl is not UTF-8 text \(byte 0\)"),
        ("a.csv", b"input,target\na,b\nc", r"a.csv row 2 has \['input'\], and no 'target'"),
        ("a.csv", b"input,target\na,b,c", "a.csv row 1 has more fields than the first line has names: quote texts"),
        ("a.csv", b"input,target\n" + b"a" * 200_000 + b",b", "a.csv is not CSV .*field larger than field limit"),
        ("a.csv", b"a,b\n1,2", r"a.csv row 1 has \['a', 'b'\], and no 'input' and no 'target'"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidTask, match=said):
        read_rows(tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InvalidTask, match=r"gone.csv cannot be read \(No such file"):
        read_rows(str(tmp_path / "gone.csv"))


def test_a_chat_is_its_last_answer_and_the_turns_before_it():
    found = read_row({"messages": [SYSTEM, *CHAT]}, "row 1")
    asked = (("system", "Write the plural."), ("user", "cat"))
    assert found == Row("cat", ("cats",), "Write the plural.", chat=Conversation(asked))
    several = [SYSTEM, *CHAT, {"role": "user", "content": "dog"}, {"role": "assistant", "content": "dogs"}]
    chat = Conversation((*asked, ("assistant", "cats"), ("user", "dog")))
    text = "user: cat\nassistant: cats\nuser: dog"
    assert read_row({"messages": several}, "row 1") == Row(text, ("dogs",), "Write the plural.", chat=chat)


@pytest.mark.parametrize(
    "row",
    [
        [SYSTEM, *CHAT],
        ([SYSTEM, CHAT[0]], "cats"),
        {"prompt": [SYSTEM, CHAT[0]], "completion": CHAT[1:]},
        {"prompt": [SYSTEM, CHAT[0]], "completion": "cats"},
        {"input": [SYSTEM, CHAT[0]], "target": "cats"},
        {"messages": [SYSTEM, {**CHAT[0], "tool_calls": None}, CHAT[1]], "id": 7},
    ],
)
def test_messages_are_the_same_row_in_every_form(row):
    assert read_row(row, "row 1") == read_row({"messages": [SYSTEM, *CHAT]}, "row 1")


@pytest.mark.parametrize("given", [CHAT[:1], CHAT, {"messages": CHAT[:1]}, {"prompt": CHAT[:1]}, (CHAT[:1], "cats")])
def test_messages_are_an_input_with_or_without_their_answer(given):
    assert read_row(given, "row 1", targets="none") == Row("cat", chat=Conversation((("user", "cat"),)))
    assert read_asked([given, "dog"]) == [Conversation((("user", "cat"),)), "dog"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        CHAT[:1],
        CHAT[1:],
        [*CHAT, CHAT[0]],
        [*CHAT, CHAT[1]],
        "cat",
        [{"role": "user"}, CHAT[1]],
        [{"role": "user", "content": [{"type": "text", "text": "cat"}]}, CHAT[1]],
        [CHAT[0], {**CHAT[1], "tool_calls": [{"name": "plural"}]}],
        [{"role": 3, "content": "cat"}, CHAT[1]],
    ],
)
def test_a_chat_without_a_question_and_its_answer_in_text_is_refused(messages):
    with pytest.raises(InvalidTask, match=r"row 4 has .*messages"):
        read_row({"messages": messages}, "row 4")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": CHAT[:1], "completion": CHAT}, "row 4 has a completion of user, assistant: .* one turn"),
        ({"prompt": "cat", "completion": CHAT[1:]}, r"row 4 has \[{.*'completion', which is not one text"),
        ({"prompt": CHAT, "completion": "cats"}, "row 4 has messages of user, assistant, assistant"),
        ({"messages": [CHAT[0], {**CHAT[1], "name": "x"}]}, "row 4 has the field 'name' in turn 2"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, r"row 4 \(input 'cat'\) has an empty target"),
    ],
)
def test_messages_of_another_form_are_named_with_the_place(row, said):
    with pytest.raises(InvalidTask, match=said):
        read_row(row, "row 4")


def test_a_row_may_have_its_instruction_and_its_split():
    row = {"input": "cat", "target": "cats", "definition": "Plural", "split": "test"}
    assert read_row(row, "row 1") == Row("cat", ("cats",), "Plural", split="test")
    assert read_row({**row, "instruction": "Say it"}, "row 1").instruction == "Say it"


def test_several_targets_are_read_where_several_are_asked_for():
    rows = [("cat", ["cats", "felines"]), {"input": "cat", "target": "cats", "also_ok": ["felines"]}]
    assert {row.targets for row in read_rows(rows, targets="several")} == {("cats", "felines")}
    assert read_rows(rows[1:])[0].targets == ("cats",)
    for row, said in ((rows[0], "row 1 is .*not a pair of texts"), ({"text": "x", "label": ["a", "b"]}, "not one text")):
        with pytest.raises(InvalidTask, match=said):
            read_rows([row])


def test_inputs_are_texts_or_those_of_rows_where_inputs_alone_count():
    given = ["cat", ("cat", "cats"), {"text": "cat"}, {"question": "cat", "answer": 3}, {"prompt": "cat", "input": "x"}]
    assert [row.input for row in read_rows(given, targets="none")] == ["cat"] * 5
    assert [row.targets for row in read_rows(given[:3], targets="any")] == [(), ("cats",), ()]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("ab", "row 2 is 'ab', not a pair of texts"),
        (b"ab", "row 2 is b'ab', not a pair"),
        (7, "row 2 is 7, not a pair"),
        (None, "row 2 is None, not a pair"),
        (("x", 2), r"row 2 is \('x', 2\), not a pair of texts"),
        ((None, "x"), "row 2 is .* not a pair of texts"),
        (("x", "y", "z"), "row 2 is .* not a pair of texts"),
        ({"a": 1, "b": 2}, r"row 2 has \['a', 'b'\], and no"),
        (("x", " \n"), r"row 2 \(input 'x'\) has an empty target"),
        (("x", ["y", ""]), "row 2 .*"),
        ({}, r"row 2 has \[\], and no 'input' and no 'target'"),
        ({"foo": 1}, r"row 2 has \['foo'\], and no 'input' and no 'target'"),
        ({1: "a", "target": "b"}, r"row 2 has \['1', 'target'\], and no 'input'"),
        ({"prompt": "x"}, "and no 'completion' or 'target'"),
        ({"input": "x", "label": "y"}, "and no 'target'"),
        ({"input": 3, "target": "y"}, "row 2 has 3 as 'input', which is not a text"),
        ({"text": "x", "label": 3}, "row 2 has 3 as 'label', which is not .*names of labels, not their numbers"),
        ({"input": "x", "target": "y", "also_ok": [3]}, r"row 2 has \[3\] as 'also_ok'"),
        ({"input": "x", "target": "y", "instruction": 3}, "row 2 has 3 as its instruction"),
        ({"input": "x", "target": "y", "text": "u", "label": "v"}, "input/target and text/label could be the texts"),
        ({"input": "x", "target": "y", "messages": CHAT}, "input/target and messages could be"),
        ({"prompt": "x", "target": "y", "completion": "z"}, "prompt/completion and prompt/target could be"),
        (np.array(["x", "y"]), "row 2 is .* not a pair of texts"),
    ],
)
def test_a_row_of_another_form_is_named_with_what_it_has(row, said):
    with pytest.raises(InvalidTask, match=said):
        read_rows([("a", "b"), row], targets="several")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("walk", "pairs of it: got 'walk', not rows"),
        (b"walk", "got b'walk', not rows"),
        (3, "got 3, not rows"),
        (None, "got None, not rows"),
        (dict, "not rows"),
        ({"input": "x", "target": "y"}, "got one mapping with 'input', 'target', not rows: pass a list of rows"),
        ({"train": [], "test": []}, "got one mapping with 'train', 'test', not rows: .*one of its parts"),
    ],
)
def test_what_is_no_rows_is_named(given, said):
    with pytest.raises(InvalidTask, match=said):
        read_rows(given, of="pairs of it")


def test_one_text_for_a_list_of_inputs_is_answered_with_the_list():
    with pytest.raises(InvalidTask, match=r"got the text 'hello' alone: give a list of texts, \['hello'\]$"):
        read_asked("hello")


def test_rows_of_several_splits_are_not_taken_together():
    rows = [{"input": "x", "target": "y", "split": split} for split in ("train", "train", "test")]
    with pytest.raises(InvalidTask, match="row 3 of dataset is of split 'test', and those before it of 'train'"):
        read_rows(rows, of="dataset")
    assert len(list(located(rows, one_split=False))) == len(read_rows(rows, one_split=False)) == 3


def test_columns_of_other_names_are_read_under_the_usual_ones_and_the_rest_does_not_count():
    rows = [{"sentence": "cat", "class": "animal", "text": "not this"}, {"sentence": "oak", "class": "plant", "label": 3}]
    columns = {"sentence": "input", "class": "target"}
    assert read_rows(rows, columns=columns) == [Row("cat", ("animal",)), Row("oak", ("plant",))]
    with pytest.raises(InvalidTask, match=r"row 1 has .*no 'target' or 'output'"):
        read_rows(rows, columns={"sentence": "input", "klass": "target"})
    with pytest.raises(InvalidTask, match="row 1 is 'cat', not a pair of texts"):
        read_rows(["cat"], columns=columns)


def test_a_label_without_a_name_keeps_its_number_and_is_refused():
    with pytest.raises(InvalidTask, match="row 1 has -1 as 'label'"):
        read_rows(Dataset([{"text": "cat", "label": -1}], label=ClassLabel()))


def test_a_task_takes_the_instruction_that_its_rows_agree_on():
    rows = [{"input": text, "target": "x", "instruction": "Do."} for text in "ab"]
    assert Task(rows).instruction == "Do."
    assert Task(rows, instruction="Other.").instruction == "Other."
    with pytest.raises(InvalidTask, match=r"example 1 has the instruction 'Do.', and example 3 '': pass the task's as"):
        Task([*rows, ("c", "d")])


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (("2", "two"), "Spell. 2 is"),
        ({"input": "2", "target": "two", "instruction": None}, "Spell. 2 is"),
        ({"input": "2", "target": "two", "instruction": "Say."}, "Say. 2 is"),
        ({"prompt": "2?", "target": "two", "instruction": "Say."}, "2?"),
    ],
)
def test_a_row_has_its_own_prompt_or_that_of_its_task(row, prompt):
    assert Task([], instruction="Spell.", template="{instruction} {input} is").prompt_of(read_row(row, "row 4")) == prompt
