"""Weights that vary by token, learn, or come from a router: a layer's experts in one stack, weighted in every call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraweave.composer.live.call import CallRouter, in_own_precision
from loraweave.composer.live.kernels._parts import Kernel, TokenWorkload, kernels_with
from loraweave.composer.live.kernels.dense import Dense, Made, Stack, by_input
from loraweave.composer.live.pages import PlacedFactors
from loraweave.composer.live.residents import Lease
from loraweave.composer.live.row_weights import AffineTable, LayerMixture, require_multiple
from loraweave.composer.model.layers import TargetLayer
from loraweave.errors import ScopeError, WeightingError
from loraweave.routers.combined import Valued, needs_call, num_rows_of, parts_of
from loraweave.routers.invoked import Invoked
from loraweave.routers.weights import AlongDirections, MixtureWeights, Router

# the experts per token at which a kernel must be faster than `Dense` for a router not to share its product with x a^T
SOME_CHOSEN = 2


@dataclass(eq=False)
class _LayerStack:
    """The experts of one layer: the names of those with factors, and their indices place_P, None if all have factors.

    Their factors are stacked at the first use.
    """

    device: torch.device
    dtype: torch.dtype
    experts: tuple[str, ...]
    place_P: Tensor | None
    num_ranks: int
    table: AffineTable | None
    stack: Stack | None = None
    # a_SI, whose memory it shares, with a router's directions below
    joint_QI: Tensor | None = None
    directions_PI: Tensor | None = None
    version: int = 0
    # the stack with V b instead of b, and the tensor V and its version that it was made from
    turned: Stack | None = None
    turned_by: tuple[Tensor, int] | None = None

    def of_experts(self, w_BTE: Tensor) -> Tensor:
        """Return w_BTP, the columns of w_BTE that belong to experts with factors in the layer."""
        return w_BTE if self.place_P is None else w_BTE[..., self.place_P]

    def joined(self, stack: Stack, v_PI: Tensor) -> Tensor:
        """Return joint_QI: the stack's a_SI, and the router's directions v_PI below it, made again if v_PI has changed."""
        if self.joint_QI is None or self.directions_PI is not v_PI or self.version != v_PI._version:
            with torch.inference_mode(False), torch.no_grad():
                self.joint_QI = by_input(torch.cat([stack.a_SI, v_PI]))
                self.stack = replace(stack, a_SI=self.joint_QI[: self.num_ranks])
            self.directions_PI, self.version = v_PI, v_PI._version
        return self.joint_QI

    def turned_stack(self, stack: Stack, v_OO: Tensor) -> Stack:
        """Return the stack with V b_e as each expert's b; computed again if V changed, and in every call while V learns."""
        if v_OO.requires_grad and torch.is_grad_enabled():
            return replace(stack, b_SO=stack.b_SO @ v_OO.to(stack.b_SO).T)
        known_OO, version = self.turned_by or (None, 0)
        if self.turned is None or known_OO is not v_OO or version != v_OO._version:
            with torch.inference_mode(False), torch.no_grad():
                self.turned = replace(stack, b_SO=stack.b_SO @ v_OO.detach().to(stack.b_SO).T)
            self.turned_by = v_OO, v_OO._version
        return self.turned

    @property
    def num_bytes(self) -> int:
        extra = 0 if self.directions_PI is None else self.directions_PI.nbytes
        extra += 0 if self.turned is None else self.turned.b_SO.nbytes
        return extra + (0 if self.stack is None else self.stack.num_bytes)


@dataclass(eq=False)
class _Known:
    """A cache for one w_BTP: tensors `made` from it, nonzero weights per token (`chosen`), and if it was used (`met`)."""

    w_BTP: Tensor | None = None
    made: Made | None = None
    chosen: float | None = None
    met: bool = False


