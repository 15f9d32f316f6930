"""Routers of loraweave as layers ask them: where the layers are, and in their own precision."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from loraweave.composer.kernels._own_precision import own_precision
from loraweave.routers.by_row import ByRow
from loraweave.routers.routing.by_row_begun import by_row
from loraweave.routers.routing.token_router import TokenRouter
from loraweave.types import Router


def asked(router: Router) -> Router:
    """The router, or each of a batch's; one that is none of loraweave's is asked as it is, since it may need autocast."""
    if isinstance(router, ByRow):
        # one object for one router, which is shown a call once
        known = {part: _asked(part) for part in router.routers if part is not None}
        return by_row([None if part is None else known[part] for part in router.routers], router.experts)
    return _asked(router)


def _asked(router: Router) -> Router:
    if not isinstance(router, TokenRouter):
        return router
    return _AskedWhole(router) if hasattr(router, "begin") else _Asked(router)


class _Asked:
    """It goes to where the layers are, and with them where they are on several devices."""

    def __init__(self, router: TokenRouter) -> None:
        self._router = router
        self._device: torch.device | None = None

    @property
    def parts(self) -> list[TokenRouter]:
        """The routers that it is made of."""
        return self._router.parts

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        if x_BTI.device != self._device:
            with torch.inference_mode(False):
                self._router.to(x_BTI.device)
            self._device = x_BTI.device
        return _in_own_precision(self._router, x_BTI, layer)


class _AskedWhole:
    def __init__(self, router: Any) -> None:
        self._router = router

    @property
    def parts(self) -> list[TokenRouter]:
        """The routers that it is made of."""
        found: list[TokenRouter] = self._router.parts
        return found

    def begin(self, model: Any, arguments: Mapping[str, Any]) -> Router:
        """The router of one call."""
        return _OfCall(self._router.begin(model, arguments))

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Raises what the router raises that was not shown the call."""
        w_BTE: Tensor = self._router.weights(x_BTI, layer)
        return w_BTE


class _OfCall:
    def __init__(self, router: Router) -> None:
        self._router = router
        self.shares_weights = bool(getattr(router, "shares_weights", False))

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        return _in_own_precision(self._router, x_BTI, layer)


def _in_own_precision(router: Router, x_BTI: Tensor, layer: str) -> Tensor:
    with own_precision(x_BTI.device) if torch._C._is_any_autocast_enabled() else nullcontext():
        return router.weights(x_BTI, layer)
