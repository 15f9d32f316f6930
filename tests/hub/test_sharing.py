"""What is pushed to a stand-in for the model hub comes back the same."""

from __future__ import annotations

import model_hub_server as model_hub
import pytest
import torch
from tiny_models import write_tiny_base

from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

COMMIT = model_hub.COMMIT


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root, home = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("home")
    write_tiny_base(root / "tiny" / "llama")
    torch.manual_seed(0)
    layer, about = "model.layers.0.self_attn.q_proj", {"license": "mit", "description": "says it"}
    lora = Adapter("lora", "tiny/llama", {layer: Factors(torch.randn(2, 16), torch.randn(16, 2))}, None, about)
    lora.save_pretrained(root / "tiny" / "lora")
    with model_hub.serving(root) as (address, _, _):
        done = model_hub.loaded_from(address, home, "shared", root, cwd=home)
    return {**done, "root": root}


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
    assert "lw.Composition.from_pretrained('mine/weighed')" in weighed
    assert "lw.experts('mine/experts', model" in card("experts")


@pytest.mark.parametrize(
    ("case", "error", "word"),
    [
        ("no right", "HubReadOnly", "theirs/weighed"),
        ("no composition", "AdapterNotFound", "composition.json"),
        ("no experts", "AdapterNotFound", "experts.json"),
    ],
)
def test_what_does_not_work_is_a_named_error(found, case, error, word):
    assert found[case]["error"] == error, found[case]
    assert word in found[case]["message"]
