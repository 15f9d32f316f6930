"""Base models and adapters by their id, from a stand-in for the model hub on loopback, and once it is gone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from loraweave.hub.adapter import Adapter
from loraweave.hub.base import fingerprint
from loraweave.types import Factors

DRIVER = Path(__file__).with_name("model_hub.py")


def driver_module():
    spec = spec_from_file_location("model_hub", DRIVER)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_base(folder):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=5, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    )
    model.save_pretrained(folder)
    return model


def process(address, home, mode):
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    environment["HF_HUB_DISABLE_XET"] = "1"
    if mode == "gone":
        # without it huggingface_hub tries for half a minute before it looks into its cache
        environment["HF_HUB_OFFLINE"] = "1"
    run = subprocess.run([sys.executable, str(DRIVER), mode], env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return {**json.loads(run.stdout), "printed": run.stdout + run.stderr}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the calls gave with the server there, and then in a new process without it, in the same cache."""
    model_hub = driver_module()
    root, home = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("home")
    model = tiny_base(root / "tiny" / "llama")
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
        online = process(address, home, "online")
    return {
        "online": online,
        "gone": process(address, home, "gone"),
        "requests": requests,
        "model": model,
        "lora": lora,
        "token": model_hub.TOKEN,
    }


def test_a_base_model_is_loaded_by_its_id_with_its_tokenizer(found):
    base = found["online"]["base"]
    assert base["name"] == "tiny/llama"
    assert base["samples"] == list(fingerprint(found["model"]).samples)
    assert base["tokens"] == [3, 4]


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
