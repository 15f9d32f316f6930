"""The files of a PEFT adapter folder, of any adapter type."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.formats._files import listing, opened, present
from loraweave.hub.formats._pickle import read_pickle
from loraweave.hub.formats._safetensors import read_tensors, shards

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLE = "adapter_model.bin"


def stored_tensors(folder: Path, *, allow_pickle: bool = False, integers: bool = False) -> Iterator[tuple[str, str, Tensor]]:
    """(key, dtype in the file, tensor in fp32) of every tensor of an adapter folder.

    A pickle is read only with `allow_pickle`, only where there are no safetensors, and by the safe loader.
    """
    if allow_pickle and present(folder, PICKLE) and not present(folder, WEIGHTS) and not present(folder, INDEX):
        return read_pickle(folder, PICKLE, integers=integers)
    return read_tensors(folder, weight_files(folder), integers=integers)


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
            f"{folder}: the weights are only in {PICKLE}, a pickle, which can run code when it is read; have it read by the "
            "safe loader: allow_pickle=True (--allow-pickle in the shell), or convert it: "
            f"safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), '{WEIGHTS}')"
        )
    raise AdapterCorrupt(f"{folder}: no {WEIGHTS}; the folder holds {listing(folder)}")
