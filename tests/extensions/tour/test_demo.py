"""The parts of the demo that need no model; the tour itself is run in tests/end_to_end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
