"""Small models and adapters to be fused, and what is in a model's memory, bit for bit."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraweave.composer.composer import Composer
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

LAYER = "model.layers.0.self_attn.q_proj"
MIXTURE = {"a": 0.7, "b": -0.4, "c": 1.3}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(model: nn.Module) -> dict[str, tuple[int, int, bytes]]:
    """Which object each parameter is, where its memory is, and what is in it."""
    return {
        name: (id(p), p.data_ptr(), p.detach().view(torch.uint8).numpy().tobytes()) for name, p in model.named_parameters()
    }


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Three layers, of both ways to store a weight, with odd sizes and biases."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), Conv1D(7, 3), nn.Linear(7, 9, bias=False))
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model.to(dtype)


def small_adapter(name: str, seed: int, layers: str = "012", *, bias: bool = True, rank: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"0": (3, 5), "1": (7, 3), "2": (9, 7)}
    found = {}
    for layer in layers:
        num_outputs, num_inputs = sizes[layer]
        a_RI, b_OR = (torch.randn(*shape, generator=generator) for shape in ((rank, num_inputs), (num_outputs, rank)))
        bias_O = torch.randn(num_outputs, generator=generator) if bias and layer != "2" else None
        found[layer] = Factors(a_RI, b_OR, bias_O=bias_O)
    return Adapter(name, "tiny", found)


def small_engine(dtype: torch.dtype = torch.float32) -> Composer:
    layers = {"a": "01", "b": "12", "c": "012"}
    return Composer(
        small_model(dtype), [small_adapter(name, seed, layers[name], rank=seed) for seed, name in enumerate("abc", start=1)]
    )
