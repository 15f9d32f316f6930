"""Rows of a batch with a router each, some of which look at the whole input of a call first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from loraweave.routers.by_row import ByRow
from loraweave.routers.routing.parts import parts_of
from loraweave.types import Router


def by_row(routers: Sequence[Router | None], experts: tuple[str, ...]) -> ByRow:
    """ByRow of these routers, as one that looks at whole inputs where one of them looks at those of a call or a block."""
    whole = any(hasattr(router, "begin") or _looks_at_blocks(router) for router in routers)
    return _BegunByRow(routers, experts) if whole else ByRow(routers, experts)


class _BegunByRow(ByRow):
    """Each router is shown the whole batch once, and what it gives counts for its own rows, which depend on no others."""

    def begin(self, model: Any, arguments: Mapping[str, Any]) -> Router:
        """The routers of one call."""
        whole: dict[Router, Router] = {}
        for router in self.routers:
            if router is None or router in whole:
                continue
            if (begin := getattr(router, "begin", None)) is not None:
                whole[router] = begin(model, arguments)
            elif _looks_at_blocks(router):
                whole[router] = router
        return _OfCall(self, whole)


def _looks_at_blocks(router: Router | None) -> bool:
    """Whether it compares what a layer is given with what its block was, which has all rows."""
    return router is not None and any(getattr(part, "watched", ()) for part in parts_of(router))


class _OfCall:
    """Each router of the call is given the rows that it was shown, all of them, once a layer."""

    def __init__(self, rows: ByRow, whole: Mapping[Router, Router]) -> None:
        self._rows = rows
        self._whole = whole

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        given = {router: begun.weights(x_BTI, layer) for router, begun in self._whole.items()}
        num_rows = self._rows.num_rows
        found = [
            _OwnRows(given[router], number, num_rows) if router is not None and router in given else router
            for number, router in enumerate(self._rows.routers)
        ]
        return ByRow(found, self._rows.experts).weights(x_BTI, layer)


class _OwnRows:
    """One row's part of what a router gives to a batch."""

    def __init__(self, w_BTE: Tensor, number: int, num_rows: int) -> None:
        self._w_BTE = w_BTE
        self._number = number
        self._num_rows = num_rows

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        copies = x_BTI.shape[0]
        if self._w_BTE.shape[0] == self._num_rows * copies:
            return self._w_BTE[self._number * copies : (self._number + 1) * copies]
        return self._w_BTE
