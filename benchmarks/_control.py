"""Hubs in whose adapters nothing is stored, to know what stored adapters are worth.

The cards stay, and with them what retrieval finds and what an adapter is asked with. In place of its factors an adapter has

- `noise`: Gaussian numbers, of which each layer's update has the Frobenius norm that the adapter's update had;
- `shuffled`: the factors of another adapter of the hub, each adapter's used once.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
# what PEFT reads the weights by
CONFIG = "adapter_config.json"


def noise(folders: Sequence[Path], into: Path, seed: int) -> None:
    """Writes the adapters' folders into `into`, each update replaced by noise of its norm."""
    for folder in folders:
        shutil.copytree(folder, into / folder.name)
        generator = torch.Generator().manual_seed(random.Random(f"{seed} {folder.name}").getrandbits(63))
        save_file(noisy(load_file(folder / WEIGHTS), generator), into / folder.name / WEIGHTS)


def noisy(tensors: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Returns tensors of the same names, shapes and dtypes, and of updates B A with the same Frobenius norms."""
    drawn = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in sorted(tensors.items())}
    for name_a in (name for name in tensors if ".lora_A." in name):
        name_b = name_a.replace(".lora_A.", ".lora_B.")
        drawn[name_b] *= norm(tensors[name_a], tensors[name_b]) / norm(drawn[name_a], drawn[name_b])
    return {name: tensor.to(tensors[name].dtype) for name, tensor in drawn.items()}


def norm(a: Tensor, b: Tensor) -> Tensor:
    """Returns the Frobenius norm of B A, the root of the sum of (B'B) * (A A')."""
    a, b = a.double(), b.double()
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()


def shuffled(folders: Sequence[Path], into: Path, seed: int) -> None:
    """Writes the adapters' folders into `into`, each with the factors of the next one in an order drawn at random."""
    order = random.Random(seed).sample(list(folders), len(folders))
    for folder, other in zip(order, order[1:] + order[:1], strict=True):
        shutil.copytree(folder, into / folder.name)
        for name in (WEIGHTS, CONFIG):
            shutil.copy(other / name, into / folder.name / name)


CONTROLS: dict[str, Callable[[Sequence[Path], Path, int], None]] = {"noise": noise, "shuffled": shuffled}
