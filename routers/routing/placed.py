"""A router's answer for another pool that has its experts: these where they are there, weight 0 for all others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraweave.hub.pool import ExpertPool
from loraweave.routers.routing.answering import renamed
from loraweave.routers.routing.places import places_in
from loraweave.routers.routing.token_router import TokenRouter
from loraweave.types import Router


def placed(router: TokenRouter, pool: ExpertPool) -> TokenRouter:
    """The router for the experts of a pool that has its own, by content, under whatever names and in whatever order.

    Itself where the pool is the one it is for. Raises WeightingError, which lists the differences, for a pool without some
    of its experts, BaseModelMismatch for one of another base.
    """
    names = tuple(places_in(router, pool))
    if names == router.experts == pool.names:
        return router
    return _PlacedWhole(router, pool, names) if hasattr(router, "begin") else _Placed(router, pool, names)


class _Placed(TokenRouter):
    """It is saved as the router that it was made of, and trained, added to and taken from as that one alone."""

    place_P: Tensor

    def __init__(self, router: TokenRouter, pool: ExpertPool, names: tuple[str, ...]) -> None:
        super().__init__(pool)
        self.router = router
        # in layers that it does not know all weights are 0
        self.simplex = router.simplex and set(self.layers) <= set(router.layers)
        self.names_of_own = dict(zip(router.experts, names, strict=True))
        self._own = ExpertPool({own: pool.adapters[name] for own, name in zip(router.experts, names, strict=True)})
        self.register_buffer("place_P", torch.tensor([pool.places[name] for name in names]), persistent=False)

    @property
    def name(self) -> str:
        return self.router.name

    @property
    def options(self) -> dict[str, Any]:
        return self.router.options

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        return self.spread(self.router, x_BTI, layer)

    def spread(self, router: Router, x_BTI: Tensor, layer: str) -> Tensor:
        """w_BTE over the pool's experts, of what `router` says of its own."""
        if layer not in self.router.members.layers:
            return x_BTI.new_zeros(1, 1, len(self.experts), dtype=torch.float32)
        w_BTP = router.weights(x_BTI, layer)
        return w_BTP.new_zeros(*w_BTP.shape[:2], len(self.experts)).index_copy(2, self.place_P.to(w_BTP.device), w_BTP)

    def save_pretrained(self, folder: str | Path, *, pool: ExpertPool | None = None) -> Path:
        return self.router.save_pretrained(folder, pool=None if pool is None else self._own)


class _PlacedWhole(_Placed):
    def begin(self, model: Any, arguments: Mapping[str, Any]) -> Router:
        """The router of one call."""
        begun: Any = self.router
        with renamed(self.names_of_own):
            return _OfCall(self, begun.begin(model, arguments))


class _OfCall:
    def __init__(self, whole: _Placed, router: Router) -> None:
        self._whole = whole
        self._router = router

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        return self._whole.spread(self._router, x_BTI, layer)
