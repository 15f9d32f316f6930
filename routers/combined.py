"""Functions that treat all routers alike, and routers made of other routers.

`begin` shows a router one forward call of the model, and `weights` weighs a layer's input. `begin` and `needs_call` accept
every object with `weights`, whether or not it has a `begin` of its own. `derive` wraps a router with a function; `ByRow` has
a router for each row of the batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from loraweave.common.process import holding
from loraweave.errors import ScopeError, WeightingError
from loraweave.routers.weights import MixtureWeights, Router


def needs_call(router: Any) -> bool:
    """Return True if `begin` has to show a router each forward call before it can weigh a layer's input."""
    return bool(getattr(router, "needs_call", hasattr(router, "begin")))


def begin(router: Router, model: Any, arguments: Mapping[str, Any]) -> Router:
    """Return the router for one call of `model` with `arguments`, {name: value}; `router` itself if it needs no call."""
    return router.begin(model, arguments) if needs_call(router) else router  # type: ignore[attr-defined, no-any-return]


def parts_of(router: Any) -> list[Any]:
    """List the routers that a router is made of; [router] if it has no parts."""
    return list(getattr(router, "parts", [router]))


@runtime_checkable
class Valued(Protocol):
    """A router that, if `values` is true, transforms what a layer's mixture adds: y += V sum over e of w_e b_e a_e x.

    V_OO is `value_matrix(layer)`, and None the identity. Gains and biases are added as they are. Such a router is activated
    by itself, not within others.
    """

    values: bool

    def value_matrix(self, layer: str) -> Tensor | None: ...

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor: ...


# returns w_BTE for a router, a layer's input x_BTI and the layer's path
Weigh = Callable[[Router, Tensor, str], Tensor]


def derive(router: Router, weigh: Weigh, *, shares_weights: bool = False) -> Router:
    """Return a router whose weights are `weigh(router of the running call, x_BTI, layer)`; `begin` shows `router` each call.

    `shares_weights` says that weigh() returns the router's own tensors, unchanged.
    """
    return _Derived(router, weigh, shares_weights)


class _Derived:
    def __init__(self, router: Router, weigh: Weigh, shares_weights: bool) -> None:
        self._router = router
        self._weigh = weigh
        self._gives_own = shares_weights
        self.parts = parts_of(router)
        self.needs_call = needs_call(router)
        self.shares_weights = shares_weights and bool(getattr(router, "shares_weights", False))

    def begin(self, model: Any, arguments: Mapping[str, Any]) -> Router:
        return _Derived(begin(self._router, model, arguments), self._weigh, self._gives_own)

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        return self._weigh(self._router, x_BTI, layer)


