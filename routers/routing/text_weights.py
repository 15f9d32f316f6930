"""Weights of the rows of one call, the same in all layers."""

from __future__ import annotations

from torch import Tensor

from loraweave.routers.routing.choosing import without
from loraweave.routers.routing.members import Members


class TextWeights:
    """w_BTE, with 0 for an expert in the layers that it leaves alone.

    `logits_to_keep` is the call's argument, which has the language head see fewer tokens: the last, or those of an index.
    """

    def __init__(self, w_BTE: Tensor, members: Members, logits_to_keep: int | Tensor | None) -> None:
        self._w_BTE = w_BTE
        self._members = members
        self._logits_to_keep = logits_to_keep

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        w_BTE, present = self._w_BTE, self._members.layers[layer].experts
        keep = self._logits_to_keep
        if keep is not None and w_BTE.shape[1] not in (1, x_BTI.shape[1]):
            w_BTE = w_BTE[:, keep] if isinstance(keep, Tensor) else w_BTE[:, -keep:]
        return without(w_BTE, present, filling=0.0)
