from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import loraweave as lw
from loraweave.cli import app
from loraweave.types import Factors


def call(*words):
    return CliRunner().invoke(app, ["hub", *[str(word) for word in words]])


def adapter(seed):
    generator = torch.Generator().manual_seed(seed)
    layers = {"q": Factors(torch.randn(2, 9, generator=generator), torch.randn(8, 2, generator=generator))}
    return lw.Adapter(f"a{seed}", "org/base", layers)


@pytest.fixture
def hub(here):
    with lw.Hub("adapters") as opened:
        opened.add(adapter(0))
        opened.add(adapter(1))
    adapter(0).save_pretrained("again")
    return here


def test_what_looks_wrong_is_told_and_put_aside_when_asked(hub):
    done = call("add", "again", "--name", "again", "--anomalies", "quarantine")
    assert done.exit_code == 0, done.stderr
    assert "duplicate: it has the content of 'a0'" in done.stderr
    assert "in quarantine" in done.stderr
    assert [row["name"] for row in json.loads(call("list", "--json").stdout)] == ["a0", "a1"]
    assert [row["name"] for row in json.loads(call("quarantine", "--json").stdout)] == ["again"]
    assert "it has the content of 'a0'" in call("quarantine").stdout


def test_what_looks_wrong_is_refused_when_asked(hub):
    done = call("add", "again", "--name", "again", "--anomalies", "refuse")
    assert (done.exit_code, done.stderr.startswith("AdapterSuspicious: ")) == (1, True)


def test_show_has_what_was_found(hub):
    call("add", "again", "--name", "again")
    told = json.loads(call("show", "again", "--json").stdout)
    assert [anomaly["kind"] for anomaly in told["anomalies"]] == ["duplicate"]
    assert told["quarantined"] is False
    assert "it has the content of" in call("show", "again").stdout


def test_putting_aside_and_taking_back(hub):
    assert "in quarantine" in call("quarantine", "a0").stderr
    assert [row["name"] for row in json.loads(call("list", "--json").stdout)] == ["a1"]
    assert "released" in call("release", "a0").stderr
    assert [row["name"] for row in json.loads(call("list", "--json").stdout)] == ["a0", "a1"]


def test_a_misspelt_name_changes_nothing(hub):
    done = call("quarantine", "a0", "nothing")
    assert (done.exit_code, "AdapterNotFound" in done.stderr) == (1, True)
    with lw.Hub("adapters") as opened:
        assert len(opened) == 2
