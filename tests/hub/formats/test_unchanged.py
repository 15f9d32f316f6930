"""A source folder that somebody writes to while it is read: named, and nothing of it taken."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from loraweave.errors import AdapterCorrupt
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats import peft
from loraweave.hub.hub import Hub

PATH = "base_model.model.model.layers.0.q_proj"


def weights(folder, value, name="adapter_model.safetensors"):
    held = {f"{PATH}.lora_A.weight": torch.full((1, 3), value), f"{PATH}.lora_B.weight": torch.ones(2, 1)}
    save_file(held, folder / name)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    weights(path, 1.0)
    return path


def replaced(folder):
    weights(folder, 2.0, "new.safetensors")
    os.replace(folder / "new.safetensors", folder / "adapter_model.safetensors")


def rewritten(folder):
    text = (folder / "adapter_config.json").read_text().replace('"lora_alpha": 1', '"lora_alpha": 2')
    (folder / "adapter_config.json").write_text(text)


def cut_off(folder):
    with open(folder / "adapter_model.safetensors", "r+b") as file:
        file.truncate(100)


def added(folder):
    (folder / "loraweave.json").write_text("{}")


def rewritten_at_the_same_time(folder):
    path = folder / "adapter_config.json"
    status = path.stat()
    path.write_text(path.read_text().replace('"lora_alpha": 1', '"lora_alpha": 2'))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [replaced, rewritten, rewritten_at_the_same_time, cut_off, added])
@pytest.mark.parametrize("moment", ["gather", "_layers_of"])
def test_a_change_between_config_and_the_end_is_named_and_nothing_is_stored(folder, tmp_path, monkeypatch, change, moment):
    own = getattr(peft, moment)

    def meanwhile(*arguments):
        change(folder)
        return own(*arguments)

    monkeypatch.setattr(peft, moment, meanwhile)
    with Hub(tmp_path / "hub") as hub:
        with pytest.raises(AdapterCorrupt, match=r"changed while it was read.*read the adapter again"):
            hub.add(folder)
        assert len(hub) == 0


def test_other_files_may_change_while_the_adapter_is_read(folder, monkeypatch):
    own = peft.gather

    def meanwhile(*arguments):
        (folder / "optimizer.pt").write_bytes(b"x")
        return own(*arguments)

    monkeypatch.setattr(peft, "gather", meanwhile)
    assert Adapter.from_pretrained(folder).rank == 1
