"""Adapters in a PEFT model of one layer, and the same adapters as factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraweave.types import Factors


class _Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = nn.Embedding(9, 6) if kind == "embedding" else nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.fixture(scope="session")
def in_peft() -> Callable[..., tuple[Any, list[Factors]]]:
    """in_peft(scales, ranks, kind): a PEFT model of one layer, `base_model.model.layer`, with random adapters "0", "1", ...
    of those scales and ranks, and the factors of each."""

    def make(scales: Sequence[float], ranks: Sequence[int], kind: str = "linear") -> tuple[Any, list[Factors]]:
        from peft import LoraConfig, get_peft_model

        configs = [
            LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=["layer"])
            for rank, scale in zip(ranks, scales, strict=True)
        ]
        model = get_peft_model(_Net(kind), configs[0], adapter_name="0")
        for number, config in enumerate(configs[1:], start=1):
            model.add_adapter(str(number), config)
        layer = model.base_model.model.layer
        generator = torch.Generator().manual_seed(7)
        made = []
        for number, scale in enumerate(scales):
            if kind == "embedding":
                pair = layer.lora_embedding_A[str(number)], layer.lora_embedding_B[str(number)]
            else:
                pair = layer.lora_A[str(number)].weight, layer.lora_B[str(number)].weight
            with torch.no_grad():
                for tensor in pair:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
            made.append(Factors(pair[0].detach().clone(), pair[1].detach() * scale))
        return model, made

    return make
