"""Jobs whose updates of layers are whole matrices."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.composer.train.jobs import TrainingJob


class MatrixJob(TrainingJob):
    """y + x D^T with a trained D_OI for each layer, or with one that is zero but for trained values at fixed places.

    `values` has D_OI for each layer, or the vector of its values; `places` then has their flat places in D.
    """

    def __init__(
        self,
        name: str,
        values: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, int]],
        places: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.name = name
        self.values = {layer: value.clone().requires_grad_() for layer, value in values.items()}
        self._shapes, self._places = shapes, places

    @property
    def layers(self) -> Collection[str]:
        return self.values.keys()

    def parameters(self) -> list[Tensor]:
        return list(self.values.values())

    def update(self, layer: str, x_BTI: Tensor) -> Tensor:
        delta_OI = self.values[layer]
        if self._places is not None:
            delta_OI = spread(delta_OI, self._places[layer], self._shapes[layer])
        return functional.linear(x_BTI, delta_OI.to(x_BTI.dtype))

    def learned(self) -> dict[str, Tensor]:
        """Detached copies on the CPU."""
        return {layer: value.detach().cpu().clone() for layer, value in self.values.items()}


def spread(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """D_OI, zero but for the values at their flat places."""
    flat = values.new_zeros(shape[0] * shape[1])
    return torch.index_add(flat, 0, places.to(values.device), values).view(shape)