@dataclass(eq=False, repr=False)
class TokenWeights:
    """The experts' weights by token: `weights(x_BTI, layer)` returns w_BTE, where B and T may be 1."""

    _experts: tuple[str, ...]
    weights: Callable[[Tensor, str], Tensor]
    # the layers with a weight that is not 0, or learns; None for all
    _only: frozenset[str] | None
    num_mixtures: int = 1
    num_tokens: int = 1
    learns: bool = True
    is_routed: bool = False
    call_router: CallRouter | None = None
    # blocks whose input the router looks at
    watched: tuple[str, ...] = ()
    _made_of: tuple[Any, ...] = ()
    _along: AlongDirections | None = None
    _valued: Valued | None = None
    _layers: dict[str, _LayerStack] = field(default_factory=dict)
    _sent: dict[str, Tensor] = field(default_factory=dict)
    _given: dict[str, _Known] = field(default_factory=dict)
    _shared: _Known | None = None
    # weights by token use no kernel by row
    only: ClassVar[str | None] = None

    @classmethod
    def fixed(cls, mixture: MixtureWeights) -> TokenWeights:
        """Make the weights of a mixture that varies by token or learns."""
        learning = mixture.values_BTLE.requires_grad
        used_L = (mixture.values_BTLE != 0).any(dim=3).flatten(0, 1).any(dim=0).tolist()
        only = frozenset(layer for layer, used in zip(mixture.layers, used_L, strict=False) if used or learning)
        num_mixtures, num_tokens = mixture.values_BTLE.shape[:2]
        return cls(mixture.experts, mixture.weights, only if mixture.layers else None, num_mixtures, num_tokens, learning)

    @classmethod
    def routed(
        cls, router: Router, experts: tuple[str, ...], invocations: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    ) -> TokenWeights:
        """Make the weights that a router computes from each layer's input; `invocations` are {expert: invocation tokens}."""
        wrapped: Any = in_own_precision(router)
        if invocations:
            wrapped = Invoked(wrapped, experts, invocations)
        call_router = CallRouter(wrapped, type(router).__name__) if needs_call(wrapped) else None
        weigh = (call_router or wrapped).weights

        def weights(x_BTI: Tensor, layer: str) -> Tensor:
            w_BTE = weigh(x_BTI, layer)
            _require_experts(w_BTE, router, layer, len(experts))
            return w_BTE

        routed = cls(experts, weights, None, num_rows_of(router))
        routed.is_routed, routed.call_router, routed._made_of = True, call_router, (router, experts, invocations)
        if call_router is None and isinstance(router, AlongDirections):
            routed._along = router
        for part in parts_of(router):
            if isinstance(part, Valued) and part.values:
                routed._valued = _alone(part, router)
        routed.watched = tuple(path for part in parts_of(router) for path in getattr(part, "watched", ()))
        return routed

    def again(self) -> TokenWeights:
        """Return the same weights with fresh state for the router's calls; both share the stacks."""
        other = TokenWeights.routed(*self._made_of)
        other._layers = self._layers
        return other

    @property
    def num_bytes(self) -> int:
        """The bytes that the stacks made so far keep."""
        return sum(layer_stack.num_bytes for layer_stack in list(self._layers.values()))

    def escaped(self) -> None:
        """Do nothing: a graph of autograd may keep the stacks, since their memory is not reused."""

    def skips(self, layer: str) -> bool:
        return self._only is not None and layer not in self._only

    def mixture(
        self, layer: TargetLayer, x_BTI: Tensor, device: torch.device, dtype: torch.dtype, lease: Lease
    ) -> LayerMixture:
        """Return the product and the affine part that a layer adds to its output for this input.

        Raises ScopeError, naming the layer and both counts, if rows or tokens do not match the weights.
        """
        layer_stack = self._stack(layer.name, device, dtype, lease)
        w_BTE, hidden_NS = self._weigh(layer, x_BTI, layer_stack, lease)
        affine = None if layer_stack.table is None else layer_stack.table.weigh(w_BTE)
        if not layer_stack.experts:
            return LayerMixture(None, affine, w_BTE)
        w_BTP = layer_stack.of_experts(w_BTE)
        known = self._known_of(layer.name, w_BTP)
        # a copy of some experts' weights is a new tensor, so it cannot be known
        again, known.met = known.met and w_BTP is w_BTE, True
        if hidden_NS is None and self._valued is None and (kernel := _sparse(layer_stack, layer, w_BTP, known, x_BTI)):
            return LayerMixture(kernel(_parts(layer_stack, layer, lease), w_BTP, dtype), affine, w_BTE, again=again)
        stack = self._side_by_side(layer_stack, layer, lease)
        return LayerMixture(Dense(stack, w_BTP, hidden_NS, known.made), affine, w_BTE, again=again)

    def at_tokens(
        self, layer: TargetLayer, x_NI: Tensor, token_N: Tensor, num_tokens: int, dtype: torch.dtype, lease: Lease
    ) -> tuple[Kernel | None, Tensor]:
        """Return (kernel or None, w_1NE or w_11E) of `layer`, a fused MoE expert of the base, for N of the call's tokens.

        The kernel is None if no adapter has factors there. `token_N` are the tokens' indices among the call's `num_tokens`,
        row by row; a router sees each token as a row. Raises ScopeError if rows or tokens do not match the weights.
        """
        layer_stack = self._stack(layer.name, x_NI.device, dtype, lease)
        if self.is_routed and self.num_mixtures == 1:
            w_N1E = self._weights(x_NI[:, None], x_NI[:, None], layer.name, layer_stack)
            w_1NE = w_N1E.expand(len(x_NI), -1, -1).transpose(0, 1)
        else:
            # the weights of all tokens, by place: fixed weights depend on the sizes of the input alone
            rows, rest = divmod(num_tokens, self.num_tokens)
            places = x_NI.new_empty(0).expand(num_tokens if rest else rows, 1 if rest else self.num_tokens, 0)
            w_BTE = self._weights(places, places, layer.name, layer_stack)
            w_1NE = w_BTE
            if w_BTE.shape[0] > 1 or w_BTE.shape[1] > 1:
                row_N, place_N = token_N // places.shape[1], token_N % places.shape[1]
                row_N = row_N // (places.shape[0] // w_BTE.shape[0])
                w_1NE = w_BTE[row_N, place_N if w_BTE.shape[1] > 1 else 0][None]
        if not layer_stack.experts:
            return None, w_1NE
        w_1NP = layer_stack.of_experts(w_1NE)
        if len(x_NI) and self._valued is None and (kernel := _sparse(layer_stack, layer, w_1NP, _Known(), x_NI[None])):
            return kernel(_parts(layer_stack, layer, lease), w_1NP, dtype), w_1NE
        return Dense(self._side_by_side(layer_stack, layer, lease), w_1NP), w_1NE

    def _known_of(self, layer: str, w_BTP: Tensor) -> _Known:
        """Return the cache for w_BTP: one a layer if weights are fixed, one a call if layers share a router's; else new."""
        if not self.learns:
            return self._given.setdefault(layer, _Known())
        # weights that need gradients need a graph of their own in each layer
        if self.call_router is None or w_BTP.requires_grad or not self.call_router.shares_weights:
            return _Known()
        shared = self._shared
        if shared is None or shared.w_BTP is not w_BTP:
            shared = self._shared = _Known(w_BTP, {})
        return shared

    def projected(
        self, layer: TargetLayer, x: Tensor, y_BTO: Tensor, device: torch.device, dtype: torch.dtype, lease: Lease
    ) -> tuple[Tensor, Tensor]:
        """Return (update to add to y, w_BTE) for an embedding or a convolution, whose hidden values are not x @ a^T.

        The update is (B, T, O), in fp32 or better if an expert has a gain or a bias. Raises ScopeError if B or T do not fit.
        """
        layer_stack = self._stack(layer.name, device, dtype, lease)
        like = y_BTO.new_empty(0, dtype=dtype)
        w_BTE = self._weights(
            layer.kind.inputs(layer.module, x, like) if self.is_routed else y_BTO, y_BTO, layer.name, layer_stack
        )
        update_BTO = torch.zeros((), device=device, dtype=dtype)
        if layer_stack.experts:
            stack = self._side_by_side(layer_stack, layer, lease)
            hidden_BTS = layer.kind.project(layer.module, x, stack.a_SI)
            hidden_BTS = hidden_BTS.reshape(*y_BTO.shape[:2], hidden_BTS.shape[2])
            update_BTO = Dense(stack, layer_stack.of_experts(w_BTE)).expanded(hidden_BTS)
        if layer_stack.table is not None:
            update_BTO = update_BTO + layer_stack.table.weigh(w_BTE).on(y_BTO, layer.parameter("bias"))
        return update_BTO, w_BTE

    def _weigh(self, layer: TargetLayer, x_BTI: Tensor, found: _LayerStack, lease: Lease) -> tuple[Tensor, Tensor | None]:
        """Return w_BTE, and x a^T as (N, S) if one product computes it with the router's projections, else None.

        They are computed apart if gradients go through the router, or if one product would be less exact than the router's
        own.
        """
        if self._along is not None and found.experts and _sparse_kernel(found, layer, x_BTI, SOME_CHOSEN) is None:
            v_PI = self._along.directions(layer.name)
            learns = torch.is_grad_enabled() and (x_BTI.requires_grad or v_PI.requires_grad)
            matches = v_PI.dtype is found.dtype is x_BTI.dtype and v_PI.device == found.device and not v_PI.is_inference()
            if matches and not learns and not torch._C._is_any_autocast_enabled():
                joint_QI = found.joined(self._side_by_side(found, layer, lease), v_PI)
                both_BTQ = linear(x_BTI, joint_QI)
                z_BTP = both_BTQ[..., found.num_ranks :]
                w_BTE = self._along.weights_along(z_BTP, x_BTI, layer.name)
                _require_experts(w_BTE, self._along, layer.name, len(self._experts))
                _require_fit(w_BTE, x_BTI, layer.name)
                return w_BTE.to(found.device, found.dtype), both_BTQ[..., : found.num_ranks].flatten(0, 1)
        return self._weights(x_BTI, x_BTI, layer.name, found), None

    def _weights(self, x_BTI: Tensor, rows: Tensor, layer: str, found: _LayerStack) -> Tensor:
        exact = torch.promote_types(found.dtype, torch.float32)
        if self.learns:
            w_BTE = self.weights(x_BTI, layer).to(found.device, exact)
        elif (sent_BTE := self._sent.get(layer)) is not None and (sent_BTE.device, sent_BTE.dtype) == (found.device, exact):
            w_BTE = sent_BTE
        else:
            # sent to the device once, and as ordinary tensors even below inference_mode
            with torch.inference_mode(False), torch.no_grad():
                w_BTE = self._sent[layer] = self.weights(x_BTI, layer).to(found.device, exact)
        _require_fit(w_BTE, rows, layer)
        return w_BTE

    def _stack(self, layer: str, device: torch.device, dtype: torch.dtype, lease: Lease) -> _LayerStack:
        layer_stack = self._layers.get(layer)
        if layer_stack is not None and layer_stack.device == device and layer_stack.dtype == dtype:
            return layer_stack
        with torch.inference_mode(False), torch.no_grad():
            placed = [lease.part(name, layer, device, dtype) for name in self._experts]
            with_rank = {index: part for index, part in enumerate(placed) if part is not None and part.a_RI.shape[0]}
            place_P = None if len(with_rank) == len(placed) else torch.tensor(list(with_rank), device=device)
            experts = tuple([self._experts[index] for index in with_rank])
            num_ranks = sum([part.a_RI.shape[0] for part in with_rank.values()])
            layer_stack = _LayerStack(device, dtype, experts, place_P, num_ranks, AffineTable.of(placed))
        self._layers[layer] = layer_stack
        return layer_stack

    def _side_by_side(self, found: _LayerStack, layer: TargetLayer, lease: Lease) -> Stack:
        if found.stack is None:
            with torch.inference_mode(False), torch.no_grad():
                found.stack = Stack.of(_parts(found, layer, lease), found.dtype)
        v_OO = None if self._valued is None else self._valued.value_matrix(layer.name)
        return found.stack if v_OO is None else found.turned_stack(found.stack, v_OO)


