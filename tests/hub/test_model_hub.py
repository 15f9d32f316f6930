"""Base models and adapters by their id, from a stand-in for the model hub on loopback, and once it is gone."""

from __future__ import annotations

import shutil

import model_hub_server as model_hub
import pytest
import torch
from tiny_models import write_tiny_base

from loraweave.hub.adapter import Adapter
from loraweave.hub.base import fingerprint
from loraweave.types import Factors


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the calls gave with the server there, and then in a new process without it, in the same cache."""
    root, home = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("home")
    model = write_tiny_base(root / "tiny" / "llama")
    lora = Adapter(
        "the card's name", "tiny/llama", {"model.layers.0.self_attn.q_proj": Factors(torch.ones(2, 16), torch.ones(16, 2))}
    )
    for name in ("lora", "private", "other"):
        lora.save_pretrained(root / "tiny" / name)
    (root / "tiny" / "lora" / "training_args.bin").write_bytes(b"not wanted")
    pickled = root / "tiny" / "pickled"
    shutil.copytree(root / "tiny" / "llama", pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with model_hub.serving(root) as (address, requests, _):
        online = model_hub.loaded_from(address, home, "online")
    return {
        "online": online,
        # offline, since huggingface_hub else tries for half a minute before it looks into its cache
        "gone": model_hub.loaded_from(address, home, "gone", HF_HUB_OFFLINE="1"),
        "requests": requests,
        "model": model,
        "lora": lora,
        "token": model_hub.TOKEN,
    }


def test_a_base_model_is_loaded_by_its_id_with_its_tokenizer(found):
    base = found["online"]["base"]
    assert base["name"] == "tiny/llama"
    assert base["samples"] == list(fingerprint(found["model"]).samples)
    assert base["tokens"] == [3, 0]


def test_a_base_has_the_commit_that_it_was_loaded_from(found):
    assert found["online"]["base at a revision"] == found["online"]["base"]
    assert found["online"]["base"]["commit"] == model_hub.COMMIT


def test_a_loaded_base_is_in_evaluation_mode_and_can_pad(found):
    assert (found["online"]["base"]["training"], found["online"]["base"]["pads"]) == (False, True)


def test_an_adapter_is_loaded_by_its_id(found):
    expected = {"name": "the card's name", "hash": found["lora"].hash, "base_model": "tiny/llama"}
    assert found["online"]["adapter"] == expected


def test_only_an_adapters_own_files_are_downloaded(found):
    assert any("/tiny/lora/resolve/" in path and path.endswith("adapter_model.safetensors") for path in found["requests"])
    assert [path for path in found["requests"] if path.endswith("training_args.bin")] == []


def test_what_was_downloaded_is_found_again_without_asking(found):
    assert found["online"]["cached adapter"] == found["online"]["adapter"]


def test_a_commit_is_a_revision(found):
    assert found["online"]["revision"] == found["online"]["adapter"]


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("unknown base", "BaseModelMismatch", ["tiny/nothing", "local folder"]),
        ("base at no revision", "BaseModelMismatch", ["tiny/llama", "v9"]),
        ("pickled base", "BaseModelMismatch", ["tiny/pickled", "safetensors"]),
        ("unknown adapter", "AdapterNotFound", ["tiny/nothing", "local folder"]),
        ("unknown revision", "AdapterNotFound", ["tiny/lora", "'v9'"]),
        ("not cached", "AdapterNotFound", ["tiny/other", "local folder"]),
        ("without token", "AdapterNotFound", ["tiny/private"]),
    ],
)
def test_what_the_hub_does_not_have_is_a_named_error_on_one_line(found, case, error, words):
    outcome = found["online"][case]
    assert outcome["error"] == error
    assert "\n" not in outcome["message"]
    assert [word for word in words if word not in outcome["message"]] == []


def test_a_private_repository_opens_with_the_token(found):
    assert found["online"]["with token"]["hash"] == found["lora"].hash


def test_the_token_is_printed_nowhere(found):
    assert found["token"] not in found["online"]["printed"]


@pytest.mark.parametrize("case", ["base", "adapter", "cached adapter", "revision"])
def test_with_the_hub_gone_what_was_loaded_once_loads_again(found, case):
    assert found["gone"][case] == found["online"][case]


def test_what_was_downloaded_with_a_token_needs_none_to_load_again(found):
    assert found["gone"]["private adapter"]["hash"] == found["lora"].hash


@pytest.mark.parametrize(("case", "error"), [("new base", "BaseModelMismatch"), ("new adapter", "AdapterNotFound")])
def test_with_the_hub_gone_what_was_never_loaded_is_a_named_error(found, case, error):
    outcome = found["gone"][case]
    assert (outcome["error"], "tiny/late" in outcome["message"]) == (error, True)
