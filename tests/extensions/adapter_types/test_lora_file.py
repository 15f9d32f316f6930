"""Pickles of these formats: read on consent as the same tensors in safetensors are, and else refused unopened."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter

REAL = Path(__file__).parents[4] / "shared" / "data" / "real_adapters"
KOHYA = "lora_unet_mid_block_attentions_0_proj_in"
FILES = {
    "pytorch_lora_weights.bin": ("unet.mid_block.to_q.lora_A.weight", "unet.mid_block.to_q.lora_B.weight"),
    "style.ckpt": (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight"),
    "style.pt": (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight"),
}


def tensors(name):
    down, up = FILES[name]
    return {down: torch.arange(10.0).reshape(2, 5), up: torch.arange(14.0).reshape(7, 2)}


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_gives_on_consent_what_the_safetensors_give(tmp_path, name):
    save_file(tensors(name), tmp_path / "same.safetensors")
    wanted = Adapter.from_pretrained(tmp_path / "same.safetensors").hash
    folder = tmp_path / "pickled"
    folder.mkdir()
    torch.save(tensors(name), folder / name)
    assert Adapter.from_pretrained(folder / name, allow_pickle=True).hash == wanted
    with pytest.raises(AdapterUnsupported, match=r"is a pickle.*allow_pickle=True"):
        Adapter.from_pretrained(folder / name)


def test_a_folder_is_known_by_the_name_that_diffusers_gives_the_pickle(tmp_path):
    name = "pytorch_lora_weights.bin"
    (tmp_path / "run").mkdir()
    torch.save(tensors(name), tmp_path / "run" / name)
    for source in (tmp_path, tmp_path / "run"):
        assert Adapter.from_pretrained(source, allow_pickle=True).rank == 2
        with pytest.raises(AdapterUnsupported, match=r"is a pickle.*allow_pickle=True"):
            Adapter.from_pretrained(source)
    doubled = {key: 2 * tensor for key, tensor in tensors(name).items()}
    save_file(doubled, tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert float(Adapter.from_pretrained(tmp_path, allow_pickle=True).delta("unet.mid_block.to_q")[0, 1]) == 4 * 6.0


def test_a_pickle_that_names_a_class_and_a_damaged_one_are_refused(tmp_path):
    path = tmp_path / "style.ckpt"
    torch.save({**tensors("style.ckpt"), "epoch": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(AdapterUnsupported, match=r"wants torch\.nn\.modules\.linear\.Linear"):
        Adapter.from_pretrained(path, allow_pickle=True)
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(AdapterCorrupt, match="not an intact archive"):
        Adapter.from_pretrained(path, allow_pickle=True)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    with pytest.raises(AdapterCorrupt, match="git-LFS pointer"):
        Adapter.from_pretrained(path)


def test_a_pickle_of_another_layout_is_refused_with_its_names(tmp_path):
    torch.save({"what.is.this": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(AdapterUnsupported, match=r"no known layout.*'what\.is\.this'"):
        Adapter.from_pretrained(tmp_path / "a.pt", allow_pickle=True)


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real adapters is not beside the repository")
def test_a_real_file_of_old_peft_is_read(tmp_path):
    folder = Path(shutil.copytree(REAL / "bloom560m_alpaca", tmp_path / "bloom"))
    adapter = Adapter.from_pretrained(folder, allow_pickle=True)
    assert (len(adapter.layers), adapter.rank, adapter.base_model) == (24, 16, "bigscience/bloom-560m")
