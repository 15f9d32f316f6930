"""Which parameters of a model share memory, so that a write to one changes another."""

from __future__ import annotations

import torch
from torch import nn


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """The parameters that share memory with another parameter or buffer, each with the name of one such."""
    spans = []
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if tensor.is_meta or tensor.numel() == 0 or tensor.layout is not torch.strided:
            continue
        extent = sum((size - 1) * abs(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        spans.append((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size(), name))
    spans.sort()
    tied: dict[str, str] = {}
    widest: tuple[str, int, int, str] | None = None
    for span in spans:
        if widest is not None and span[0] == widest[0] and span[1] < widest[2]:
            tied.setdefault(widest[3], span[3])
            tied.setdefault(span[3], widest[3])
        if widest is None or span[0] != widest[0] or span[2] > widest[2]:
            widest = span
    return tied
