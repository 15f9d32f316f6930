"""Rows of a batch with a router each, some of which look at the whole input of a call first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from loraweave.routers.by_row import ByRow
from loraweave.types import Router


def by_row(routers: Sequence[Router | None], experts: tuple[str, ...]) -> ByRow:
    """ByRow of these routers, as one that looks at whole inputs where one of them does."""
    whole = any(hasattr(router, "begin") for router in routers)
    return _BegunByRow(routers, experts) if whole else ByRow(routers, experts)


class _BegunByRow(ByRow):
    """Each router is shown the whole batch once, and what it gives counts for its own rows, which depend on no others."""

    @property
    def parts(self) -> list[Any]:
        """The routers that it is made of."""
        return [part for router in self.routers if router is not None for part in getattr(router, "parts", [router])]

    def begin(self, model: Any, arguments: Mapping[str, Any]) -> ByRow:
        """The routers of one call."""
        whole: dict[Router, Router] = {}
        for router in self.routers:
            begin = getattr(router, "begin", None)
            if router is not None and begin is not None and router not in whole:
                whole[router] = begin(model, arguments)
        found = [
            _OwnRows(whole[router], number, self.num_rows) if router is not None and router in whole else router
            for number, router in enumerate(self.routers)
        ]
        return ByRow(found, self.experts)


class _OwnRows:
    """One row's part of what a router gives to a batch."""

    def __init__(self, router: Router, number: int, num_rows: int) -> None:
        self._router = router
        self._number = number
        self._num_rows = num_rows

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        w_BTE = self._router.weights(x_BTI, layer)
        copies = x_BTI.shape[0]
        if w_BTE.shape[0] == self._num_rows * copies:
            return w_BTE[self._number * copies : (self._number + 1) * copies]
        return w_BTE
