"""Weights of the rows of one call, the same in all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from loraweave.routers.routing.members import Members


class TextWeights:
    """w_BTE, with 0 for an expert in the layers that it leaves alone."""

    def __init__(self, w_BTE: Tensor, members: Members) -> None:
        self._w_BTE = w_BTE
        self._members = members

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        present = self._members.layers[layer].experts
        if len(present) == len(self._members.names):
            return self._w_BTE
        present_E = torch.zeros(len(self._members.names), dtype=torch.bool, device=self._w_BTE.device)
        present_E[list(present)] = True
        return self._w_BTE.masked_fill(~present_E, 0.0)
