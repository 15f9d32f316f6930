"""A router made of others: each row of the batch has its own, be it known weights or a router."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loraweave.common.process import holding
from loraweave.errors import BaseModelMismatch, ScopeError, WeightingError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._members import Members
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Router

if TYPE_CHECKING:
    from loraweave.routers.tokens._router import TokenRouter


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


Answering = Callable[[Mapping[str, float]], AbstractContextManager[None]]

_ANSWERING: ContextVar[Answering | None] = ContextVar("loraweave_answering", default=None)


def answering(with_weights: Answering) -> AbstractContextManager[None]:
    """Inside, `under` is this."""
    return holding(_ANSWERING, with_weights)


@contextmanager
def under(weights: Mapping[str, float]) -> Iterator[None]:
    """Inside, the model answers with {name: weight}. Raises ScopeError outside a Composer's call."""
    found = _ANSWERING.get()
    if found is None:
        raise ScopeError(
            "a router looks at the model under a mixture only inside a call that a Composer sees: activate() it"
        )
    with found(weights):
        yield


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Inside, the experts are known by the keys instead of the values."""
    found = _ANSWERING.get()
    if found is None:
        yield
        return
    with answering(lambda weights: found({names[name]: weight for name, weight in weights.items()})):
        yield


def parts_of(router: Any) -> list[Any]:
    """A router and those that it is made of."""
    return list(getattr(router, "parts", [router]))


NUM_SHOWN = 6


def places_in(router: TokenRouter, pool: ExpertPool) -> list[str]:
    """The pool's name of each of the router's experts, in the router's order.

    Raises BaseModelMismatch for a pool of another base, WeightingError, which lists the differences, for one without
    some of the experts.
    """
    own, other = router.members, Members.of(pool)
    if why := own.base.differs(other.base):
        raise BaseModelMismatch(f"router {router.name!r} was made for another base model than the pool's: {why}")
    found = _matched(own, other)
    if None in found:
        raise WeightingError(
            f"router {router.name!r} is for other experts than the pool's: {_differences(own, other, found)}"
        )
    return [name for name in found if name is not None]


def _matched(own: Members, other: Members) -> list[str | None]:
    """For each expert the one of the same content: under its own name if that is one, else the first not taken yet."""
    by_hash: dict[str, list[str]] = {}
    for name, digest in zip(other.names, other.hashes, strict=True):
        by_hash.setdefault(digest, []).append(name)
    found: list[str | None] = []
    for name, digest in zip(own.names, own.hashes, strict=True):
        same = by_hash.get(digest, [])
        chosen = name if name in same else next((one for one in same if one not in own.places), None)
        found.append(chosen or (same[0] if same else None))
        if found[-1] is not None:
            same.remove(found[-1])
    return found


def _differences(own: Members, other: Members, found: Sequence[str | None]) -> str:
    lacking = [name for name, place in zip(own.names, found, strict=True) if place is None]
    missing = [name for name in lacking if name not in other.places]
    changed = [name for name in lacking if name in other.places]
    extra = [name for name in other.names if name not in found and name not in own.places]
    groups = (("missing from the pool", missing), ("of other content there", changed), ("not known to the router", extra))
    listed = "; ".join(f"{what}: {_some(names)}" for what, names in groups if names)
    layers = sorted(set(own.layers) ^ set(other.layers))
    apart = f"; {len(layers)} layers are updated by one of the two alone, the first {layers[0]!r}" if layers else ""
    return (
        f"{listed}{apart}. Give it the adapters that it was made for (a folder saved with pool= has them), or make a router "
        "for this pool"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(map(repr, names[:NUM_SHOWN])) + more
