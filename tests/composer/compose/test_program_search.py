"""The search for an order, where steps are functions of texts whose programs can be written down."""

from __future__ import annotations

import pytest

import loraweave as lw
from loraweave.composer.compose import program_search as searching
from loraweave.composer.compose.program_search import ProgramSearch, Reading, Step
from loraweave.errors import SearchFailed

FUNCTIONS = {
    "upper": str.upper,
    "second": lambda text: text[1:2],
    "reverse": lambda text: text[::-1],
    "plural": lambda text: f"{text}s",
    "same": lambda text: text,
    "first": lambda text: text.split()[0] if text.split() else "",
}
STEPS = {name: Step(name, f"do {name}") for name in FUNCTIONS}
BASE = Step(None, "do it all")
WORDS = ["cat dog", "sun moon", "tree bush", "ball bat", "king queen"]


class Asking:
    """Answers by the functions; a target's loss is the share of its characters that the answer lacks, place by place."""

    def __init__(self, functions=FUNCTIONS, base=None):
        self.functions = {STEPS[name]: made for name, made in functions.items()} | {BASE: base or (lambda text: "no")}
        self.asked = []
        self.read = []

    def answers(self, questions):
        self.asked += questions
        return [self.functions[step](text) for step, text in questions]

    def readings(self, targets):
        self.read += targets
        return [self._reading(self.functions[step](text), target) for step, text, target in targets]

    def _reading(self, answer, target):
        wrong = sum(a != b for a, b in zip(answer.ljust(len(target)), target, strict=False))
        return Reading(wrong / len(target) + 0.01 * abs(len(answer) - len(target)), answer == target)


def task_of(*names):
    rows = []
    for text in WORDS:
        target = text
        for name in names:
            target = FUNCTIONS[name](target)
        rows.append((text, target))
    return lw.Task(rows)


def found(task, max_steps=3, asking=None, gain=0.1, beam=4):
    steps = list(STEPS.values())
    search = ProgramSearch(asking or Asking(), task, [*steps, BASE], [*steps, BASE], beam, gain)
    search.run(max_steps)
    path, _ = search.best()
    return [step.label for step in path], search


UNIQUE = [["reverse"], ["first", "plural"], ["plural", "reverse"], ["first", "plural", "upper"]]


@pytest.mark.parametrize("made", UNIQUE)
def test_the_program_that_made_the_task_is_found(made):
    names, search = found(task_of(*made))
    row = next(row for row in search.rows() if row.steps == tuple(names))
    assert (names, row.loss, row.hits, row.num_examples) == (made, 0.0, 1.0, 5)


def test_two_steps_are_told_from_their_order():
    names, search = found(task_of("plural", "reverse"), max_steps=2)
    rows = {row.steps: row for row in search.rows()}
    assert names == ["plural", "reverse"]
    assert rows["reverse", "plural"].loss > 0.5


def test_no_longer_program_is_tried_once_one_writes_every_example():
    _, search = found(task_of("reverse"))
    assert {len(row.steps) for row in search.rows()} == {1}


def test_a_longer_program_must_gain_its_share():
    class Close(Asking):
        def readings(self, targets):
            return [
                Reading(0.95 if step.name == "upper" and text.endswith("s") else 1.0, False) for step, text, _ in targets
            ]

    task = task_of("plural", "upper")
    assert found(task, 2, Close(), gain=0.1)[0] == ["upper"]
    assert found(task, 2, Close(), gain=0.04)[0] == ["plural", "upper"]


def test_three_steps_are_tried_only_where_two_gain_their_share():
    class Close(Asking):
        def readings(self, targets):
            return [Reading(0.95 if text.endswith("s") else 1.0, False) for step, text, _ in targets]

    task = task_of("plural", "upper")
    assert {len(row.steps) for row in found(task, 3, Close(), gain=0.1)[1].rows()} == {1, 2}
    assert {len(row.steps) for row in found(task, 3, Close(), gain=0.04)[1].rows()} == {1, 2, 3}


def test_pairs_are_measured_on_as_long_as_one_is_better_than_the_best_step_on_the_same_examples():
    names, search = found(lw.Task([(text, "qqqqqqq") for text in WORDS]))
    assert len(names) == 1
    assert {row.num_examples for row in search.rows() if len(row.steps) == 2} == {1}
    rows = [(text, FUNCTIONS["plural"](text) if number else text[::-1][1:]) for number, text in enumerate(WORDS)]
    names, search = found(lw.Task(rows))
    assert names == ["plural"]
    assert {row.num_examples for row in search.rows() if len(row.steps) == 2} == {1, 2}


def test_the_base_is_a_step_only_where_it_wins():
    same_as_upper = Asking(base=str.upper)
    assert found(task_of("upper"), asking=same_as_upper)[0] == ["upper"]
    alone = Asking(base=lambda text: f"<{text}>")
    wrapped = lw.Task([(text, f"<{text[::-1]}>") for text in WORDS])
    assert found(wrapped, asking=alone)[0] == ["reverse", "(base)"]


def test_the_worse_programs_see_one_example_and_the_best_see_all(monkeypatch):
    monkeypatch.setattr(searching, "ROUNDS", ((1, 6), (2, 3)))
    _, search = found(task_of("first", "plural"), max_steps=2)
    seen = [row.num_examples for row in search.rows() if len(row.steps) == 2]
    assert (seen.count(5), seen.count(2), seen.count(1)) == (3, 3, 7 * 6 - 6)
    losses = {n: [row.loss for row in search.rows() if len(row.steps) == 2 and row.num_examples == n] for n in (5, 1)}
    assert losses[5] == sorted(losses[5])
    assert min(losses[1]) >= 0.0


def test_a_step_occurs_once_in_a_program():
    _, search = found(task_of("plural", "reverse", "upper"), beam=3)
    assert all(len(set(row.steps)) == len(row.steps) for row in search.rows())


def test_where_no_loss_is_a_number_nothing_is_chosen():
    class Broken(Asking):
        def readings(self, targets):
            return [Reading(float("nan"), False) for _ in targets]

    with pytest.raises(SearchFailed, match="none of 49 programs has a finite loss"):
        found(task_of("upper"), 2, Broken())


def test_only_the_best_steps_alone_may_be_last(monkeypatch):
    monkeypatch.setattr(searching, "LASTS", 2)
    _, search = found(task_of("first", "plural", "upper"), max_steps=3)
    alone = sorted((row for row in search.rows() if len(row.steps) == 1), key=lambda row: row.loss)
    best = {row.steps[0] for row in alone if row.loss <= alone[1].loss}
    assert {row.steps[-1] for row in search.rows() if len(row.steps) > 1} <= best
