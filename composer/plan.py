"""What one activation does to one layer's output: which experts, with which weight for which row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loraweave.composer.kernels.gathered import Gathered, gather, multiplied
from loraweave.composer.kernels.naive import expanded, naive
from loraweave.composer.layer_kinds import linear
from loraweave.composer.layers import TargetLayer, is_floating
from loraweave.errors import ScopeError, UnknownExpert, WeightingError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.mixture import MixtureWeights
from loraweave.types import Router


@dataclass(frozen=True, eq=False)
class _Placed:
    """One layer's stacked factors where the layer is; gain and bias in fp32 or better."""

    device: torch.device
    dtype: torch.dtype
    a_SI: Tensor
    b_OS: Tensor
    owner_S: Tensor
    gain_EO: Tensor | None
    bias_EO: Tensor | None


class ActiveExperts:
    """The experts of an activation. Their factors are stacked and moved to a layer when it first runs, then kept."""

    def __init__(self, pool: ExpertPool) -> None:
        self.pool = pool
        self.layers = frozenset(pool.layer_names)
        self._placed: dict[str, _Placed] = {}

    def on(self, layer: str, device: torch.device, dtype: torch.dtype) -> _Placed:
        """The layer's factors on this device in this dtype; a layer that has moved since is placed anew."""
        placed = self._placed.get(layer)
        if placed is None or placed.device != device or placed.dtype != dtype:
            # made as ordinary tensors even below inference_mode: a later training step may have to save them
            with torch.inference_mode(False), torch.no_grad():
                stack = self.pool.stacked(layer)
                exact = torch.promote_types(dtype, torch.float32)
                placed = _Placed(
                    device,
                    dtype,
                    stack.a_SI.to(device, dtype),
                    stack.b_OS.to(device, dtype),
                    stack.owner_S.to(device),
                    None if stack.gain_EO is None else stack.gain_EO.to(device, exact),
                    None if stack.bias_EO is None else stack.bias_EO.to(device, exact),
                )
            self._placed[layer] = placed
        return placed


@dataclass(frozen=True, eq=False)
class _Rows:
    """A layer's weights per expert and per rank row, and where any is not zero (None: everywhere, or unknown).

    `own` has each row's own factors, where that is worth it.
    """

    w_BTE: Tensor
    w_BTS: Tensor
    touched_BT: Tensor | None
    own: Gathered | None = None


class _Weights(Protocol):
    def skips(self, layer: str) -> bool: ...

    def rows(self, x_BTI: Tensor, layer: str, placed: _Placed) -> _Rows: ...


class _Fixed:
    """Weights known before the model runs; `mixture` names the active experts only."""

    def __init__(self, mixture: MixtureWeights) -> None:
        self._mixture = mixture
        self._learning = mixture.values_BTLE.requires_grad
        nonzero_L = (mixture.values_BTLE != 0).any(dim=3).flatten(0, 1).any(dim=0).tolist()
        self._shared = bool(nonzero_L[0]) or self._learning if not mixture.layers else False
        self._named = {layer for layer, used in zip(mixture.layers, nonzero_L, strict=False) if used or self._learning}
        self._ready: dict[tuple[str, bool], tuple[_Placed, _Rows]] = {}

    def skips(self, layer: str) -> bool:
        return not self._shared and layer not in self._named

    def rows(self, x_BTI: Tensor, layer: str, placed: _Placed) -> _Rows:
        if self._learning:
            return self._make(layer, placed, gathering=False)
        # a single token is bound by reading the factors, which are fewer bytes before each row has its own copy
        key = layer, x_BTI.shape[1] > 1
        ready = self._ready.get(key)
        if ready is None or ready[0] is not placed:
            with torch.inference_mode(False), torch.no_grad():
                ready = (placed, self._make(layer, placed, gathering=key[1]))
            self._ready[key] = ready
        return ready[1]

    def _make(self, layer: str, placed: _Placed, gathering: bool) -> _Rows:
        w_BTE = self._mixture.for_layer(layer).to(placed.device, torch.promote_types(placed.dtype, torch.float32))
        touched_BT = None if self._learning else (w_BTE != 0).any(dim=-1)
        if touched_BT is not None and bool(touched_BT.all()):
            touched_BT = None
        w_BTS = w_BTE[..., placed.owner_S]
        own = gather(placed.a_SI, placed.b_OS, w_BTS) if gathering else None
        return _Rows(w_BTE, w_BTS, touched_BT, own)


