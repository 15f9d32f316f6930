"""Folders of folders: the one adapter inside is found, several are listed, and nothing else is looked at."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter

CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "a/base"}


def put(folder, value=1.0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    path = "base_model.model.model.layers.0.q_proj"
    held = {f"{path}.lora_A.weight": torch.full((1, 3), value), f"{path}.lora_B.weight": torch.ones(2, 1)}
    save_file(held, folder / "adapter_model.safetensors")


def value_of(source):
    return float(Adapter.from_pretrained(source).layers["model.layers.0.q_proj"].a_RI[0, 0])


@pytest.mark.parametrize("below", ["checkpoint-500", "final", "adapter", "runs/one/adapter"])
def test_the_one_adapter_below_a_folder_is_found_and_bears_the_folders_name(tmp_path, below):
    put(tmp_path / "run" / below, 3.0)
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    assert value_of(tmp_path / "run") == 3.0
    assert Adapter.from_pretrained(tmp_path / "run").name == "run"


def test_an_adapter_above_its_checkpoints_is_the_one_that_is_meant(tmp_path):
    put(tmp_path, 1.0)
    put(tmp_path / "checkpoint-500", 2.0)
    assert value_of(tmp_path) == 1.0


def test_the_weights_of_an_adapter_alone_are_refused_with_its_folder(tmp_path):
    put(tmp_path / "adapter")
    with pytest.raises(AdapterUnsupported, match=r"the weights alone .* give .*/adapter$"):
        Adapter.from_pretrained(tmp_path / "adapter" / "adapter_model.safetensors")


def test_several_adapters_are_refused_and_listed_with_the_way_out(tmp_path):
    for step in (500, 1000):
        put(tmp_path / f"checkpoint-{step}")
    with pytest.raises(AdapterUnsupported, match=r"2 folders.*checkpoint-1000, checkpoint-500; give the path of one"):
        Adapter.from_pretrained(tmp_path)


def test_hidden_folders_links_and_what_lies_too_deep_are_not_entered(tmp_path):
    put(tmp_path / "elsewhere", 1.0)
    run = tmp_path / "run"
    put(run / ".cache", 1.0)
    put(run / "a" / "b" / "c" / "d", 1.0)
    (run / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterCorrupt, match=r"run: no adapter_config\.json"):
        Adapter.from_pretrained(run)


def test_a_folder_of_very_many_files_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("loraweave.hub.formats._reading.MAX_ENTRIES", 3)
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("")
    with pytest.raises(AdapterUnsupported, match=r"more than 3 files; give the adapter's own folder"):
        Adapter.from_pretrained(tmp_path)


def test_a_training_checkpoint_is_read_without_its_optimizer(tmp_path):
    put(tmp_path, 2.0)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "global_step500"):
        # whatever opens one of these hangs: nobody writes to it
        (tmp_path / name).mkdir() if name.startswith("global") else os.mkfifo(tmp_path / name)
    assert value_of(tmp_path) == 2.0


def test_the_output_folder_of_llama_factory_is_the_adapter_at_its_top(tmp_path):
    put(tmp_path, 2.0)
    for step in (100, 200):
        put(tmp_path / f"checkpoint-{step}", 1.0)
    for name in (
        "all_results.json",
        "train_results.json",
        "trainer_state.json",
        "tokenizer.json",
        "special_tokens_map.json",
    ):
        (tmp_path / name).write_text("{}")
    (tmp_path / "trainer_log.jsonl").write_text('{"loss": 1.0}\n')
    (tmp_path / "llamaboard_config.yaml").write_text("top.booster: none\n")
    (tmp_path / "training_args.bin").write_bytes(b"no pickle")
    (tmp_path / "README.md").write_text(
        "---\nlibrary_name: peft\nlicense: other\nbase_model: a/base\ntags:\n- llama-factory\n- lora\n---\n"
    )
    assert value_of(tmp_path) == 2.0
    assert "llama-factory" in Adapter.from_pretrained(tmp_path).card["tags"]
