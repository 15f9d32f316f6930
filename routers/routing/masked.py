"""A router without what it gives to one expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loraweave.routers.mixture import MixtureWeights
from loraweave.routers.routing.parts import parts_of
from loraweave.types import Router


def masked(router: Router, place: int, *, renormalise: bool = False) -> Router:
    """Weight 0 for the expert at that place, all other weights as they are.

    With `renormalise` the others are scaled so that each token's sum is what it was; where they sum to 0, they stay.
    """
    if isinstance(router, MixtureWeights):
        return MixtureWeights(_left(router.values_BTLE, place, renormalise), router.experts, router.layers)
    kind = _MaskedWhole if hasattr(router, "begin") else _Masked
    return kind(router, place, renormalise)


class _Masked:
    def __init__(self, router: Any, place: int, renormalise: bool) -> None:
        self._router = router
        self._place = place
        self._renormalise = renormalise

    @property
    def parts(self) -> list[Any]:
        """The routers that it is made of."""
        return parts_of(self._router)

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        return _left(self._router.weights(x_BTI, layer), self._place, self._renormalise)


class _MaskedWhole(_Masked):
    def begin(self, model: Any, arguments: Mapping[str, Any]) -> Router:
        """The router of one call."""
        return _Masked(self._router.begin(model, arguments), self._place, self._renormalise)


def _left(w_E: Tensor, place: int, renormalise: bool) -> Tensor:
    """Weights, experts on the last axis, without one of them."""
    left_E = w_E.clone()
    left_E[..., place] = 0
    if not renormalise:
        return left_E
    rest, total = left_E.sum(dim=-1, keepdim=True), w_E.sum(dim=-1, keepdim=True)
    return left_E * torch.where(rest == 0, 1.0, total / rest)
