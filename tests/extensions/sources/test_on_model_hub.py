"""What the model hub has for a base is found, from a stand-in for it, filtered, and added at its commit."""

from __future__ import annotations

import json

import model_hub_server as model_hub
import pytest
import torch
from tiny_models import write_tiny_base

from loraweave.errors import SourceUnavailable, WeightingError
from loraweave.extensions.sources import discover
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

COMMIT = model_hub.COMMIT


def listed(name, *, likes=0, downloads=0, license="mit", files=("adapter_model.safetensors",), commit=COMMIT):
    tags = ["base_model:adapter:tiny/llama", f"license:{license}"]
    siblings = [{"rfilename": file} for file in ("README.md", *files)]
    return {"id": name, "sha": commit, "likes": likes, "downloads": downloads, "tags": tags, "siblings": siblings}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root, home = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("home")
    write_tiny_base(root / "tiny" / "llama")
    torch.manual_seed(0)
    layer, about = "model.layers.0.self_attn.q_proj", {"license": "mit", "description": "says it"}
    lora = Adapter("lora", "tiny/llama", {layer: Factors(torch.randn(2, 16), torch.randn(16, 2))}, None, about)
    second = Adapter("second", "tiny/llama", {layer: Factors(torch.randn(3, 16), torch.randn(16, 3))}, None, about)
    lora.save_pretrained(root / "tiny" / "lora")
    second.save_pretrained(root / "tiny" / "second")
    rows = [
        listed("tiny/lora", likes=9, downloads=100, license="apache-2.0"),
        listed("tiny/pickled", likes=90, files=("adapter_model.bin",)),
        listed("../../etc", likes=90),
        listed("tiny/lora", likes=90, commit="main"),
        listed("tiny/second", likes=2, downloads=7),
    ]
    (root / "listed.json").write_text(json.dumps(rows))
    with model_hub.serving(root) as (address, _, _):
        done = model_hub.loaded_from(address, home, "listed", root, cwd=home)
    return {**done, "root": root, "second": second}


def test_a_base_without_an_id_is_a_named_error(found):
    assert found["folder"]["error"] == "AdapterNotFound"
    assert "not the id of a base model" in found["folder"]["message"]


@pytest.mark.parametrize(
    ("case", "names"),
    [
        # neither pickles, nor ids and commits of another form
        ("all", ["tiny/lora", "tiny/second"]),
        ("one", ["tiny/lora"]),
        ("named", ["tiny/second"]),
        ("mit", ["tiny/second"]),
        ("liked", ["tiny/lora"]),
        ("loaded", ["tiny/lora"]),
        ("small", []),
    ],
)
def test_what_the_model_hub_has_for_a_base_is_filtered(found, case, names):
    assert found[case] == names


def test_what_was_found_is_added_at_its_commit_whatever_folder_has_its_name(found):
    name, digest, figures, location, revision = found["added"]
    size = (found["root"] / "tiny" / "second" / "adapter_model.safetensors").stat().st_size
    assert (name, digest) == ("second", found["second"].hash)
    assert figures == ["MIT", 2, 7, size, COMMIT]
    assert (location, revision) == ("tiny/second", COMMIT)


def test_a_list_in_offline_mode_is_a_named_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceUnavailable, match="cannot be listed in offline mode"):
        discover("tiny/llama")


@pytest.mark.parametrize("setting", ["limit", "max_bytes"])
def test_a_limit_below_one_is_refused(setting):
    with pytest.raises(WeightingError, match=f"{setting} is 0"):
        discover("tiny/llama", **{setting: 0})
