"""`loraweave hub add-tree`: its report, its table, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import call, cells

import loraweave as lw
from loraweave.types import Factors


@pytest.fixture
def tree(here):
    for seed, name in enumerate(("one", "below/two")):
        layers = {"q": Factors(torch.full((1, 3), seed + 1.0), torch.ones(2, 1))}
        lw.Adapter("x", "org/base", layers).save_pretrained(Path("tree", name))
    Path("tree", "broken").mkdir()
    Path("tree", "broken", "adapter_config.json").write_text("{")


def test_a_tree_is_added_with_a_report(tree):
    done = call("hub", "add-tree", "tree", "--tag", "bulk", "--report", "report.json", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["counts"] == {"added": 2, "refused": 1}
    assert json.loads(Path("report.json").read_text()) == told
    with lw.Hub("adapters") as opened:
        assert [(record.name, record.tags) for record in opened] == [("below/two", ("bulk",)), ("one", ("bulk",))]


def test_the_table_has_the_refused_with_the_reasons_and_all_where_it_is_asked_for(tree):
    first = call("hub", "add-tree", "tree")
    assert [cells(line)[0] for line in first.stdout.splitlines()] == ["path", "broken"]
    assert "AdapterCorrupt" in first.stdout
    assert "2 added, 1 refused" in first.stderr
    second = call("hub", "add-tree", "tree", "--all")
    assert [cells(line)[:2] for line in second.stdout.splitlines()[1:]] == [
        ["below/two", "present"],
        ["broken", "refused"],
        ["one", "present"],
    ]
    assert "2 present, 1 refused" in second.stderr


def test_a_dry_run_adds_nothing(tree):
    done = call("hub", "add-tree", "tree", "--dry-run", "--json")
    assert json.loads(done.stdout)["counts"] == {"found": 3}
    with lw.Hub("adapters") as opened:
        assert len(opened) == 0


def test_a_tree_without_adapters_is_an_error(here):
    Path("empty").mkdir()
    done = call("hub", "add-tree", "empty")
    assert (done.exit_code, "AdapterNotFound" in done.stderr) == (1, True)
