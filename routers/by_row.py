"""A router made of others: each row of the batch has its own, be it known weights or a router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loraweave.errors import ScopeError, WeightingError
from loraweave.routers.mixture import MixtureWeights
from loraweave.routers.routing.parts import parts_of
from loraweave.types import Router


class ByRow:
    """w_BTE whose rows come from one router each; None is the base. All are over `experts`, in this order, but for
    MixtureWeights, which may name some of them only.

    A batch of k times as many rows uses each for k rows on end. A router sees its own rows only.
    """

    def __init__(self, routers: Sequence[Router | None], experts: tuple[str, ...]) -> None:
        self.routers = tuple(routers)
        self.experts = experts

    @property
    def num_rows(self) -> int:
        return len(self.routers)

    @property
    def parts(self) -> list[Any]:
        """The routers that it is made of."""
        return [part for router in self.routers if router is not None for part in parts_of(router)]

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Raises ScopeError for rows that are no multiple of the routers, WeightingError for weights of another shape."""
        if x_BTI.shape[0] % self.num_rows:
            raise ScopeError(
                f"the mixture has {self.num_rows} rows, but the input of layer {layer!r} has {x_BTI.shape[0]}, no multiple; "
                "give one mixture for each row of the batch"
            )
        copies = x_BTI.shape[0] // self.num_rows
        found = [
            self._weights_of(number, x_BTI[number * copies : (number + 1) * copies], layer)
            for number in range(self.num_rows)
        ]
        longest = max(w_BTE.shape[1] for w_BTE in found)
        return torch.cat([w_BTE.expand(-1, longest, -1) for w_BTE in found])

    def _weights_of(self, number: int, x_BTI: Tensor, layer: str) -> Tensor:
        """w_BTE of one router's rows, T as long as it gave it."""
        router = self.routers[number]
        copies, num_tokens = x_BTI.shape[:2]
        if router is None:
            return x_BTI.new_zeros(copies, 1, len(self.experts), dtype=torch.float32)
        w_BTE = router.weights(x_BTI, layer)
        if isinstance(router, MixtureWeights) and router.experts != self.experts:
            place_E = torch.tensor([self.experts.index(name) for name in router.experts], device=w_BTE.device)
            w_BTE = w_BTE.new_zeros(*w_BTE.shape[:2], len(self.experts)).index_copy(2, place_E, w_BTE)
        fits = w_BTE.ndim == 3 and w_BTE.shape[0] in (1, copies) and w_BTE.shape[2] == len(self.experts)
        if not fits or w_BTE.shape[1] not in (1, num_tokens):
            raise WeightingError(
                f"{type(router).__name__} of row {number} gave weights {tuple(w_BTE.shape)} for layer {layer!r}, whose "
                f"input has {copies} rows of {num_tokens} tokens; expected these and {len(self.experts)} experts, or size 1"
            )
        return w_BTE.to(x_BTI.device).expand(copies, -1, -1)
