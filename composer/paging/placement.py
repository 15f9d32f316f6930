"""Where a model's target layers are now: the device and the dtype in which their updates are calculated."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from loraweave.composer.layers import TargetLayer, is_floating
from loraweave.composer.paging.layout import Place


def placement(model: nn.Module, layers: Mapping[str, TargetLayer]) -> dict[str, Place]:
    """The place of each layer whose place is known before it runs.

    A quantised layer calculates in the dtype of its input, which is taken to be that of the model's first parameter of
    floats; an offloaded one where accelerate brings it.
    """
    found: dict[str, Place] = {}
    dtype: torch.dtype | None = None
    for name, layer in layers.items():
        weight = layer.parameter("weight")
        if weight is None:
            continue
        device = weight.device
        if device.type == "meta":
            moved = getattr(getattr(layer.module, "_hf_hook", None), "execution_device", None)
            if moved is None:
                continue
            device = torch.device(moved)
        if is_floating(weight.dtype):
            found[name] = device, weight.dtype
        else:
            dtype = dtype or next((each.dtype for each in model.parameters() if is_floating(each.dtype)), torch.float32)
            found[name] = device, dtype
    return found
