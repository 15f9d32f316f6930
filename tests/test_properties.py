"""The walk over an entry's properties: each is tried by itself, and those that fail or are skipped are named."""

from __future__ import annotations

import ast
import json
import os
import random
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import Properties
from pytest_timeout import PYTEST_FAILURE_MESSAGE

TESTS = Path(__file__).parent
WALKING = [
    path for path in sorted(TESTS.rglob("test_*.py")) if "\nPROPERTIES = Properties(" in path.read_text(encoding="utf-8")
]


@pytest.fixture
def walk(request):
    """walk(properties, "an entry"): how the case ends, its message, and what it records: (number tried, skipped)."""

    def walk(properties, entry, wanted="", **shared):
        node = SimpleNamespace(user_properties=[])
        config = SimpleNamespace(getoption=lambda name: wanted)
        case = SimpleNamespace(config=config, node=node, getfixturevalue=request.getfixturevalue)
        end, message = "passed", ""
        try:
            properties.walk(case, entry, **shared)
        except pytest.fail.Exception as error:
            end, message = "failed", str(error)
        except pytest.skip.Exception as error:
            end, message = "skipped", str(error)
        return end, message, dict(node.user_properties)["properties"]

    return walk


def test_a_case_fails_with_each_property_that_fails_and_no_other(walk):
    properties, tried = Properties(["left", "right"]), []

    @properties.add()
    def one_is_two(name):
        tried.append("first")
        number = 1
        assert number == 2, f"of {name}"

    @properties.add()
    def one_is_one():
        tried.append("second")

    @properties.add()
    def what_is_absent_is_found():
        tried.append("third")
        raise LookupError("nothing there")

    @properties.add(of=["left"])
    def left_is_right():
        raise AssertionError("never here")

    end, message, (number, skipped) = walk(properties, "right")
    assert (end, number, skipped) == ("failed", 3, [])
    assert tried == ["first", "second", "third"]
    assert message.startswith("right: 2 of 3 properties fail")
    first, second = message.split("\n----- ")[1:]
    assert first.startswith("one is two -----")
    assert "assert number == 2" in first
    assert "AssertionError: of right\nE   assert 1 == 2" in first
    assert second.startswith("what is absent is found -----")
    assert 'raise LookupError("nothing there")' in second
    assert "one is one" not in message
    assert "never here" not in message
    # a traceback begins in the property
    assert "properties.py:" not in message.replace("test_properties.py:", "")


def test_a_property_that_is_skipped_is_recorded_and_a_case_that_tried_none_is_skipped(walk):
    properties = Properties(["left", "right"])

    @properties.add()
    def it_is_blue():
        pytest.skip("no colours here")

    @properties.add(of=["left"])
    def it_is_red():
        pass

    skipped = lambda name: [(name, "it is blue", "no colours here")]  # noqa: E731
    assert walk(properties, "left") == ("passed", "", (2, skipped("left")))
    assert walk(properties, "right") == ("skipped", "no colours here", (1, skipped("right")))


def test_a_failure_hides_no_skip(walk):
    properties = Properties(["left"])

    @properties.add()
    def it_is_blue():
        pytest.skip("no colours here")

    @properties.add()
    def it_is_red():
        raise ValueError

    end, message, (number, skipped) = walk(properties, "left")
    assert (end, number, skipped) == ("failed", 2, [("left", "it is blue", "no colours here")])
    assert "it is blue" not in message


def test_each_value_of_a_parameter_is_a_property_that_failures_name(walk):
    properties, tried = Properties(["left", "right"]), []

    @properties.add(a=[1, 2], b_c=["x", "y"])
    def both_are_small(a, b_c):
        tried.append((a, b_c))
        assert (a, b_c) != (2, "x")

    _, message, (number, _) = walk(properties, "left")
    assert tried == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    assert number == 4
    assert message.startswith("left: 1 of 4 properties fail")
    assert "----- both are small [a=2, b_c='x'] -----" in message


@pytest.mark.parametrize(
    "wrong", [{"of": []}, {"of": ["left", "up"]}, {"number": []}], ids=["of nothing", "of an unknown entry", "of no value"]
)
def test_a_property_that_could_not_be_tried_is_refused(wrong):
    with pytest.raises(ValueError, match="the entries are"):
        Properties(["left", "right"]).add(**wrong)


