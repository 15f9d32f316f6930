"""What is pushed to a stand-in for the model hub comes back the same; what is there for a base is found, and added."""

from __future__ import annotations

import json

import model_hub_server as model_hub
import pytest
import torch
from tiny_models import write_tiny_base

import loraweave as lw
from loraweave.errors import SourceUnavailable, WeightingError
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
        done = model_hub.loaded_from(address, home, "shared", root, cwd=home)
    return {**done, "root": root, "second": second}


@pytest.mark.parametrize("kind", ["adapter", "export", "weighed", "routed", "experts"])
def test_a_push_returns_the_commit(found, kind):
    assert found[kind] == COMMIT


def test_an_adapter_and_its_export_come_back_with_their_hash(found):
    own, again = found["adapter, hashes"]
    assert own == again == found["export, hash"]


@pytest.mark.parametrize("kind", ["weighed", "routed", "experts"])
def test_what_comes_back_answers_the_same(found, kind):
    own, again = found[f"{kind}, answers"]
    assert torch.equal(torch.tensor(own), torch.tensor(again))


def test_the_cards_state_base_licence_parents_weights_scores_and_use(found):
    def card(name):
        return (found["root"] / "mine" / name / "README.md").read_text()

    assert "lw.Adapter.from_pretrained('mine/lora')" in card("lora")
    assert "license: mit" in card("lora")
    weighed = card("weighed")
    # the folder that the base was loaded from is no id
    assert "base_model:" not in weighed.split("---")[1]
    assert str(found["root"]) not in weighed
    assert "license: mit" in weighed
    assert '"name": "lora"' in weighed
    assert '"weight": 0.5' in weighed
    assert "## Scores" in weighed
    assert "lw.Composition.from_pretrained('mine/weighed', model, tokenizer)" in weighed
    assert "lw.experts('mine/experts', model" in card("experts")


@pytest.mark.parametrize(
    ("case", "error", "word"),
    [
        ("no right", "HubReadOnly", "theirs/weighed"),
        ("no composition", "AdapterNotFound", "composition.json"),
        ("no experts", "AdapterNotFound", "experts.json"),
        ("folder", "AdapterNotFound", "no id of a base model"),
    ],
)
def test_what_does_not_work_is_a_named_error(found, case, error, word):
    assert found[case]["error"] == error, found[case]
    assert word in found[case]["message"]


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


def test_a_list_in_offline_mode_is_a_named_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with lw.Hub(tmp_path / "hub") as hub, pytest.raises(SourceUnavailable, match="cannot be listed in offline mode"):
        hub.discover("tiny/llama")


@pytest.mark.parametrize("setting", ["limit", "max_bytes"])
def test_a_limit_below_one_is_refused(tmp_path, setting):
    with lw.Hub(tmp_path / "hub") as hub, pytest.raises(WeightingError, match=f"{setting} is 0"):
        hub.discover("tiny/llama", **{setting: 0})
