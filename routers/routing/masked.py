"""A router without what it gives to one expert, all other weights as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loraweave.types import Router


def masked(router: Router, place: int) -> Router:
    """Weight 0 for the expert at that place. What the others lack to 1 then is what it had."""
    return _MaskedWhole(router, place) if hasattr(router, "begin") else _Masked(router, place)


class _Masked:
    def __init__(self, router: Any, place: int) -> None:
        self._router = router
        self._place = place

    @property
    def parts(self) -> list[Any]:
        """The routers that it is made of."""
        return list(getattr(self._router, "parts", [self._router]))

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        w_BTE: Tensor = self._router.weights(x_BTI, layer).clone()
        w_BTE[..., self._place] = 0
        return w_BTE


class _MaskedWhole(_Masked):
    def begin(self, model: Any, arguments: Mapping[str, Any]) -> Router:
        """The router of one call."""
        return _Masked(self._router.begin(model, arguments), self._place)
