"""A study on a tiny model: what its cells answer, what runs again and what does not, and what it writes."""

from __future__ import annotations

import csv
import json
import os
import re
from dataclasses import replace
from datetime import date
from importlib.metadata import version

import joblib
import pytest
import torch

import loraweave as lw
from loraweave.composer.model import scoring
from loraweave.errors import BaseModelMismatch, FormulaError, InvalidTask, UnknownName, WeightingError
from loraweave.extensions.study import report, running, study


def answers_of(results, method):
    """Of the first seed."""
    return next(list(found.answers) for cell, found in results.answers.items() if cell.method.name == method)


def asked(results, tiny_llama, tokenizer, adapter):
    """What the model with an adapter answers to the study's test rows, and its losses."""
    (task,), pairs = results.study.tasks, list(results.study.tasks[0].test)
    with lw.Composer(tiny_llama, [adapter]).activate({adapter.name: 1.0}):
        most = scoring.longest_answer(tokenizer, pairs)
        said = scoring.predict(tiny_llama, tokenizer, task.drawn(2, 0), [text for text, _ in pairs], max_new_tokens=most)
        return said, scoring.losses(tiny_llama, tokenizer, task.drawn(2, 0), pairs)


@pytest.fixture
def pool(folder):
    return [lw.Adapter.from_pretrained(folder / "pool" / name) for name in "ab"]


def test_merges_formulas_and_the_oracle_answer_as_the_adapter_that_they_say(run, said, pool, tiny_llama, tokenizer):
    ties = {"name": "ties", "method": "ties_weighted", "adapters": ["a", "b"], "weights": 1, "density": 0.5}
    results = run(methods=["base", ties, "0.5*a + b", "oracle"], tasks={"file": said["tasks"], "oracle": "b"})
    assert results.failures == {}
    expected = {
        "ties": lw.merge(pool, [1.0, 1.0], method="ties_weighted", density=0.5),
        "0.5*a + b": lw.merge(pool, [0.5, 1.0]),
        "oracle": pool[1],
    }
    for name, adapter in expected.items():
        found = next(each for cell, each in results.answers.items() if cell.method.name == name)
        answers, losses = asked(results, tiny_llama, tokenizer, adapter)
        assert list(found.answers) == answers
        assert found.losses == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("name", ["phatgoose", "xlora"])
