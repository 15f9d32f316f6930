"""Files of these formats on their ways into a hub: by a folder of them, by the shell and from the model hub."""

import json

import pytest
import torch
from command_line import call
from safetensors.torch import save_file

from loraweave.errors import AdapterUnsupported
from loraweave.extensions.sources import add_tree
from loraweave.hub import sources as model_hub
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub


def test_a_folder_of_lora_files_holds_one_adapter_in_each(tmp_path):
    root = tmp_path / "files"
    (root / "styles").mkdir(parents=True)
    for number, name in enumerate(("one", "two.v2")):
        parts = {"lora_down.weight": torch.full((2, 5), 1.0 + number), "lora_up.weight": torch.ones(3, 2)}
        tensors = {f"unet.down_blocks.0.attentions.0.proj_in.{part}": value for part, value in parts.items()}
        save_file(tensors, root / "styles" / f"{name}.safetensors")
    save_file({"model.embed.weight": torch.ones(2, 2)}, root / "model.safetensors")
    with Hub(tmp_path / "hub") as hub:
        report, again = add_tree(hub, root), add_tree(hub, root)
    assert {entry.path: (entry.state, entry.name) for entry in report.entries} == {
        "styles/one.safetensors": ("added", "styles/one"),
        "styles/two.v2.safetensors": ("added", "styles/two.v2"),
    }
    assert again.counts() == {"present": 2}


def test_the_shell_adds_a_lora_file_by_its_name(here):
    module = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{module}.lora_down.weight": torch.ones(1, 5), f"{module}.lora_up.weight": torch.ones(3, 1)}
    save_file(tensors, "style.safetensors")
    done = call("hub", "add", "style.safetensors", "--json")
    assert done.exit_code == 0, done.stderr
    assert [row["name"] for row in json.loads(done.stdout)] == ["style"]


def test_the_model_hub_is_asked_for_the_files_of_every_layout_and_on_consent_for_the_pickles(tmp_path, monkeypatch):
    calls = []

    def download(repository, **keywords):
        calls.append(set(keywords["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(model_hub, "snapshot_download", download)
    for consent in (False, True):
        with pytest.raises(AdapterUnsupported, match="has no weights"):
            Adapter.from_pretrained("owner/name", allow_pickle=consent)
    without, with_it = calls
    assert {"pytorch_lora_weights.safetensors", "adapters.safetensors", "compeft.*"} < without
    assert with_it - without == {"adapter_model.bin", "pytorch_lora_weights.bin", "model_weights.ckpt"}