def _alone(part: Valued, router: Router) -> Valued:
    """Return `part` if it is the whole router; else raise ScopeError, since the outer router would ignore its matrix V."""
    if part is not router:
        raise ScopeError(
            f"router {type(part).__name__} multiplies what its mixture adds by a matrix of its own, so it cannot be a part "
            f"of {type(router).__name__}: activate it by itself, for all rows and its own pool, or make it with values=False"
        )
    return part


def _parts(found: _LayerStack, layer: TargetLayer, lease: Lease) -> list[PlacedFactors]:
    parts = [lease.part(name, layer.name, found.device, found.dtype) for name in found.experts]
    return [PlacedFactors(part.b_RO, part.a_RI) if layer.turned else part for part in parts if part is not None]


def _sparse(found: _LayerStack, layer: TargetLayer, w_BTP: Tensor, known: _Known, x_BTI: Tensor) -> Any:
    """Return the kernel class for weights that are mostly 0, or None; on a CPU only, since the weights are read."""
    if w_BTP.requires_grad or not w_BTP.numel() or _sparse_kernel(found, layer, x_BTI, 1) is None:
        # reading the weights cannot pay if a sparse kernel is slower even with one expert a token
        return None
    if known.chosen is None:
        known.chosen = int(torch.count_nonzero(w_BTP)) / (w_BTP.shape[0] * w_BTP.shape[1])
    return _sparse_kernel(found, layer, x_BTI, known.chosen)