def test_a_router_learns_on_the_rows_of_the_pool_from_the_start_of_the_seed(run, folder, pool, tiny_llama, tokenizer, name):
    rows = {expert: [(f"{expert}{word}", word[::-1]) for word in ("ab", "cd", "ef")] for expert in "ab"}
    for expert, pairs in rows.items():
        lines = [{"input": text, "target": target, "split": "train"} for text, target in pairs]
        lines.append({"input": "x", "target": "y", "split": "test"})
        (folder / f"{expert}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    method = {"method": name, "adapters": ["a", "b"], "fit": "pool", "steps": 2}
    results = run(methods=[method], pool_data=str(folder), seeds=[5])
    assert results.failures == {}
    engine = lw.Composer(tiny_llama, pool, tokenizer=tokenizer)
    torch.manual_seed(5)
    router = lw.router(name, engine.bound_pool)
    router.fit(engine, {expert: lw.Task(pairs) for expert, pairs in rows.items()}, steps=2, seed=5, progress=False)
    (task,), (answers,) = results.study.tasks, results.answers.values()
    with engine.activate(router):
        expected = scoring.losses(tiny_llama, tokenizer, task.drawn(2, 5), list(task.test))
    assert answers.losses == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_what_is_done_is_not_done_again_and_a_changed_option_runs_its_own_cells_alone(run, monkeypatch):
    methods = [
        "base",
        {"name": "sum", "method": "task_arithmetic", "adapters": ["a", "b"]},
        {"name": "a little", "formula": "0.1*a"},
    ]
    first, made = run(methods=methods, seeds=[0, 1]), []
    monkeypatch.setattr(running, "made", lambda method, case: made.append(method.name) or original(method, case))
    assert len(list(first.folder.glob("cells/*.json"))) == 3
    again = run(methods=methods, seeds=[0, 1, 2], functions={"length": lambda answer, targets: len(answer)})
    assert made == []
    assert {figure.metric for figure in again.figures} == {"exact_match", "length"}
    run(methods=[methods[0], {**methods[1], "scale": 0.5}, methods[2]])
    assert made == ["sum"]


original = running.made


def test_examples_are_those_of_the_seed_and_fewer_are_the_first_of_more(run):
    (task,) = run().study.tasks
    assert task.drawn(4, 0).examples[:2] == task.drawn(2, 0).examples
    assert task.drawn(4, 0).examples != task.drawn(4, 1).examples
    assert not {text for text, _ in task.test} & {text for text, _ in task.train}


def test_an_interrupted_study_keeps_what_is_done_and_goes_on(run, monkeypatch):
    def interrupted(method, case):
        if method.name == "b":
            raise KeyboardInterrupt
        return original(method, case)

    with monkeypatch.context() as patch:
        patch.setattr(running, "made", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(methods=["a", "b"])
    made = []
    monkeypatch.setattr(running, "made", lambda method, case: made.append(method.name) or original(method, case))
    assert len(run(methods=["a", "b"]).answers) == 2
    assert made == ["b"]


def test_a_cell_that_fails_is_named_the_others_go_on_and_the_next_run_tries_it_again(run, monkeypatch):
    def failing(method, case):
        if method.name == "b":
            raise RuntimeError("no memory")
        return original(method, case)

    with monkeypatch.context() as patch:
        patch.setattr(running, "made", failing)
        results = run(methods=["a", "b", "base"])
    assert results.failures == {"swap, b, 2 examples, seed 0": "RuntimeError: no memory"}
    assert [row[1] == "-" for row in results.cells("exact_match", 2)[1]] == [False, True, False]
    assert run(methods=["a", "b", "base"]).failures == {}


@pytest.mark.usefixtures("warm_workers")
@pytest.mark.own_models
def test_cells_that_two_processes_answer_are_those_of_one(said, folder, tiny_llama, tokenizer):
    tiny_llama.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    fails = {"name": "fails", "method": "lora", "steps": 3, "lr": 1e38}
    methods = ["base", "in_context", "a", fails, {"method": "lora", "steps": 2}]
    metrics = {"length": lambda answer, targets: len(answer)}
    asked = {**said, "base": str(folder / "base"), "methods": methods, "seeds": [0, 1]}
    alone = study(asked, metrics=metrics, out=folder / "one", progress=False)
    with joblib.parallel_config(n_jobs=2):
        spread = study(asked, metrics=metrics, out=folder / "two", progress=False)
    answered = [{str(c): (a.answers, a.losses) for c, a in found.answers.items()} for found in (alone, spread)]
    assert answered[0] == answered[1]
    assert alone.failures == spread.failures
    assert [(cell, why.split(":")[0]) for cell, why in alone.failures.items()] == [
        (f"swap, fails, 2 examples, seed {seed}", "TrainingError") for seed in (0, 1)
    ]
    assert [figure.value for figure in alone.figures] == [figure.value for figure in spread.figures]


@pytest.mark.own_models
def test_answers_of_another_base_model_are_refused_whatever_it_is_called(run, tiny_llama):
    run()
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(0.5)
    with pytest.raises(BaseModelMismatch, match="answers of another base"):
        run(methods=["in_context"])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"taks": []}, InvalidTask, "no key 'taks', did you mean 'tasks'"),
        ({"methods": []}, InvalidTask, "has no methods"),
        ({"methods": ["lorhub"]}, UnknownName, "no method 'lorhub', did you mean 'lorahub'"),
        ({"methods": ["hilora"]}, UnknownName, "no method 'hilora': it was withdrawn, since .*make 'similarity'"),
        ({"methods": ["ties(a, c)"]}, FormulaError, "'c'"),
        ({"methods": [{"method": "ties", "densty": 0.3, "adapters": ["a"]}]}, WeightingError, "did you mean 'density'"),
        ({"methods": [{"method": "lorahub", "sigm": 0.3}]}, WeightingError, "did you mean 'sigma'"),
        ({"methods": ["base", "base"]}, InvalidTask, "two methods of the name 'base'"),
        ({"methods": [{"method": "lora", "seed": 3}]}, InvalidTask, "gives to all methods alike"),
        ({"methods": [{"method": "ensemble"}]}, InvalidTask, "takes 'members'"),
        ({"methods": [{"formula": "a + b", "k": 3}]}, InvalidTask, "has all options in itself"),
        ({"methods": [{"method": "ties", "fit": "pool"}]}, InvalidTask, "for routers of"),
        ({"methods": [{"method": "phatgoose", "fit": "pool", "step": 2}]}, WeightingError, "did you mean 'steps'"),
        ({"methods": [{"method": "xlora", "fit": "pool", "lr": 0}]}, WeightingError, "got lr=0"),
        ({"metrics": ["exact_mach"]}, InvalidTask, "did you mean 'exact_match'"),
        ({"metrics": ["os:system"]}, InvalidTask, "no metric 'os:system'"),
        ({"normalise": ["cases"]}, InvalidTask, "did you mean 'case'"),
        ({"reference": "bas"}, InvalidTask, "did you mean 'base'"),
        ({"shots": 0}, InvalidTask, "whole numbers of at least 1"),
        ({"shots": 30}, InvalidTask, "has 5 rows to draw 30 examples from"),
        ({"num_test": 8}, InvalidTask, "0 rows to draw examples from and 8 to answer"),
        ({"dtype": "float8"}, InvalidTask, "it is one of float32"),
        ({"hub": "h"}, InvalidTask, "a hub and a pool"),
        ({"tasks": [{"file": "a.jsonl", "label": ["a"]}]}, InvalidTask, "did you mean 'labels'"),
        ({"tasks": [{"instruction": "a"}]}, InvalidTask, "it takes a 'file' or a 'dataset'"),
        ({"allow_licenses": "yes"}, InvalidTask, "it is true or false"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_runs(run, monkeypatch, changed, error, message):
    monkeypatch.setattr(running, "made", None)
    with pytest.raises(error, match=message):
        run(**changed)


def test_labels_that_yaml_reads_as_true_are_refused_with_the_way_out(run, said):
    with pytest.raises(InvalidTask, match="in quotes where YAML reads yes"):
        run(tasks={"file": said["tasks"], "labels": [True, False]})


def test_all_files_say_the_same_and_names_are_only_ever_text(run):
    pytest.importorskip("matplotlib")
    name = "<b>50 % | a_b</b>"
    results = run(methods=["base", {"name": name, "formula": "a"}], seeds=[0, 1], shots=[1, 2])
    figures = list(csv.DictReader((results.folder / "table.csv").read_text().splitlines()))
    assert [float(row["value"]) for row in figures] == [figure.value for figure in results.figures]
    assert r"\textless" not in (tex := (results.folder / "table.tex").read_text())
    assert r"<b>50 \% | a\_b</b> & " in tex
    assert r"| <b>50 % \| a_b</b> |" in (results.folder / "table.md").read_text()
    page = (results.folder / "report.html").read_text()
    assert "<b>" not in page
    assert not re.search(r"""(src|href|@import|url\()\s*=?\s*["']?(?!#)http""", page.replace('xmlns:xlink="http', ""))
    lines = [json.loads(line) for line in (results.folder / "answers.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines if line["method"] == "base"][:3] == answers_of(results, "base")
    assert (results.folder / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (results.folder / "plot.svg").read_text()


def test_seconds_of_a_mean_are_those_of_the_tasks_that_have_its_metric(run, said):
    tasks = [said["tasks"], {"file": said["tasks"], "name": "other", "instruction": "turn", "metrics": ["f1"]}]
    method = {"name": "mine", "formula": "a"}
    first, *_ = run(methods=[method], tasks=tasks).folder.glob("cells/*.json")
    first.write_text(json.dumps({**json.loads(first.read_text()), "seconds": 9.0}))
    seconds = {(figure.metric, figure.task): figure.seconds for figure in run(methods=[method], tasks=tasks).figures}
    assert seconds["exact_match", "mean"] == seconds["exact_match", "swap"]
    assert seconds["f1", "mean"] == seconds["f1", "other"]


def test_the_page_says_when_its_answers_were_measured(run):
    results = run(methods=["base", {"name": "mine", "formula": "a"}])
    first, *others = results.folder.glob("cells/*.json")
    assert others
    first.write_text(json.dumps({**json.loads(first.read_text()), "measured": "2026-01-31"}))
    page = (run(methods=["base", {"name": "mine", "formula": "a"}]).folder / "report.html").read_text()
    assert f"; measured from 2026-01-31 to {date.today()}, written on {date.today()} with" in page
    # a file of an earlier version
    said = json.loads(first.read_text())
    first.write_text(json.dumps({key: said[key] for key in said if key != "measured"}))
    os.utime(first, (86400 * 365.5, 86400 * 365.5))
    page = (run(methods=["base", {"name": "mine", "formula": "a"}]).folder / "report.html").read_text()
    assert f"; measured from 1971-01-01 to {date.today()}, written on" in page


def test_the_page_says_what_was_compared_with_what_and_what_the_items_tell(run):
    results = run(methods=["base", {"name": "mine", "formula": "a"}])
    page = (results.folder / "report.html").read_text()
    assert "<h1>Study: out</h1>" in page
    assert f"3 test items of {results.study.tasks[0].name}; base model" in page
    versions = f"loraweave {version('loraweave')}, torch {version('torch')}"
    assert f"; measured on {date.today()}, written on {date.today()} with {versions}" in page
    assert "prefers-color-scheme: dark" in page
    told = ((0.1, 0.3, "mine above"), (-0.3, -0.1, "mine below"), (-0.1, 0.1, "mine not told apart from it"))
    for low, high, said in told:
        changed = [
            replace(figure, difference=(low + high) / 2, difference_low=low, difference_high=high)
            if figure.method == "mine"
            else figure
            for figure in results.figures
        ]
        assert f"against base: {said}." in report.page(replace(results, figures=tuple(changed)), "")


@pytest.mark.parametrize(("value", "first"), [(0.9, "mine"), (0.2, "base")])
def test_the_tables_of_the_page_have_the_best_method_first_and_bold(run, value, first):
    results = run(methods=["base", {"name": "mine", "formula": "a"}])
    figures = [replace(figure, value=value if figure.method == "mine" else 0.5) for figure in results.figures]
    page = report.page(replace(results, figures=tuple(figures)), "")
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    assert body.startswith(f"<tbody><tr><td><span>{first}</span></td><td><strong>{100 * max(value, 0.5):.1f} [")
    assert body.count("<strong>") == 1
