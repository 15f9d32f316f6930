"""An adapter: the low-rank updates of some layers of one base model, with a name and a card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from loraweave.errors import AdapterUnsupported
from loraweave.hub import algebra
from loraweave.hub.formats._contents import Contents
from loraweave.hub.formats.peft import Peft
from loraweave.hub.sources import local_folder
from loraweave.types import Factors, Fingerprint


@dataclass(frozen=True, eq=False)
class Adapter:
    """A stored LoRA. `layers` maps module paths, as in the base model's `named_modules()`, to their factors.

    `card` is JSON: description, examples, tags, license, recipe, scores. Two adapters with equal `hash` have equal factors.
    """

    name: str
    base_model: str
    layers: Mapping[str, Factors]
    fingerprint: Fingerprint | None = None
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise AdapterUnsupported(f"adapter {self.name!r} has no layers")
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        object.__setattr__(self, "card", MappingProxyType(dict(self.card)))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        name: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Adapter:
        """Reads a PEFT folder, or downloads one from the model hub when `source` is a repository id."""
        folder = local_folder(source, revision=revision, token=token, local_files_only=local_files_only)
        contents = Peft.read(folder)
        own_name = name or contents.card.get("name") or str(source).rstrip("/").rsplit("/", 1)[-1]
        return cls(own_name, contents.base_model, contents.layers, contents.fingerprint, contents.card)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
        """Writes a plain PEFT folder, which `peft.PeftModel.from_pretrained` reads; returns its path.

        A half-precision `dtype` halves the file and rounds the factors, so the adapter read back has another hash.
        """
        card = {**self.card, "name": self.name}
        return Peft.write(Contents(self.base_model, self.layers, self.fingerprint, card), Path(folder), dtype=dtype)

    @property
    def rank(self) -> int:
        """The largest rank of any layer."""
        return max(factors.rank for factors in self.layers.values())

    def delta(self, layer: str) -> Tensor:
        """The dense update (O, I) of one layer, fp32. KeyError for a layer that the adapter leaves alone."""
        return algebra.delta(self.layers[layer])

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the factors in a canonical order; names, cards and file layout do not enter."""
        digest = hashlib.sha256()
        for layer, factors in sorted(self.layers.items()):
            digest.update(repr((layer, factors.kind, factors.kernel)).encode())
            for part, tensor in factors.tensors().items():
                digest.update(repr((part, tuple(tensor.shape))).encode())
                digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, base_model={self.base_model!r}, rank={self.rank}, layers={len(self.layers)})"
