"""The tasks of examples/tasks_by_rule.py: reproducible, each answer as its instruction says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

WORDS = ["acorn", "blue", "drum", "elephant", "fir", "ghost", "hammer", "iris", "jumble", "kind", "lizard", "motorbike"]
SENTENCES = ["The boat was red.", "Anna saw the tall man.", "Rain fell."]


@pytest.fixture(scope="module")
def tasks_by_rule():
    return runpy.run_path(str(Path(__file__).parents[1] / "examples" / "tasks_by_rule.py"))["tasks_by_rule"]


def test_a_seed_gives_the_same_rows_and_another_gives_others(tasks_by_rule):
    first, again, other = (tasks_by_rule(WORDS, SENTENCES, seed) for seed in (0, 0, 1))
    assert len(first) == 85
    assert first == again
    assert first["missing"].examples != other["missing"].examples
    assert 0 < sum(not task.instruction for task in first.values()) < 85


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("missing", lambda text: (set(text.split(" | ")[0].split(", ")) - set(text.split(" | ")[1].split(", "))).pop()),
        ("longest_4", lambda text: max(text.split(", "), key=len)),
        ("fourth_of_5", lambda text: text.split(", ")[3]),
        (
            "after",
            lambda text: text.split(" | ")[0].split(", ")[text.split(" | ")[0].split(", ").index(text.split(" | ")[1]) + 1],
        ),
        ("tens", lambda text: str(int(text) // 10 % 10)),
        (
            "lookup_num",
            lambda text: dict(pair.split("=") for pair in text.split(" | ")[0].split(", "))[text.split(" | ")[1]],
        ),
        ("last_word", lambda text: text.rstrip(".").split(" ")[-1]),
        ("same", lambda text: "same" if text.split(", ")[0] == text.split(", ")[1] else "different"),
        ("odd", lambda text: "odd" if text[-1] in "13579" else "even"),
    ],
)
def test_answers_are_those_of_the_rule(tasks_by_rule, name, answer):
    task = tasks_by_rule(WORDS, SENTENCES)[name]
    assert len(task.examples) == len(dict(task.examples)) >= 3
    for given, target in task.examples:
        assert target == answer(given)


def test_every_label_is_there_and_no_other(tasks_by_rule):
    labelled = {name: task for name, task in tasks_by_rule(WORDS, SENTENCES).items() if task.labels}
    assert len(labelled) == 10
    for task in labelled.values():
        assert {target for _, target in task.examples} == set(task.labels)