def _sparse_kernel(found: _LayerStack, layer: TargetLayer, x_BTI: Tensor, chosen: float) -> Any:
    """Return the kernel class that is fastest for tokens with `chosen` experts each, None if `Dense` is."""
    if found.device.type != "cpu":
        return None
    num_tokens = x_BTI.shape[0] * x_BTI.shape[1]
    sizes = (len(found.experts), found.num_ranks, layer.num_inputs, layer.num_outputs, found.dtype.itemsize)
    return _cheaper(TokenWorkload(num_tokens, int(chosen * num_tokens), *sizes))


@lru_cache(maxsize=1024)
def _cheaper(work: TokenWorkload) -> Any:
    """Return the kernel class that takes least time if it is faster than `Dense`, all experts for all tokens; else None."""
    seconds = {kernel: kernel.token_seconds(work) for kernel in kernels_with("token_seconds").values()}
    best = min(seconds, key=seconds.__getitem__, default=None)
    return best if best is not None and seconds[best] < work.rates.seconds(Dense.token_cost(work)) else None


def _require_experts(w_BTE: Tensor, router: object, layer: str, num_experts: int) -> None:
    if not isinstance(w_BTE, Tensor) or w_BTE.ndim != 3 or w_BTE.shape[2] != num_experts:
        description = tuple(getattr(w_BTE, "shape", ())) or type(w_BTE).__name__
        raise WeightingError(
            f"router {type(router).__name__} gave {description} for layer {layer!r}; expected w_BTE with the {num_experts} "
            "experts of the pool on its last axis"
        )


