"""The files of a PEFT adapter folder, of any adapter type."""

from __future__ import annotations

from pathlib import Path

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.formats._files import listing, opened, present
from loraweave.hub.formats._safetensors import shards

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLE = "adapter_model.bin"


def weight_files(folder: Path) -> list[str]:
    """The safetensors files of an adapter folder. Raises AdapterUnsupported for a pickle, AdapterCorrupt for none."""
    if present(folder, WEIGHTS):
        return [WEIGHTS]
    if present(folder, INDEX):
        return shards(folder, INDEX)
    if present(folder, PICKLE):
        # opened for the checks alone: a git-LFS pointer of that name needs another way out
        with opened(folder, PICKLE):
            pass
        raise AdapterUnsupported(
            f"{folder}: the weights are only in {PICKLE}, a pickle, which can run code when it is read; if you trust it, "
            "convert it: safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
            f"'{WEIGHTS}')"
        )
    raise AdapterCorrupt(f"{folder}: no {WEIGHTS}; the folder holds {listing(folder)}")
