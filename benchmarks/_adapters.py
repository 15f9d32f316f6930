"""What the benchmarks run on: adapters of the example pool or random ones, and the same adapters in peft."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor

import loraweave as lw
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

POOL = Path(__file__).resolve().parents[1] / "examples" / "pool"
NUM_ADAPTERS = 20
RANK = 8
ATTENTION = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapters(model: Any, targets: str, seed: int, *, rank: int = RANK) -> list[Adapter]:
    """20 adapters: the example pool's where it has as many of that rank and `targets` is "qv", else random ones."""
    folders = sorted(path.parent for path in POOL.glob("*/adapter_config.json"))[:NUM_ADAPTERS]
    if targets == "qv" and rank == RANK and len(folders) == NUM_ADAPTERS:
        return [Adapter.from_pretrained(folder) for folder in folders]
    return [random_adapter(model, f"random{number:02d}", targets, seed, rank=rank) for number in range(NUM_ADAPTERS)]


def random_adapter(model: Any, name: str, targets: str, seed: int, *, rank: int = RANK) -> Adapter:
    """Factors of the size of trained ones, a function of name and seed."""
    endings = ALL if targets == "all" else ATTENTION
    generator = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, name)))
    layers = {}
    for layer, module in model.named_modules():
        if layer.endswith(endings):
            a_RI = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
            layers[layer] = Factors(a_RI, torch.randn(module.out_features, rank, generator=generator) * 0.02)
    return Adapter(name, model.name_or_path, layers)


def in_peft(model: Any, adapters: Sequence[Adapter], *, trainable: bool = False) -> Any:
    """A PeftModel around a copy of the model, with all the adapters."""
    copied = copy.deepcopy(model)
    found: Any = None
    with tempfile.TemporaryDirectory() as folder:
        for adapter in adapters:
            path = adapter.save_pretrained(Path(folder) / adapter.name)
            if found is None:
                found = peft.PeftModel.from_pretrained(copied, path, adapter_name=adapter.name, is_trainable=trainable)
            else:
                found.load_adapter(path, adapter_name=adapter.name, is_trainable=trainable)
    return found.eval()


def mix_in_peft(model: Any, mixture: Mapping[str, float]) -> None:
    """Activates the experts of a mixture in a PeftModel and sets their weights."""
    model.base_model.set_adapter(list(mixture))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in mixture.items():
                module.set_scale(name, weight)


def one_by_one_in_peft(model: Any) -> None:
    """Gives every adapter of a PeftModel weight one again."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_A:
                module.set_scale(name, 1.0)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def base_model() -> tuple[Any, Any]:
    """The default base model and its tokenizer."""
    # peft and transformers announce names that will change; in every forward, which would be timed
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return lw.load_base(dtype=torch.float32)