def test_what_properties_take_is_new_for_each_and_closed_after_it(walk):
    properties, seen, open_now = Properties(["left"]), [], []

    @properties.given
    def model(name, base):
        return [name, base]

    @properties.given
    def pool(model):
        open_now.append(model)
        yield [model]
        open_now.remove(model)

    for _ in range(2):

        @properties.add()
        def things_belong_together(model, pool, base, tmp_path, monkeypatch):
            assert open_now == [model] == pool
            assert pool[0] is model
            assert list(tmp_path.iterdir()) == []
            assert "PROPERTY" not in os.environ
            (tmp_path / "file").touch()
            monkeypatch.setenv("PROPERTY", "set")
            seen.append((model, base, tmp_path))
            raise KeyError

    base = object()
    _, message, (number, _) = walk(properties, "left", base=base)
    assert message.count("E   KeyError") == number == 2
    assert open_now == []
    assert "PROPERTY" not in os.environ
    models, bases, folders = zip(*seen, strict=True)
    assert models[0] is not models[1]
    assert bases == (base, base)
    assert folders[0] != folders[1]


def test_each_property_begins_with_the_same_seeds(walk, seeded):
    properties, drawn = Properties(["left"]), []
    for _ in range(2):

        @properties.add()
        def it_draws():
            drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))

    walk(properties, "left")
    seeded()
    assert drawn == [(random.random(), float(np.random.rand()), float(torch.rand(())))] * 2


def test_warnings_are_errors_in_a_property_and_its_filters_end_with_it(walk):
    properties = Properties(["left"])

    @properties.add()
    def it_warns_and_may():
        warnings.simplefilter("ignore")
        warnings.warn("first", UserWarning, stacklevel=1)

    @properties.add()
    def it_warns():
        warnings.warn("second", UserWarning, stacklevel=1)

    _, message, _ = walk(properties, "left")
    assert message.startswith("left: 1 of 2 properties fail")
    assert "UserWarning: second" in message


def test_a_property_of_hypothesis_fails_with_its_example(walk):
    properties = Properties(["left"])

    @properties.add()
    @given(number=st.integers(0, 9))
    def numbers_are_small(name, number):
        assert number < 5

    _, message, _ = walk(properties, "left")
    assert "----- numbers are small -----" in message
    assert "number=5" in message


def test_the_walk_ends_with_a_property_whose_time_is_over(walk):
    properties = Properties(["left"])

    @properties.add()
    def it_hangs():
        pytest.fail(PYTEST_FAILURE_MESSAGE % 600)

    @properties.add()
    def it_might_hang_too():
        raise AssertionError("the clock of the case has rung")

    end, message, (number, _) = walk(properties, "left")
    assert (end, number) == ("failed", 1)
    assert "it hangs" in message


def test_one_property_can_be_tried_alone_and_fails_with_its_own_error(walk):
    properties, tried = Properties(["left"]), []

    @properties.add(rank_in=[0, 2])
    def one_is_two(rank_in):
        tried.append(rank_in)
        assert rank_in == 0

    @properties.add()
    def two_is_three():
        raise ValueError

    with pytest.raises(AssertionError, match="2 == 0"):
        walk(properties, "left", "one_is_two")
    assert tried == [0, 2]
    assert walk(properties, "left", "two [rank_in=0")[0] == "passed"
    with pytest.raises(ValueError):  # noqa: PT011
        walk(properties, "left", "is three")
    assert walk(properties, "left", "four")[:2] == ("skipped", "no property has 'four' in its name")


def test_the_summary_says_how_many_were_tried_and_which_were_skipped(request):
    blue, red = ("it is blue", "no colours here"), ("it is red", "no colours here")
    recorded = {"left": (4, [("left", *blue), ("left", *red)]), "right": (3, [("right", *blue)]), "up": (2, [])}
    reports = {"passed": [], "failed": [], "": [], "warnings": ["a warning"]}
    for name, value in recorded.items():
        for when, outcome in (("call", "failed" if name == "up" else "passed"), ("teardown", "")):
            about = {"nodeid": name, "location": ("file", 1, name), "keywords": {}, "longrepr": None, "when": when}
            report = pytest.TestReport(**about, outcome=outcome or "passed", user_properties=[("properties", value)])
            # as another process sends it
            sent = json.dumps(request.config.hook.pytest_report_to_serializable(config=request.config, report=report))
            received = request.config.hook.pytest_report_from_serializable(config=request.config, data=json.loads(sent))
            reports[outcome].append(received)
    lines = []
    terminal = SimpleNamespace(stats=reports, section=lines.append, line=lines.append)
    request.config.pluginmanager.get_plugin(str(TESTS / "conftest.py")).pytest_terminal_summary(terminal)
    assert lines == [
        "9 properties of 3 entries, 3 skipped",
        "SKIPPED it is blue: no colours here (left, right)",
        "SKIPPED it is red: no colours here (left)",
    ]


@pytest.mark.parametrize("path", WALKING, ids=lambda path: path.stem)
def test_no_function_beside_properties_is_one_that_nothing_tries(path):
    """A property whose decorator was forgotten is a function that nothing names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.decorator_list]
    assert [node.name for node in functions if node.name not in named and not node.name.startswith("test_")] == []
    # and the walk itself is there
    assert "PROPERTIES.walk(request, " in path.read_text(encoding="utf-8")