class _Routed:
    """Weights that a router computes from each layer's input."""

    def __init__(self, router: Router, experts: tuple[str, ...]) -> None:
        self._router = router
        self._experts = experts

    def skips(self, layer: str) -> bool:
        return False

    def rows(self, x_BTI: Tensor, layer: str, placed: _Placed) -> _Rows:
        w_BTE = self._router.weights(x_BTI, layer)
        if not isinstance(w_BTE, Tensor) or w_BTE.ndim != 3 or w_BTE.shape[2] != len(self._experts):
            found = tuple(w_BTE.shape) if isinstance(w_BTE, Tensor) else type(w_BTE).__name__
            raise WeightingError(
                f"router {type(self._router).__name__} gave {found} for layer {layer!r}; expected w_BTE with the "
                f"{len(self._experts)} experts of the pool on its last axis"
            )
        w_BTE = w_BTE.to(placed.device, torch.promote_types(placed.dtype, torch.float32))
        touched_BT = None if w_BTE.requires_grad else (w_BTE != 0).any(dim=-1)
        return _Rows(w_BTE, w_BTE[..., placed.owner_S], touched_BT)


class Plan:
    """The experts and weights of one activation."""

    def __init__(self, experts: ActiveExperts | None, weights: _Weights) -> None:
        self._experts = experts
        self._weights = weights

    def apply(self, layer: TargetLayer, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y = W x + bias with the weighted updates added; y itself where nothing is to be added.

        The rows of x are its first axis. Weights for B rows meet x of B * k rows by counting each k times in a row, as
        beams and return sequences are laid out; an x of two axes (N, I) holds its tokens row by row, so the same holds.
        Raises ScopeError, naming the layer and both counts, where that does not come out even.
        """
        if self._experts is None or layer.name not in self._experts.layers or self._weights.skips(layer.name):
            return y
        weight = layer.parameter("weight")
        dtype = weight.dtype if weight is not None and is_floating(weight.dtype) else y.dtype
        placed = self._experts.on(layer.name, y.device, dtype)
        if layer.kind is not linear:
            return self._apply_projected(layer, x.to(y.device), y, placed)
        x_BTI = x.to(y.device)
        x_BTI = x_BTI.reshape(*_leading(x_BTI), layer.num_inputs)
        rows = self._weights.rows(x_BTI, layer.name, placed)
        x_BTI = _by_token(x_BTI, rows.w_BTE.shape[1], x.ndim)
        num_rows, num_tokens = x_BTI.shape[:2]
        w_BTE = _fit(rows.w_BTE, num_rows, num_tokens, layer.name)
        if rows.own is not None:
            update_BTO = multiplied(x_BTI.to(dtype), rows.own)
        else:
            w_BTS = _fit(rows.w_BTS, num_rows, num_tokens, layer.name)
            update_BTO = naive(x_BTI.to(dtype), placed.a_SI, placed.b_OS, w_BTS)
        y_BTO = y.reshape(num_rows, num_tokens, layer.num_outputs)
        update_BTO = _with_affine(update_BTO, y_BTO, w_BTE, placed, layer)
        # into the update's own memory, which nothing else refers to, rather than a third tensor of this size
        result_BTO = update_BTO.to(y.dtype).add_(y_BTO)
        if rows.touched_BT is not None:
            touched_BT1 = _fit(rows.touched_BT[..., None], num_rows, num_tokens, layer.name)
            result_BTO = torch.where(touched_BT1, result_BTO, y_BTO)
        return result_BTO.reshape(y.shape)

    def _apply_projected(self, layer: TargetLayer, x: Tensor, y: Tensor, placed: _Placed) -> Tensor:
        """The same for a layer whose hidden values are no product of x with a matrix: an embedding, a convolution."""
        y_BTO = layer.kind.rows(layer.module, y)
        x_BTI = layer.kind.inputs(layer.module, x, placed.a_SI) if isinstance(self._weights, _Routed) else y_BTO[:, :1]
        rows = self._weights.rows(x_BTI, layer.name, placed)
        if placed.a_SI.shape[0]:
            hidden_BTS = layer.kind.project(layer.module, x, placed.a_SI)
        else:
            hidden_BTS = y_BTO.new_zeros(*y_BTO.shape[:2], 0)
        y_BTO, hidden_BTS = (_by_token(each, rows.w_BTE.shape[1], y.ndim) for each in (y_BTO, hidden_BTS))
        num_rows, num_tokens = y_BTO.shape[:2]
        w_BTE, w_BTS = (_fit(each, num_rows, num_tokens, layer.name) for each in (rows.w_BTE, rows.w_BTS))
        update_BTO = _with_affine(expanded(hidden_BTS, placed.b_OS, w_BTS), y_BTO, w_BTE, placed, layer)
        result_BTO = update_BTO.to(y.dtype).add_(y_BTO)
        if rows.touched_BT is not None:
            touched_BT1 = _fit(rows.touched_BT[..., None], num_rows, num_tokens, layer.name)
            result_BTO = torch.where(touched_BT1, result_BTO, y_BTO)
        return layer.kind.put_back(result_BTO, y)


def _leading(x: Tensor) -> tuple[int, int]:
    """(rows, tokens) of an input whose last axis are the features."""
    if x.ndim == 1:
        return 1, 1
    tokens = 1
    for size in x.shape[1:-1]:
        tokens *= size
    return x.shape[0], tokens


def _by_token(x_BTI: Tensor, num_tokens: int, num_axes: int) -> Tensor:
    """An x of two axes split into rows of as many tokens as the weights have."""
    if num_axes == 2 and num_tokens > 1 and x_BTI.shape[0] % num_tokens == 0:
        return x_BTI.reshape(-1, num_tokens, x_BTI.shape[2])
    return x_BTI


def _fit(w_BTE: Tensor, num_rows: int, num_tokens: int, layer: str) -> Tensor:
    """The weights with their B axis repeated to the input's rows; size 1 stays, and broadcasts."""
    if w_BTE.shape[1] not in (1, num_tokens):
        raise ScopeError(
            f"the weights have {w_BTE.shape[1]} tokens, but the input of layer {layer!r} has {num_tokens}; give weights for "
            "exactly the tokens of this call, or activate() a router, which computes them from the input"
        )
    if w_BTE.shape[0] in (1, num_rows):
        return w_BTE
    if num_rows % w_BTE.shape[0] != 0:
        raise ScopeError(
            f"the weights have {w_BTE.shape[0]} rows, but the input of layer {layer!r} has {num_rows}, no multiple; "
            "give one mixture for each row of the batch, or one mapping for all"
        )
    return w_BTE.repeat_interleave(num_rows // w_BTE.shape[0], dim=0)


def _with_affine(update_BTO: Tensor, y_BTO: Tensor, w_BTE: Tensor, placed: _Placed, layer: TargetLayer) -> Tensor:
    """The update plus sum over e of w_e (gain_e * y0 + bias_e), where the experts have gains or biases."""
    if placed.gain_EO is not None:
        bias_O = layer.parameter("bias")
        base_BTO = y_BTO.to(w_BTE.dtype)
        base_BTO = base_BTO if bias_O is None else base_BTO - bias_O.to(base_BTO)
        update_BTO = update_BTO + (w_BTE @ placed.gain_EO) * base_BTO
    if placed.bias_EO is not None:
        update_BTO = update_BTO + w_BTE @ placed.bias_EO
    return update_BTO


def resolve(mixture: Any, pool: ExpertPool) -> MixtureWeights | Router:
    """What activate() takes, as weights in the order of the pool's experts, or as the router that it is.

    Raises WeightingError for anything else, UnknownExpert for a name that the pool has not.
    """
    if isinstance(mixture, MixtureWeights):
        return _aligned(mixture, pool)
    if isinstance(mixture, Mapping):
        return MixtureWeights.of(mixture, pool.names)
    if callable(getattr(mixture, "weights", None)):
        return mixture  # type: ignore[no-any-return]
    if isinstance(mixture, Iterable) and not isinstance(mixture, str):
        rows = list(mixture)
        if all(row is None or isinstance(row, Mapping) for row in rows):
            return MixtureWeights.of(rows, pool.names)
    raise WeightingError(
        f"a mixture is {{name: weight}}, a list with one of these (None: the base) per row, MixtureWeights or a router, "
        f"not {mixture!r}; {{}} is the base model"
    )


def make_plan(
    weights: MixtureWeights | Router, names: tuple[str, ...], stacks: Callable[[tuple[str, ...]], ActiveExperts]
) -> Plan:
    """The plan for resolved weights over a pool of these names; `stacks` gives the factors of the experts that are active.

    Only experts with a weight that is not zero are active, or that learns; a router may use all of them.
    Raises WeightingError for a router that names other experts, or in another order.
    """
    if not isinstance(weights, MixtureWeights):
        own = getattr(weights, "experts", None)
        if isinstance(own, tuple | list) and all(isinstance(name, str) for name in own) and tuple(own) != names:
            raise WeightingError(
                f"router {type(weights).__name__} is for experts {tuple(own)}, but the pool has {names}, in this order; "
                "make the router for this pool, or swap() to pool.subset(router.experts)"
            )
        return Plan(stacks(names), _Routed(weights, names))
    with torch.inference_mode(False):
        values_BTLE = weights.values_BTLE
        if not values_BTLE.requires_grad:
            # the caller may go on to change or to reuse the tensor
            values_BTLE = values_BTLE.detach().clone()
        used_E = (values_BTLE != 0).flatten(0, 2).any(dim=0) | values_BTLE.requires_grad
        active = tuple(name for name, used in zip(weights.experts, used_E.tolist(), strict=True) if used)
        mixture = MixtureWeights(values_BTLE[..., used_E], active, weights.layers)
    return Plan(stacks(active) if active else None, _Fixed(mixture))


def _aligned(mixture: MixtureWeights, pool: ExpertPool) -> MixtureWeights:
    if len(set(mixture.experts)) != len(mixture.experts):
        raise WeightingError(f"the mixture names an expert twice: {', '.join(map(repr, mixture.experts))}")
    for name in mixture.experts:
        if name not in pool.adapters:
            raise UnknownExpert(f"no expert {name!r} in the pool; it has {', '.join(map(repr, pool.names))}")
    place = {name: index for index, name in enumerate(pool.names)}
    known = set(pool.layer_names)
    for index, layer in enumerate(mixture.layers):
        if layer not in known and bool((mixture.values_BTLE[:, :, index] != 0).any()):
            raise WeightingError(f"the mixture gives weights to layer {layer!r}, which no expert of the pool updates")
    # in the order of the pool, so that one set of experts is one set, and gives the same bits, however it was named
    order = sorted(range(len(mixture.experts)), key=lambda index: place[mixture.experts[index]])
    return MixtureWeights(mixture.values_BTLE[..., order], tuple(mixture.experts[index] for index in order), mixture.layers)
