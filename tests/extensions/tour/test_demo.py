"""The parts of the demo that need no model; the tour itself is run in tests/end_to_end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from loraweave.errors import AdapterNotFound, InvalidTask
from loraweave.extensions.tour import demonstration as demo

DATA = Path(__file__).resolve().parents[3] / "examples" / "data"


def rows(name):
    return [json.loads(line) for line in (DATA / "unseen" / f"{name}.jsonl").read_text().splitlines()]


def test_a_task_has_five_training_rows_drawn_by_the_seed_and_test_rows_in_their_order():
    first, same, other = (demo.load_task(DATA, "pick_color_5", seed, 7) for seed in (0, 0, 1))
    train = {(row["input"], row["target"]) for row in rows("pick_color_5") if row["split"] == "train"}
    test = [row["input"] for row in rows("pick_color_5") if row["split"] == "test"]
    assert first.task.examples == same.task.examples != other.task.examples
    assert len(set(first.task.examples)) == 5
    assert set(first.task.examples) <= train
    assert [text for text, _ in first.test] == test[:7]


def test_other_accepted_targets_count_in_the_test():
    accepted = {row["input"]: {row["target"], *row.get("also_ok", [])} for row in rows("rhyme")}
    assert all(set(targets) == accepted[text] for text, targets in demo.load_task(DATA, "rhyme", 0, 50).test)


def test_labels_come_from_the_manifest():
    assert demo.load_task(DATA, "bbh_hyperbaton", 0, 1).task.labels == ("(A)", "(B)")


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(InvalidTask, match=r"'negated'.*negated_passive"):
        demo.load_task(DATA, "negated", 0, 1)


def test_a_task_whose_data_are_not_shipped_is_not_offered():
    with pytest.raises(InvalidTask, match="no task 'sentiment_product'"):
        demo.load_task(DATA, "sentiment_product", 0, 1)


def test_without_the_repository_the_demo_says_what_to_give(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "loraweave" / "extensions" / "tour" / "demonstration.py"))
    with pytest.raises(AdapterNotFound, match="--pool"):
        demo.run(pool=None, data=DATA, task="rhyme", k=3, budget=3, seed=0, num_test=1, as_json=False)


@pytest.mark.parametrize("way", ["option", "environment"])
def test_another_base_needs_a_pool_of_its_own(monkeypatch, way):
    monkeypatch.setattr(demo.lw, "load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    if way == "environment":
        monkeypatch.setenv("LORAWEAVE_BASE", "org/other")
    base = "org/other" if way == "option" else None
    with pytest.raises(AdapterNotFound, match="no adapters of 'org/other' come with the repository: give --pool"):
        demo.run(pool=None, base=base, data=DATA, task="rhyme", k=3, budget=3, seed=0, num_test=1, as_json=False)


def test_a_mixture_answers_before_anything_is_searched_or_learned(monkeypatch):
    done = []

    class Stop(Exception):
        pass

    def stop(*_, **__):
        done.append("search")
        raise Stop

    monkeypatch.setattr(demo.lw, "load_base", lambda *_, **__: (SimpleNamespace(name_or_path="base"), None))
    monkeypatch.setattr(demo, "_print_blend", lambda *_: done.append("mixture"))
    monkeypatch.setattr(demo, "predict", lambda *_: done.append("base") or [""] * demo.NUM_SHOWN)
    monkeypatch.setattr(demo.lw, "Hub", stop)
    with pytest.raises(Stop):
        demo.run(pool=None, data=DATA, task="rhyme", k=3, budget=3, seed=0, num_test=4, as_json=True)
    assert done == ["mixture", "base", "search"]


def test_a_pool_without_the_two_skills_shows_no_mixture(tmp_path, capsys):
    (tmp_path / "passive").mkdir()
    demo._print_blend(tmp_path, None, None, Console())
    assert capsys.readouterr().out == ""
