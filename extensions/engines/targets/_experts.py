"""Fused experts for programs that have gate, up and down of all experts as one tensor each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loraweave import AdapterUnsupported, Factors
from loraweave.extend import Contents


def num_experts(config: Any) -> int:
    """Return the number of experts in each layer of this base, 0 if it has none."""
    return int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0)


def matrices(parameter: str) -> list[str]:
    """Return the names of the program's matrices for a parameter of experts, in the order of its rows."""
    place, _, last = parameter.rpartition(".")
    return [f"{place}.gate_proj", f"{place}.up_proj"] if last == "gate_up_proj" else [parameter]


def require_known(layer: str, config: Any, name: str) -> None:
    """Raise AdapterUnsupported for an expert that the base does not have."""
    parameter, _, number = layer.rpartition(".")
    if not number.isdigit() or int(number) >= num_experts(config):
        raise AdapterUnsupported(
            f"adapter {name!r} updates expert {number} of {parameter!r}, and the base model has {num_experts(config)} "
            "experts: was the adapter made for another base model?"
        )


def stacked(contents: Contents, config: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return {path of a matrix: (a_ERI, b_EOR)}, zeros for an expert without an update; gate and up share one a."""
    parameters: dict[str, dict[int, Factors]] = {}
    for layer, factors in contents.layers.items():
        if factors.kind == "expert":
            parameter, _, number = layer.rpartition(".")
            parameters.setdefault(parameter, {})[int(number)] = factors
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    for parameter, updates in parameters.items():
        first = next(iter(updates.values()))
        none = Factors(torch.zeros_like(first.a_RI), torch.zeros_like(first.b_OR))
        all_updates = [updates.get(number, none) for number in range(num_experts(config))]
        paths, a_ERI = matrices(parameter), torch.stack([part.a_RI for part in all_updates])
        parts = torch.stack([part.b_OR for part in all_updates]).chunk(len(paths), dim=1)
        tensors |= {path: (a_ERI, b_EOR) for path, b_EOR in zip(paths, parts, strict=True)}
    return tensors
