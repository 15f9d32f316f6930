"""`loraweave hub history`, `rollback`, `prune` and `bind`."""

import importlib
import json
from functools import partial
from types import SimpleNamespace

import command_line
import pytest
import torch
from command_line import call
from torch import nn

import loraweave as lw
from loraweave.hub.base import fingerprint

adapter = partial(command_line.adapter, layers=("0",), base_model="org/base")


@pytest.fixture
def hub(here):
    with lw.Hub("adapters") as opened:
        opened.add(adapter("antonym", 0), description="first", license="MIT")
        adapter("antonym", 1).save_pretrained("second")
        yield opened


def test_add_with_replace_makes_the_next_version_and_says_so(hub):
    refused = call("hub", "add", "second", "--name", "antonym")
    assert (refused.exit_code, refused.stderr.split(":")[0]) == (1, "AdapterExists")
    done = call("hub", "add", "second", "--name", "antonym", "--replace", "--language", "en", "--json")
    assert done.exit_code == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["version"], row["language"], row["source"]) == (2, ["en"], {"location": "second", "revision": None})
    assert "added 'antonym' as version 2" in done.stderr


def test_history_lists_the_versions_and_rollback_goes_back(hub):
    call("hub", "add", "second", "--name", "antonym", "--replace")
    done = call("hub", "rollback", "antonym", "1")
    assert (done.exit_code, done.stderr) == (0, "'antonym' is at version 3, with the content of version 1\n")
    told = json.loads(call("hub", "history", "antonym", "--json").stdout)
    assert [(row["version"], row["restored"]) for row in told] == [(1, None), (2, None), (3, 1)]
    assert [row["hash"] for row in told] == [adapter("", seed).hash for seed in (0, 1, 0)]
    shown = call("hub", "history", "antonym").stdout
    assert "back to 1" in shown
    assert adapter("", 1).hash[:12] in shown
    assert call("hub", "rollback", "antonym", "1", "--json").exit_code == 0


def test_prune_forgets_old_versions(hub):
    call("hub", "add", "second", "--name", "antonym", "--replace")
    assert call("hub", "prune", "antonym").stderr.startswith("1 versions of 'antonym' are forgotten")
    assert [record.version for record in hub.history("antonym")] == [2]
    assert json.loads(call("hub", "prune", "antonym", "--json").stdout) == {"forgotten": 0}
    assert call("hub", "prune", "antonym", "--keep", "0").exit_code == 2


def test_a_version_that_is_not_there_is_one_line(hub):
    done = call("hub", "rollback", "antonym", "7")
    assert (done.exit_code, done.stderr) == (1, "AdapterNotFound: adapter 'antonym' has no version 7; it has 1\n")


def test_show_tells_identity_provenance_license_and_versions(hub):
    call("hub", "add", "second", "--name", "antonym", "--replace")
    told = json.loads(call("hub", "show", "antonym", "--json").stdout)
    assert [entry["version"] for entry in told["versions"]] == [1, 2]
    assert (told["license"], told["source"]["location"], told["parents"]) == ("MIT", "second", [])
    shown = call("hub", "show", "antonym").stdout
    assert all(text in shown for text in (adapter("", 1).hash, "second", "MIT", '"version": 1'))


def test_bind_stores_the_key_of_the_base(hub, monkeypatch):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16))
    base.name_or_path = "org/base"
    asked = []
    monkeypatch.setattr(
        importlib.import_module("loraweave.cli.hub"),
        "load_model",
        lambda name: (asked.append(name) or base, SimpleNamespace()),
    )
    assert call("hub", "bind", "nobody").exit_code == 1
    assert asked == []
    done = call("hub", "bind", "antonym", "--base", "folder")
    assert (done.exit_code, done.stderr) == (0, "'antonym' fits 'org/base', whose fingerprint it has now\n")
    assert asked == ["folder"]
    assert hub.record("antonym").fingerprint == fingerprint(base)
    assert "16 sampled weights" in call("hub", "show", "antonym").stdout
    assert json.loads(call("hub", "bind", "antonym", "--json").stdout)[0]["name"] == "antonym"