class ByRow:
    """A router with one router, or None for the base, for each row of the batch.

    All weigh `experts`, in this order, except MixtureWeights, which may name only some of them. In a batch of k times as
    many rows each router serves k consecutive rows. A router sees its own rows only, unless it needs the call or compares a
    layer's input with that of its block: such a router weighs the whole batch once a layer, and its weights for a row depend
    on no other row.
    """

    def __init__(self, routers: Sequence[Router | None], experts: tuple[str, ...]) -> None:
        self.routers = tuple(routers)
        self.experts = experts
        self._of_batch = list(dict.fromkeys(router for router in routers if router is not None and _sees_batch(router)))
        self.needs_call = bool(self._of_batch)

    @property
    def num_rows(self) -> int:
        return len(self.routers)

    @property
    def parts(self) -> list[Any]:
        """The routers that the rows' routers are made of."""
        return [part for router in self.routers if router is not None for part in parts_of(router)]

    def begin(self, model: Any, arguments: Mapping[str, Any]) -> Router:
        """Return the router for one call if any of the routers sees the batch, else `self`."""
        of_call = {router: begin(router, model, arguments) for router in self._of_batch}

        def weigh(rows: Router, x_BTI: Tensor, layer: str) -> Tensor:
            return self._joined(x_BTI, layer, {router: begun.weights(x_BTI, layer) for router, begun in of_call.items()})

        return derive(self, weigh) if of_call else self

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE.

        Raises ScopeError unless B is a multiple of `num_rows`, WeightingError if a router's weights have another shape.
        """
        return self._joined(x_BTI, layer, {})

    def _joined(self, x_BTI: Tensor, layer: str, of_batch: Mapping[Router, Tensor]) -> Tensor:
        """Return w_BTE of all rows; `of_batch` is {router: w_BTE} of the routers that weighed the whole batch."""
        copies, rest = divmod(x_BTI.shape[0], self.num_rows)
        if rest:
            raise ScopeError(
                f"the mixture has {self.num_rows} rows, but the input of layer {layer!r} has {x_BTI.shape[0]}, not a "
                "multiple; give one mixture for each row of the batch"
            )
        by_row = []
        for number, router in enumerate(self.routers):
            rows = slice(number * copies, (number + 1) * copies)
            w_BTE = None if router is None else of_batch.get(router)
            if w_BTE is not None and w_BTE.shape[0] == x_BTI.shape[0]:
                w_BTE = w_BTE[rows]
            by_row.append(self._weights_of(number, x_BTI[rows], layer, w_BTE))
        longest = max(w_BTE.shape[1] for w_BTE in by_row)
        return torch.cat([w_BTE.expand(-1, longest, -1) for w_BTE in by_row])

    def _weights_of(self, number: int, x_BTI: Tensor, layer: str, w_BTE: Tensor | None) -> Tensor:
        """Return w_BTE of router `number` for its rows x_BTI: `w_BTE` if given, else computed; T is 1 or that of x."""
        router = self.routers[number]
        copies, num_tokens = x_BTI.shape[:2]
        if router is None:
            return x_BTI.new_zeros(copies, 1, len(self.experts), dtype=torch.float32)
        if w_BTE is None:
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


def _sees_batch(router: Router) -> bool:
    """Return True if a router weighs the whole batch: it needs the call, or compares its input with that of its block."""
    return needs_call(router) or any(getattr(part, "watched", ()) for part in parts_of(router))


def num_rows_of(router: Router) -> int:
    """Return the number of rows for which a mixture has separate weights; 1 if all rows share a router or weights."""
    return getattr(router, "num_rows", 1)


def rows_of(router: Router) -> Sequence[Router | None]:
    """Return the router of each row of a batch, or a single router that all rows share."""
    return router.routers if isinstance(router, ByRow) else (router,)


def masked(router: Router, place: int, *, renormalise: bool = False) -> Router:
    """Return the router with weight 0 for the expert with index `place` and all other weights unchanged.

    With `renormalise` the other weights are scaled so that each token's sum stays the same; weights that sum to 0 stay.
    """
    if isinstance(router, MixtureWeights):
        return MixtureWeights(_without_expert(router.values_BTLE, place, renormalise), router.experts, router.layers)
    return derive(router, lambda router, x_BTI, layer: _without_expert(router.weights(x_BTI, layer), place, renormalise))


def _without_expert(w_E: Tensor, place: int, renormalise: bool) -> Tensor:
    """Return a copy of weights (.., E) with 0 for the expert with index `place`."""
    left_E = w_E.clone()
    left_E[..., place] = 0
    if not renormalise:
        return left_E
    rest, total = left_E.sum(dim=-1, keepdim=True), w_E.sum(dim=-1, keepdim=True)
    return left_E * torch.where(rest == 0, 1.0, total / rest)


Answering = Callable[[Mapping[str, float]], AbstractContextManager[None]]

_ANSWERING: ContextVar[Answering | None] = ContextVar("loraweave_answering", default=None)


def answering(with_weights: Answering) -> AbstractContextManager[None]:
    """Make `under` use `with_weights` inside the context: with_weights(w) is a context that answers with the mixture w."""
    return holding(_ANSWERING, with_weights)


@contextmanager
def under(weights: Mapping[str, float]) -> Iterator[None]:
    """Make the model answer with {name: weight} inside the context. Raises ScopeError outside a Composer's call."""
    answer_with = _ANSWERING.get()
    if answer_with is None:
        raise ScopeError(
            "a router looks at the model under a mixture only inside a call that a Composer sees: activate() it"
        )
    with answer_with(weights):
        yield


@contextmanager
def known_as(names: Mapping[str, str]) -> Iterator[None]:
    """Rename experts inside the context: `under` takes the keys of `names`, {name: name in the running mixture}."""
    answer_with = _ANSWERING.get()
    if answer_with is None:
        yield
        return
    with answering(lambda weights: answer_with({names[name]: weight for name, weight in weights.items()})):
        yield
