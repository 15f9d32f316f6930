"""The same batches in peft and in polylora: what each can do of mixtures by row, and how it is asked for it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from _adapters import ALL, ATTENTION, in_peft, mix_in_peft, one_by_one_in_peft
from peft.tuners.lora import LoraLayer

from loraweave.hub.adapter import Adapter

Mixture = Mapping[str, float]


class Peft:
    """One PeftModel with all the adapters, and with every row's mixture merged to an adapter if there are mixtures."""

    def __init__(self, model: Any, experts: Sequence[Adapter], rows: Sequence[Mixture]) -> None:
        self.model = in_peft(model, experts)
        self.names = [next(iter(row)) for row in rows]
        self.rows = rows
        if any(len(row) > 1 for row in rows):
            self.names = []
            for number, row in enumerate(rows):
                self.names.append(f"merged{number}")
                self.model.add_weighted_adapter(list(row), list(row.values()), self.names[-1], combination_type="cat")

    def off(self) -> None:
        self.model.base_model.disable_adapter_layers()

    def each_alone(self) -> None:
        self.model.base_model.enable_adapter_layers()
        one_by_one_in_peft(self.model)

    def together(self) -> None:
        self.model.base_model.enable_adapter_layers()
        mix_in_peft(self.model, self.rows[0])

    def by_row(self, **inputs: Any) -> Any:
        return self.model(adapter_names=self.names, **inputs)

    def merged_by_row(self, **inputs: Any) -> Any:
        """Each row after the other: its adapter merged into the weights, its forward pass, and the weights back."""
        found = []
        for number, name in enumerate(self.names):
            self.model.base_model.set_adapter(name)
            self.model.merge_adapter()
            found.append(
                self.model(**{k: v[number : number + 1] if k == "input_ids" else v for k, v in inputs.items()}).logits
            )
            self.model.unmerge_adapter()
        return torch.cat(found)

    def to(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)

    def num_layers(self) -> int:
        return sum(isinstance(module, LoraLayer) for module in self.model.modules())


def polylora(model: Any, experts: Sequence[Adapter], targets: str, rank: int) -> Any | None:
    """A PolyLoraModel around a copy of the model; None where the package is not installed (`pip install polylora`)."""
    try:
        import polylora as package
    except ImportError:
        return None
    names = list(ALL if targets == "all" else ATTENTION)
    config = package.PolyLoraConfig(max_gpu_adapters=len(experts) + 1, max_rank=rank, target_modules=names)
    wrapped = package.PolyLoraModel(copy.deepcopy(model), config).eval()
    with tempfile.TemporaryDirectory() as folder:
        for adapter in experts:
            path = adapter.save_pretrained(Path(folder) / adapter.name)
            wrapped.load_adapter_from_disk(adapter.name, path)
    return wrapped


VERSIONS = f"peft {peft.__version__}, torch {torch.__version__}"
