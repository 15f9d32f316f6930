"""What method="auto" runs, and that its budget pays for all of it."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from rich.progress import Progress

import loraweave as lw
from loraweave.composer.compose import searched
from loraweave.composer.compose.race import RACERS, admit, tuned_steps
from loraweave.errors import InvalidTask, UnknownName, WeightingError

EXAMPLES = [("a", "ab"), ("b", "ba"), ("cc", "c"), ("d", "DD")]


def test_composing_races_where_nothing_else_is_asked_for(compose_on):
    found, asked = (compose_on(**way) for way in ({}, {"method": "auto"}))
    assert [(row.name, row.held_out_loss) for row in found.report.rows] == [
        (row.name, row.held_out_loss) for row in asked.report.rows
    ]
    assert {"base", "best_single", "uniform", "gradient"} == {row.name for row in found.report.rows}


@pytest.fixture
def task():
    return lw.Task(EXAMPLES, instruction="swap")


@pytest.fixture
def compose(compose_on):
    return partial(compose_on, method="auto")


@pytest.mark.parametrize("num_folds", [2, 3, 5])
@pytest.mark.parametrize("budget", [10, 31, 32, 48, 64, 100, 500])
def test_what_is_admitted_costs_at_most_the_budget(budget, num_folds):
    methods, budgets, _ = zip(*admit(RACERS, budget, None, num_folds), strict=True)
    steps = tuned_steps(budgets, budget, num_folds)
    # each fold's search sees (F - 1) / F of the examples, so that all F cost F - 1; the winner is run on all examples once
    races = sum(each * (num_folds - 1) for each in budgets) + 3 * steps * (num_folds - 1)
    final = max(budgets) + 3 * steps
    assert races + final <= budget or (len(budgets) == 1 and budgets[0] * num_folds <= budget)
    assert list(methods) == list(RACERS[: len(methods)])


def test_more_budget_admits_more_racers_and_then_training():
    counts = [len(admit(RACERS, budget, None, 2)) for budget in (32, 47, 48, 64, 1000)]
    assert counts == [1, 1, 2, 3, 3]
    assert tuned_steps([16, 16, 16], 94, 2) == 5
    assert tuned_steps([16, 16, 16], 93, 2) == 0


def test_seconds_alone_are_shared_by_all_racers_and_the_final_run():
    assert admit(RACERS, None, 8.0, 2) == [(method, None, 2.0) for method in RACERS]


def test_the_race_evaluates_no_more_than_its_budget(compose, monkeypatch):
    seen = 0
    cost = {"together": 1, "together_with_gradients": 2}

    def spied(name):
        original = getattr(searched, name)

        def spy(objectives, candidates):
            nonlocal seen
            pairs = zip(objectives, candidates, strict=True)
            seen += cost[name] * sum(len(objective.only) * len(own) for objective, own in pairs)
            return original(objectives, candidates)

        return spy

    for name in cost:
        monkeypatch.setattr(searched, name, spied(name))
    report = compose(budget=70).report
    assert [row.name for row in report.rows] == ["base", "best_single", "uniform", *RACERS]
    assert 50 < seen / len(EXAMPLES) <= 70
    finished = [row.name for row in report.rows if row.name in RACERS and row.loss is not None]
    assert len(finished) == 1


@pytest.mark.parametrize("seed", range(4))
def test_what_is_returned_is_never_worse_on_held_out_examples(compose, seed):
    composition = compose(seed=seed, budget=150)
    report = composition.report
    assert [row.name for row in report.rows][-1] == "gradient+tuned"
    assert report[report.chosen].held_out_loss == min(row.held_out_loss for row in report.rows)
    assert report[report.chosen].loss is not None
    assert sum(composition.losses()) / 4 == pytest.approx(report[report.chosen].loss, abs=2e-3)


def test_objectives_without_gradients_race_searches_that_need_none(compose):
    for options in ({"objective": "exact_match"}, {"space": "factors"}, {"objective": lambda model, examples: 1.0}):
        rows = [row.name for row in compose(budget=40, **options).report.rows]
        assert rows == ["base", "best_single", "uniform", "lorahub"]


def test_a_racer_whose_candidates_all_fail_leaves_the_race(compose, pool, monkeypatch):
    num_layers = len({layer for adapter in pool.adapters.values() for layer in adapter.layers})

    def failing(objectives, candidates):
        return [([math.nan] * len(asked), [torch.zeros(1, 1, num_layers, 3)] * len(asked)) for asked in candidates]

    monkeypatch.setattr(searched, "together_with_gradients", failing)
    report = compose(budget=150).report
    assert [row.name for row in report.rows] == ["base", "best_single", "uniform", "lorahub", "lorahub+tuned"]
    assert "gradient left the race: none of" in report.reason
    assert "first_order left the race: none of" in report.reason


@pytest.mark.parametrize("folds", [0, 2])
def test_a_race_that_all_left_takes_the_better_of_base_and_best_single(compose, folds):
    report = compose(budget=40, folds=folds, objective=lambda model, examples: math.nan).report
    assert [row.name for row in report.rows] == ["base", "best_single", "uniform"]
    assert report[report.chosen].held_out_loss == min(row.held_out_loss for row in report.rows)
    assert "lorahub left the race: none of" in report.reason


def test_a_winner_that_fails_on_all_examples_leaves_the_race_too(compose):
    report = compose(budget=40, objective=lambda model, examples: math.nan if len(examples) == 4 else 1.0).report
    assert [row.name for row in report.rows] == ["base", "best_single", "uniform"]
    assert "lorahub left the race: none of" in report.reason


def test_a_budget_below_one_step_of_the_race_is_refused(compose):
    with pytest.raises(WeightingError, match="budget is 3 evaluations, but method 'auto' with 2 folds needs at least 4"):
        compose(budget=3)


def test_an_interrupted_race_resumes_to_the_same_composition(compose, interrupt_search, tmp_path):
    whole = compose(budget=150)
    interrupt_search()
    with pytest.raises(KeyboardInterrupt):
        compose(budget=150, checkpoint=tmp_path)
    resumed = compose(budget=150, checkpoint=tmp_path)
    assert resumed.losses() == pytest.approx(whole.losses(), abs=1e-6)
    assert resumed.report.chosen == whole.report.chosen


def test_a_start_is_named_or_given_as_weights(compose, pool):
    for start in ("base", "uniform", "best_single", "best_three", {"a": 0.5}):
        report = compose(method="gradient", start=start, budget=6, folds=0).report
        assert report["gradient"].num_trained == 3 * len({layer for a in pool.adapters.values() for layer in a.layers})
    with pytest.raises(UnknownName, match="did you mean 'best_single'"):
        compose(method="gradient", start="best_singl")


def test_entropy_looks_at_inputs_and_never_at_targets_and_needs_no_examples(compose_on, tiny_llama, tokenizer, tmp_path):
    options = {"method": "adamerging", "inputs": ["c", "d e", "f"], "budget": 8}
    rows = [[(text, target) for text in ("a", "b")] for target in ("x", "y z")]
    *told, found = (compose_on(task=lw.Task(each, instruction="swap"), folds=0, **options) for each in (*rows, []))
    assert all(each.report["adamerging"].by_layer == found.report["adamerging"].by_layer for each in told)
    (row,) = found.report.rows
    assert (row.name, row.loss, row.held_out_loss, row.held_out_hits) == ("adamerging", None, None, None)
    assert found.report.chosen == "adamerging"
    assert "adamerging" in str(found.report.table())
    found.save_pretrained(tmp_path / "kept")
    assert lw.Composition.from_pretrained(tmp_path / "kept", tiny_llama, tokenizer).report.rows == found.report.rows


def test_what_needs_examples_says_so(compose_on):
    task = lw.Task([], instruction="swap")
    for options in ({"method": "lorahub"}, {"method": "adamerging"}, {"method": "auto"}, {"method": "best_single"}):
        with pytest.raises(InvalidTask, match=r"no examples; give at least two .* or inputs="):
            compose_on(task=task, **options)
    with pytest.raises(WeightingError, match="start 'best_three' is found on examples"):
        compose_on(task=task, method="gradient", objective="entropy", inputs=["a"])


def test_one_adapter_alone_is_not_searched_but_its_strength_is(compose, pool):
    one = pool.subset(["a"])
    with pytest.raises(WeightingError, match="'lorahub' weighs adapters against each other, but there is only 'a'"):
        compose(one, method="lorahub")
    found = compose(one, method="grid", folds=0).report["grid"].weights
    assert set(found) <= {"a"}
    assert [row.name for row in compose(one).report.rows] == ["base", "best_single", "uniform"]


@pytest.mark.parametrize(
    ("options", "num_folds"),
    [({"method": "lorahub", "budget": 11}, 3), ({"method": "random", "budget": 5, "folds": 0}, 0), ({"budget": 32}, 2)],
)
def test_the_bar_ends_at_its_total(compose, options, num_folds, pool, monkeypatch):
    completed, totals = shown_by_the_bar(monkeypatch)
    compose(progress=True, **options)
    each = 16 if options.get("method") is None else options["budget"]
    assert completed[-1] == totals[-1] == len(pool) + (num_folds + 1) * each


@pytest.mark.parametrize("options", [{"budget": None, "seconds": 0.4}, {"budget": 150}, {"budget": 10}], ids=str)
def test_the_bar_never_runs_past_its_total_and_ends_there(compose, options, pool, monkeypatch):
    completed, totals = shown_by_the_bar(monkeypatch)
    compose(progress=True, **options)
    assert completed[-1] == totals[-1] > len(pool)
    assert all(total is None or done <= total for done, total in zip(completed, totals, strict=True))


def shown_by_the_bar(monkeypatch):
    """What is completed and the total, after every update of a bar."""
    completed, totals = [], []
    update = Progress.update

    def spy(bar, task, **changes):
        update(bar, task, **changes)
        completed.append(bar.tasks[task].completed)
        totals.append(bar.tasks[task].total)

    monkeypatch.setattr(Progress, "update", spy)
    return completed, totals
