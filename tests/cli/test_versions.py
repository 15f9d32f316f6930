"""`loraweave hub add --replace`, `show` and `bind`."""

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


def test_show_tells_identity_provenance_license_and_versions(hub):
    call("hub", "add", "second", "--name", "antonym", "--replace")
    told = json.loads(call("hub", "show", "antonym", "--json").stdout)
    assert [entry["version"] for entry in told["versions"]] == [1, 2]
    assert (told["license"], told["source"]["location"], told["parents"]) == ("MIT", "second", [])
    shown = call("hub", "show", "antonym", "--all").stdout
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
    assert "16 sampled weights" in call("hub", "show", "antonym", "--all").stdout
    assert json.loads(call("hub", "bind", "antonym", "--json").stdout)[0]["name"] == "antonym"
