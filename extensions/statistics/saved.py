"""The statistics of an adapter's layers for methods that weigh by data, and the file in which they are saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraweave import AdapterCorrupt, AdapterNotFound, WeightingError
from loraweave.extend import algebra, storage_errors, whole_file
from loraweave.extend.training import save_tensors

FORMAT_VERSION = 1
_METADATA_KEY = "loraweave_statistics"
_PARTS = ("gram_II", "fisher_OI")


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """The gram_II = X^T X / n of one layer over n tokens, and fisher_OI, the mean squared gradient; None if not collected.

    `fisher_norm` is the Frobenius norm of the Fisher over all layers that were recorded with this one, where known. With
    `turned` the layer's factors have the sides as (I, O), and fisher_OI has too: PEFT's view of Llama 4's experts.
    """

    gram_II: Tensor | None
    fisher_OI: Tensor | None
    num_tokens: int
    fisher_norm: float | None = None
    turned: bool = False


@dataclass(frozen=True, eq=False)
class Statistics:
    """The statistics of an adapter's layers, and the hash of that adapter's content."""

    adapter_hash: str
    layers: Mapping[str, LayerStatistics]

    def require_of(self, name: str, content_hash: str) -> None:
        """Raise WeightingError unless these are the statistics of the adapter with that name and hash."""
        if self.adapter_hash != content_hash:
            raise WeightingError(
                f"the statistics given for {name!r} (hash {content_hash[:12]}) were collected with an adapter of hash "
                f"{self.adapter_hash[:12]}; give each adapter its own"
            )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, which appears whole or not at all, and return its path."""
        target = Path(path)
        entries: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        taken: set[int] = set()
        for number, (layer, seen) in enumerate(sorted(self.layers.items())):
            parts = {part: getattr(seen, part) for part in _PARTS if getattr(seen, part) is not None}
            norm = seen.fisher_norm
            entry = {"path": layer, "num_tokens": seen.num_tokens, "fisher_norm": norm, "parts": list(parts)}
            entries.append({**entry, "turned": True} if seen.turned else entry)
            # numbered, since a module path may hold any character
            for part, tensor in parts.items():
                plain = tensor.detach().cpu().float().contiguous()
                # safetensors refuses tensors that share memory; copies of all would double it
                place = plain.untyped_storage().data_ptr()
                tensors[f"{number}.{part}"] = plain.clone() if place in taken else plain
                taken.add(place)
        header = {"version": FORMAT_VERSION, "adapter_hash": self.adapter_hash, "layers": entries}
        with storage_errors(target, "saving statistics"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(target) as temporary:
                save_tensors(tensors, temporary, metadata={_METADATA_KEY: json.dumps(header, sort_keys=True)})
        return target

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read statistics that `save` wrote. Raises AdapterNotFound for no file, AdapterCorrupt for an invalid one."""
        source = Path(path)
        if not source.is_file():
            raise AdapterNotFound(f"no statistics file {source}; collect_statistics(...).save(path) writes one")
        try:
            with safe_open(source, framework="pt", device="cpu") as file:
                header = json.loads((file.metadata() or {})[_METADATA_KEY])
                if header["version"] != FORMAT_VERSION:
                    raise AdapterCorrupt(f"{source}: statistics of version {header['version']}, not {FORMAT_VERSION}")
                listed = {f"{number}.{part}" for number, entry in enumerate(header["layers"]) for part in entry["parts"]}
                if listed != set(file.keys()):
                    raise AdapterCorrupt(f"{source}: lists {len(listed)} tensors that are not the {len(file.keys())} it has")
                layers = {
                    # cloned: a mapped file that somebody truncates kills the process
                    entry["path"]: _layer({part: file.get_tensor(f"{n}.{part}").clone() for part in entry["parts"]}, entry)
                    for n, entry in enumerate(header["layers"])
                }
                return cls(str(header["adapter_hash"]), layers)
        except AdapterCorrupt:
            raise
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise AdapterCorrupt(
                f"{source}: cannot be read as statistics ({type(error).__name__}: {error}); collect them again"
            ) from error


def _layer(parts: Mapping[str, Tensor], entry: Mapping[str, Any]) -> LayerStatistics:
    """Return one layer's statistics from its tensors and its entry in the header. Raises ValueError for invalid values."""
    gram_II, fisher_OI = parts.get("gram_II"), parts.get("fisher_OI")
    where, num_tokens, norm = f"layer {entry['path']!r}", entry["num_tokens"], entry["fisher_norm"]
    for name, tensor in parts.items():
        if name not in _PARTS or tensor.dtype != torch.float32 or tensor.dim() != 2:
            raise ValueError(f"{where} has {name} as {tensor.dtype} of shape {tuple(tensor.shape)}")
        if not algebra.all_finite(tensor):
            raise ValueError(f"{where} has values in {name} that are NaN or infinite")
    if gram_II is not None and (gram_II.shape[0] != gram_II.shape[1] or bool((gram_II.diagonal() < 0).any())):
        raise ValueError(f"{where} has a gram_II of shape {tuple(gram_II.shape)} that is not a mean of x^T x")
    if fisher_OI is not None and bool((fisher_OI < 0).any()):
        raise ValueError(f"{where} has a fisher_OI below 0")
    if type(num_tokens) is not int or num_tokens < 0 or not (norm is None or (isinstance(norm, float) and norm >= 0.0)):
        raise ValueError(f"{where} has num_tokens {num_tokens!r} and fisher_norm {norm!r}")
    return LayerStatistics(gram_II, fisher_OI, num_tokens, norm, entry.get("turned") is True)