def _require_fit(w_BTE: Tensor, x_BTI: Tensor, layer: str) -> None:
    num_rows, num_tokens = x_BTI.shape[:2]
    if w_BTE.shape[1] not in (1, num_tokens):
        raise ScopeError(
            f"the weights have {w_BTE.shape[1]} tokens, but the input of layer {layer!r} has {num_tokens}; give weights for "
            "exactly the tokens of this call, or activate() a router, which computes them from the input"
        )
    require_multiple(w_BTE.shape[0], num_rows, f"input of layer {layer!r}")


@dataclass(eq=False)
class MadeWeights:
    """A check that the weights computed during one activation, by a router or from parameters, are finite.

    Weights on a GPU are checked only in `require_all`, so that no layer waits for the device: until then the sum of 0 * w is
    kept there, which is NaN as soon as one weight is NaN or infinite.
    """

    _experts: tuple[str, ...]
    _zeros: dict[str, Tensor] = field(default_factory=dict)

    def require_finite(self, layer: str, w_BTE: Tensor) -> None:
        """Raise WeightingError for a weight on the CPU that is not finite; weights elsewhere are noted for `require_all`."""
        if torch._C._are_functorch_transforms_active() or w_BTE.is_meta:
            return
        w_BTE = w_BTE.detach()
        if w_BTE.device.type != "cpu":
            zero = (w_BTE * 0).sum()
            known = self._zeros.get(layer)
            self._zeros[layer] = zero if known is None or known.device != zero.device else known + zero
        # the sum of finite weights is finite unless it overflows, and takes one pass
        elif not math.isfinite(w_BTE.sum().item()) and not bool(w_BTE.isfinite().all()):
            expert = int((~w_BTE.isfinite()).flatten(0, 1).any(dim=0).int().argmax())
            raise WeightingError(self._message(layer, f", first for expert {self._experts[expert]!r}"))

    def require_all(self) -> None:
        """Raise WeightingError for noted weights that are not finite, and clear the notes; waits for their devices."""
        zeros, self._zeros = self._zeros, {}
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for layer, zero in zeros.items():
            by_device.setdefault(zero.device, {})[layer] = zero
        for zero_by_layer in by_device.values():
            sound = torch.stack([zero.float() for zero in zero_by_layer.values()]).isfinite().tolist()
            for layer, finite in zip(zero_by_layer, sound, strict=True):
                if not finite:
                    raise WeightingError(self._message(layer, ""))

    @staticmethod
    def _message(layer: str, where: str) -> str:
        return (
            f"the weights that were made for layer {layer!r} are not finite{where}: look at the router's parameters, or "
            "lower the rate at which the weights learn"
        )
