"""Routers that are put into a stand-in for the model hub, and read from there."""

from __future__ import annotations

import json

import model_hub_server as model_hub
import pytest
import tiny_hubs

from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._members import Members
from loraweave.routers.tokens._saved import router
from loraweave.routers.tokens._written import router_card


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root, home = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("home")
    adapters = [tiny_hubs.adapter(seed, name, base_model="tiny") for seed, name in enumerate("ab")]
    arrow = router("arrow", adapters)
    folder = arrow.save_pretrained(tmp_path_factory.mktemp("saved") / "arrow", pool=ExpertPool(adapters))
    adapters[0].save_pretrained(root / "tiny" / "lora")
    with model_hub.serving(root) as (address, _, _):
        done = model_hub.loaded_from(address, home, "routers", folder)
    return {
        **done,
        "root": root / "mine",
        "state": {name: value.tolist() for name, value in arrow.state_dict().items()},
        "token": model_hub.TOKEN,
        "commit": model_hub.COMMIT,
    }


def test_a_router_goes_to_the_model_hub_with_its_pool_and_comes_back(found):
    assert found["push"] == found["commit"]
    assert found["read"] == found["cached"] == {"state": found["state"], "pool": ["a", "b"]}


def test_a_repository_is_made_private_where_that_is_asked_for(found):
    arrow, alone = (json.loads((found["root"] / name / "made").read_text()) for name in ("arrow", "alone"))
    # how the client says it depends on its version
    assert arrow.get("visibility") == "private" or arrow.get("private") is True
    assert alone.get("visibility") != "private"
    assert not alone.get("private")


def test_the_message_of_the_commit_can_be_given(found):
    assert (found["root"] / "arrow" / "message").read_text() == "an arrow"
    assert (found["root"] / "alone" / "message").read_text() == "router arrow for 2 experts"


def test_a_router_without_its_pool_is_two_files(found):
    assert found["alone, read"] == {"state": found["state"], "pool": []}
    files = {path.name for path in (found["root"] / "alone").iterdir()}
    assert files == {"README.md", "made", "message", "router.json", "router.safetensors"}


def test_the_card_names_base_and_experts_and_no_folder_as_the_base(found):
    card = (found["root"] / "arrow" / "README.md").read_text()
    assert "base_model: tiny\n" in card
    assert "\n    a\n    b\n" in card
    assert "lw.router('mine/arrow')" in card
    local = tiny_hubs.adapter(0, "# x\n---", base_model="/home/me/base")
    text = router_card("arrow", Members.of(ExpertPool([local])), "mine/arrow", with_pool=False)
    assert "base_model" not in text
    assert text.endswith("\n    # x ---\n")


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("wrong token", "HubReadOnly", ["mine/arrow", "token="]),
        ("others'", "HubReadOnly", ["theirs/arrow", "the owner's name"]),
        ("no id", "AdapterNotFound", ["'a/b/c'", "owner/name"]),
        ("out of order", "SourceUnavailable", ["mine/full", "run it again"]),
        ("unknown", "AdapterNotFound", ["mine/nothing"]),
        ("no router", "AdapterNotFound", ["no router", "router.json"]),
    ],
)
def test_what_does_not_work_is_a_named_error_on_one_line(found, case, error, words):
    outcome = found[case]
    assert outcome["error"] == error, outcome
    assert "\n" not in outcome["message"]
    assert [word for word in words if word not in outcome["message"]] == []


def test_no_token_is_ever_printed(found):
    assert found["token"] not in found["printed"]
    assert "hf_wrongwrongwrong" not in found["printed"]
