"""Tensors of a safetensors file that another file of its folder has the hash of."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from loraweave.errors import AdapterCorrupt
from loraweave.hub.formats._files import opened
from loraweave.hub.formats._safetensors import tensor_names


def hashed_tensors(folder: Path, name: str, digest: str, *, said_by: str) -> dict[str, Tensor]:
    """The tensors of the file `name`, whose SHA-256 the file `said_by` has. Raises AdapterCorrupt where it is another."""
    # the header is looked over first
    tensor_names(folder, name)
    with opened(folder, name) as (file, size):
        raw = file.read(size)
    if (found := hashlib.sha256(raw).hexdigest()) != digest:
        raise AdapterCorrupt(
            f"{folder / name} has SHA-256 {found[:12]}, but {said_by} says {digest[:12]}: one of them is damaged or of "
            "another folder; copy or download the folder again"
        )
    try:
        tensors: dict[str, Tensor] = load(raw)
    except (SafetensorError, ValueError) as error:
        raise AdapterCorrupt(f"{folder / name} is no intact safetensors file: {error}") from error
    return tensors
