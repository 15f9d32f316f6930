"""What engines have been seen to do to an adapter, done to the files of its folder, so that a server that is right is wrong.

Each is written on PEFT's tensors and settings, apart from how `loraweave.extensions.verify` thinks of them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loraweave as lw
from loraweave.types import Factors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# what a sound adapter's alpha is, in ranks: an engine that ignores it is then seen
ALPHA = 3.0

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Beside:
    """What a fault may take in place of the adapter's own: another adapter, its older version, and a head's width."""

    other: Tensors
    older: Tensors
    head: int


@dataclass(frozen=True)
class Fault:
    """How a folder is changed, and what has to be said of it; {other} and {name} stand for adapters."""

    verdict: str
    change: Callable[[Tensors, dict[str, Any], Beside], Tensors]


def _alpha(factor: float) -> Callable[[Tensors, dict[str, Any], Beside], Tensors]:
    def change(own: Tensors, config: dict[str, Any], beside: Beside) -> Tensors:
        config["lora_alpha"] *= factor
        return own

    return change


# next to nothing rather than nothing: an adapter without effect is refused
def _without(pattern: str) -> Callable[[Tensors, dict[str, Any], Beside], Tensors]:
    def change(own: Tensors, config: dict[str, Any], beside: Beside) -> Tensors:
        return _b(own, lambda name, b_OR: 1e-7 * b_OR if re.search(pattern, name) else b_OR)

    return change


def _b(own: Tensors, change: Callable[[str, Tensor], Tensor]) -> Tensors:
    return {name: change(name, value) if "lora_B" in name else value for name, value in own.items()}


def _rank_stabilised(own: Tensors, config: dict[str, Any], beside: Beside) -> Tensors:
    config["use_rslora"] = True
    return own


def _unpermuted(own: Tensors, config: dict[str, Any], beside: Beside) -> Tensors:
    """A GGUF's rows for rotary pairs that stand side by side, from an adapter whose pairs are half a head apart."""
    half = beside.head // 2
    order = [row + part for row in range(half) for part in (0, half)]

    def change(name: str, b_OR: Tensor) -> Tensor:
        if not re.search(r"[qk]_proj", name):
            return b_OR
        starts = range(0, len(b_OR), beside.head)
        return b_OR[[start + row for start in starts for row in order]]

    return _b(own, change)


def _as_text(own: Tensors, config: dict[str, Any], beside: Beside) -> Tensors:
    """Blocks listed as 0, 1, 10, 11, 2, .. and counted through."""
    numbers = sorted({int(name.split(".layers.")[1].split(".")[0]) for name in own}, key=str)
    moved = {}
    for place, number in enumerate(numbers):
        for name in own:
            if f".layers.{number}." in name:
                moved[name.replace(f".layers.{number}.", f".layers.{place}.")] = own[name]
    return moved


def _exchanged(own: Tensors, config: dict[str, Any], beside: Beside) -> Tensors:
    names = {"k_proj": "v_proj", "v_proj": "k_proj"}
    return {re.sub("k_proj|v_proj", lambda found: names[found[0]], name): value for name, value in own.items()}


def _half_ranks(own: Tensors, config: dict[str, Any], beside: Beside) -> Tensors:
    def change(name: str, b_OR: Tensor) -> Tensor:
        kept = b_OR.clone()
        kept[:, b_OR.shape[1] // 2 :] = 0
        return kept

    return _b(own, change)


def _both(own: Tensors, config: dict[str, Any], beside: Beside) -> Tensors:
    """The other's ranks beside its own, both under one scale."""
    config["r"], config["lora_alpha"] = config["r"] * 2, config["lora_alpha"] * 2
    return {name: torch.cat([value, beside.other[name]], dim=0 if "lora_A" in name else 1) for name, value in own.items()}


FAULTS: Mapping[str, Fault] = {
    "without-effect": Fault("got the base", _without("")),
    "swapped": Fault("got {other}", lambda own, config, beside: beside.other),
    "stale": Fault("an older version: {name}@1", lambda own, config, beside: beside.older),
    "scale-2": Fault("scale doubled", _alpha(2.0)),
    "scale-half": Fault("scale halved", _alpha(0.5)),
    "alpha-ignored": Fault("alpha not applied", _alpha(1 / ALPHA)),
    "rank-stabilised": Fault("rank-stabilised scaling where there is none", _rank_stabilised),
    "not-divided-by-the-rank": Fault("alpha not divided by the rank", _alpha(8.0)),
    "subtracted": Fault("subtracted instead of added", _alpha(-1.0)),
    "q_proj-dropped": Fault("q_proj not applied", _without("q_proj")),
    "k_proj-dropped": Fault("k_proj not applied", _without("k_proj")),
    "v_proj-dropped": Fault("v_proj not applied", _without("v_proj")),
    "last-block-dropped": Fault("block {last} not applied", _without(r"layers\.{last}\.")),
    "blocks-as-text": Fault("blocks in the order of their numbers as text", _as_text),
    "q-and-k-unpermuted": Fault("permuted as for a GGUF", _unpermuted),
    "k-and-v-exchanged": Fault("k_proj and v_proj exchanged", _exchanged),
    "ranks-cut": Fault("ranks applied", _half_ranks),
    "another-added": Fault("{other} added to it", _both),
}


def full_adapter(model: Any, adapter: lw.Adapter, seed: int, scale: float = 0.02) -> lw.Adapter:
    """The adapter with small random updates of every attention layer that it leaves alone."""
    generator = torch.Generator().manual_seed(seed)
    layers = dict(adapter.layers)
    for layer, module in model.named_modules():
        if re.search(r"[qkvo]_proj$", layer) and layer not in layers:
            a_RI = torch.randn(adapter.rank, module.in_features, generator=generator) * module.in_features**-0.5
            layers[layer] = Factors(a_RI, torch.randn(module.out_features, adapter.rank, generator=generator) * scale)
    return lw.Adapter(adapter.name, adapter.base_model, layers, adapter.fingerprint, adapter.card)


def write_sound(adapter: lw.Adapter, folder: Path) -> Path:
    """The adapter's folder, with an alpha of `ALPHA` ranks."""
    adapter.save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text())
    own = _b(load_file(folder / WEIGHTS), lambda name, b_OR: b_OR * config["lora_alpha"] / config["r"] / ALPHA)
    config["lora_alpha"] = ALPHA * config["r"]
    return _write(own, config, folder)


def write_faulty(name: str, sound: Path, other: Path, older: Path, folder: Path, *, head: int, last: int) -> str:
    """The sound folder with a fault of `FAULTS`, as the adapter that `folder` is called; returns what has to be said."""
    fault = FAULTS[name]
    shutil.copytree(sound, folder)
    config = json.loads((folder / CONFIG).read_text())
    beside = Beside(load_file(other / WEIGHTS), load_file(older / WEIGHTS), head)
    change = _without(rf"layers\.{last}\.") if name == "last-block-dropped" else fault.change
    _write(change(load_file(folder / WEIGHTS), config, beside), config, folder)
    return fault.verdict.format(other=other.name, name=folder.name, last=last)


def _write(tensors: Tensors, config: dict[str, Any], folder: Path) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config))
    return folder
