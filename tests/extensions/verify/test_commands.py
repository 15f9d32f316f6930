"""`loraweave verify`: its exit status, its JSON, and its one line where there is no server."""

from __future__ import annotations

import json

import pytest
from command_line import adapter, call
from server_clients import running
from transformers import AutoModelForCausalLM, AutoTokenizer

import loraweave as lw


@pytest.fixture
def url(here, base):
    """A server for which `right` is left, too; the hub `adapters` has both as they should be."""
    with lw.Hub("adapters") as hub, lw.Hub("served") as served:
        for opened, seeds in ((hub, (1, 2)), (served, (1, 1))):
            for seed, name in zip(seeds, ("left", "right"), strict=True):
                opened.add(adapter(name, seed, base_model=str(base)), examples=["abc", "the judge"])
        model = AutoModelForCausalLM.from_pretrained(base)
        with running(served, model, AutoTokenizer.from_pretrained(base)) as port:
            yield f"http://127.0.0.1:{port}"


def test_a_fault_is_status_1_and_json_for_scripts(url, base):
    sound = call("verify", url, "left", "--base", base, "--probes", "1")
    assert sound.exit_code == 0, sound.output
    assert "as asked" in sound.stdout
    done = call("verify", url, "--base", base, "--probes", "1", "--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert {each["asked"]: each["verdict"] for each in told["findings"]} == {
        "base": "as asked",
        "left": "as asked",
        "right": "got left",
    }


def test_no_server_is_an_error_of_one_line(here, url):
    done = call("verify", "http://127.0.0.1:9", "--hub", "adapters")
    assert done.exit_code == 1
    assert done.stderr.startswith("SourceUnavailable: ")
    assert len(done.stderr.splitlines()) == 1
