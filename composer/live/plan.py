"""The plan of one activation: which experts each layer's output gets, with which weight for which row.

    KeptPlans.plan(weights) -> Plan, of the last few activations
      |- RowWeights     weights known before the call, one set a row: each layer's kernel is made once (row_weights.py)
      '- TokenWeights   weights by token, of a router, or that learn: weighed again in every call (token_weights.py)

    Plan.apply(layer, x, y)
      warm   this layer has met an x of this shape, and nothing learns -> the kernel remembered, which adds into y's memory
      cold   _general: x_BTI -> LayerMixture(kernel, affine) -> _sum, the equation; maybe remembered
      other  _projected: an embedding or a convolution, whose hidden values are no product of x with a matrix

`_sum` with `kernels/naive.py` is the naive twin of the warm path (`tests/composer/live/test_plan.py` holds both to the
formula), and TokenWeights is the naive twin of RowWeights, since it accepts the same weights.

Axes: B rows, T tokens, I inputs, O outputs, E experts, R rank rows of one expert, S of all experts.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import compress
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraweave.common.checks import is_list
from loraweave.composer.live.call import CALL, can_be_batch, require_batch_first, require_own_rows, require_rows_of_tokens
from loraweave.composer.live.hook import Activate, LiveHook, Resolve, hook_kinds
from loraweave.composer.live.kernels._parts import ONLY, Adder, block_of
from loraweave.composer.live.recording import STATE, Note, Usage
from loraweave.composer.live.residents import Lease
from loraweave.composer.live.row_weights import LayerMixture, RowWeights, Workspace, require_multiple
from loraweave.composer.live.token_weights import TokenWeights
from loraweave.composer.model.kinds import by_row, conv, linear
from loraweave.composer.model.layers import TargetLayer, is_floating
from loraweave.errors import CompositionError, ScopeError, WeightingError
from loraweave.hub.base import Parts
from loraweave.hub.pool import ExpertPool
from loraweave.routers.weights import MixtureWeights, Router

# returns {expert: invocation tokens} for those of the named experts that have invocation tokens
Invocations = Callable[[Iterable[str]], Mapping[str, tuple[int, ...]]]

# the most shapes of a layer's input for which the kernel is remembered
NUM_KEPT_SHAPES = 64


class Warm(NamedTuple):
    """The remembered kernel of a layer for inputs of one shape: its adder, dtype and device, and the note of its calls."""

    add: Adder
    dtype: torch.dtype
    device: torch.device
    note: Note

    def fits(self, x: Tensor, y: Tensor) -> bool:
        """Return True if the adder may write into y, the layer's new output: no gradient goes through it.

        x is on the device of y, or the layer would have failed.
        """
        matches = x.dtype is y.dtype is self.dtype and y.device == self.device
        return matches and not y.requires_grad and y.is_contiguous()


class Plan:
    """The active experts' names and weights; kernels made for a layer are kept for the next call.

    `mixture` has the active experts' weights, or is None if each call makes them, from its input or from learned parameters.
    `weights` are those for layers that are matrix products; other layers take the same weights by token. `invocations` are
    {expert: invocation tokens} of the active experts that have any.
    """

    def __init__(
        self,
        experts: tuple[str, ...],
        mixture: MixtureWeights | None,
        weights: RowWeights | TokenWeights,
        invocations: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> None:
        self.experts = experts
        self.mixture = mixture
        self.invocations = invocations
        self._weights = weights
        # whether gradients may reach more than the layers' inputs: weights that learn, or a router's parameters
        self.learns = weights.learns
        # whether weights differ between rows or tokens
        self._by_place = weights.num_mixtures > 1 or weights.num_tokens > 1 or bool(invocations)
        # the paths of the model's blocks whose input the router reads
        self.watched: tuple[str, ...] = weights.watched
        # the mixture's rows; 1 where all rows of a batch share one mixture, or a router weighs each row
        self.num_mixtures = weights.num_mixtures
        # the name of the only kernel that may run, if any
        self.only = weights.only
        # the router, if it must see each call of the model first
        self.call_router = weights.call_router
        # the device of the last call, and whether a hook may have something for calls there
        self._device: torch.device | None = None
        self._is_hooked = False
        # the mixtures of a pipeline part's calls, where these differ
        self.by_call: Any = None
        # the kernels remembered with a hook's prepared state if there is one, else with the plan
        self._remembered = self._own = dict[str, dict[torch.Size, Warm]]()

    @cached_property
    def _by_token(self) -> TokenWeights:
        """The plan's weights as `TokenWeights`, for layers that are not a matrix product (embeddings, convolutions)."""
        if isinstance(self._weights, TokenWeights):
            return self._weights
        assert self.mixture is not None
        return TokenWeights.fixed(self.mixture)

    @property
    def num_bytes(self) -> int:
        """The bytes of the tensors made for the layers so far."""
        by_token = vars(self).get("_by_token", self._weights)
        return self._weights.num_bytes + (by_token.num_bytes if by_token is not self._weights else 0)

    def enter(self, lease: Lease, layers: Mapping[str, TargetLayer]) -> None:
        """Begin an activation of the plan, which ends with its lease; `layers` are {path: target layer}."""
        if isinstance(self._weights, RowWeights) and self._weights.enter(lease, layers):
            # the remembered kernels may be those of released state
            self._remembered = self._own

    def begin_call(self, main_input: Tensor | None) -> None:
        """Begin a call of the model; `main_input` is the tensor whose first axis is the batch, None if unknown.

        Raises ScopeError if the batch's rows are not a multiple of the mixture's.
        """
        if main_input is None:
            return
        if not self.num_mixtures or main_input.shape[0] % self.num_mixtures:
            require_multiple(self.num_mixtures, main_input.shape[0], "batch")
        if main_input.device != self._device:
            self._device, self._remembered = main_input.device, self._own
            self._is_hooked = isinstance(self._weights, RowWeights) and self._weights.find_serving(self._device)
        if self._is_hooked and isinstance(self._weights, RowWeights):
            prepared = self._weights.begin_call()
            self._remembered = self._own if prepared is None else prepared.remembered

    def reaches(self, layer: str, lease: Lease) -> bool:
        """Return True if an active expert updates the layer, unless all weights there are known to be zero."""
        if self._weights.skips(layer):
            return False
        return any(layer in lease.layers_of(name) for name in self.experts)

    def at_tokens(
        self, layer: TargetLayer, x_NI: Tensor, token_N: Tensor, num_tokens: int, lease: Lease, usage: Usage
    ) -> Tensor | None:
        """Return update_NO, or None, of `layer`, a fused MoE expert of the base, for inputs x_NI of the tokens `token_N`.

        `num_tokens` is the number of the call's tokens, which are indexed row by row. Raises ScopeError if rows or tokens do
        not match the weights, and inside the block of a single kernel.
        """
        if not self.reaches(layer.name, lease):
            return None
        if self.only is not None:
            raise ScopeError(
                f"layer {layer.name!r} is an expert of a fused parameter, whose tokens are of all rows at once: leave "
                f"{block_of(self.only)} out, or take adapters without it"
            )
        if self._by_place:
            require_rows_of_tokens(layer.name, num_tokens, self._weights.num_tokens)
        weight = layer.parameter("weight")
        assert weight is not None
        kernel, w_1NE = self._by_token.at_tokens(layer, x_NI, token_N, num_tokens, weight.dtype, lease)
        shape = torch.Size((1, len(x_NI), layer.num_inputs if layer.turned else layer.num_outputs))
        usage.saw(layer.name, Note(shape, None if kernel is None else type(kernel), w_1NE), w_1NE)
        return None if kernel is None else kernel.update(x_NI[None].to(kernel.dtype))[0]

    def again(self) -> Plan:
        """Return the plan for another activation, with its stacks of experts, but without state from earlier calls."""
        if not self.invocations:
            return self
        routed = self._by_token.again()
        return Plan(self.experts, None, routed, self.invocations)

    def with_calls(self, by_call: Any) -> Plan:
        """Return a copy of the plan with `by_call`, which finds each call's mixture; it shares the weights by token."""
        plan = copy.copy(self)
        plan.by_call, plan._by_token = by_call, self._by_token
        return plan

    def apply(self, layer: TargetLayer, x: Tensor, y: Tensor, lease: Lease, usage: Usage) -> Tensor:
        """Return the layer's output y = W x + bias with the weighted updates added; y itself if there are none.

        The rows of x are its first axis. With weights for B rows and an x of B * k rows, each weight serves k consecutive
        rows, as beams and return sequences are laid out; an x of two axes (N, I) holds its tokens row by row, so the same
        holds. The result may be written into y's own memory. Raises ScopeError, naming the layer and both counts, if the
        rows are not such a multiple.
        """
        by_shape = self._remembered.get(layer.name)
        warm = by_shape.get(x.shape) if by_shape and layer.fresh else None
        if warm is not None and warm.fits(x, y) and not CALL.get().beside:
            # the short form of `usage.saw`, which saves a Python call for each layer
            usage.notes[layer.name] = warm.note
            if STATE.get() is not usage.quiet:
                usage.tell(layer.name, warm.note)
            warm.add(x, y)
            return y
        if not self.experts or self._weights.skips(layer.name):
            usage.saw(layer.name, Note(y.shape))
            return y
        return self._general(layer, x, y, lease, usage)

    def _general(self, layer: TargetLayer, x: Tensor, y: Tensor, lease: Lease, usage: Usage) -> Tensor:
        weight = layer.parameter("weight")
        dtype = weight.dtype if weight is not None and is_floating(weight.dtype) else y.dtype
        if layer.kind is not linear:
            return self._projected(layer, x.to(y.device), y, dtype, lease, usage)
        if self._by_place and x.shape[0] != CALL.get().num_rows:
            require_own_rows(layer.name, x.shape[0])
            require_batch_first(layer.name, x.shape)
        x_BTI = by_row(x.to(y.device))
        if self._weights.num_tokens > 1:
            x_BTI = _by_token(x_BTI, self._weights.num_tokens, x.ndim)
        mixture = self._weights.mixture(layer, x_BTI, y.device, dtype, lease)
        kernel, affine = mixture.kernel, mixture.affine
        # for some rows of a batch, a kernel is within another
        note = Note(y.shape, None if kernel is None else type(getattr(kernel, "kernel", kernel)))
        usage.saw(layer.name, note, mixture.w_BTE, again=mixture.again)
        if kernel is not None and affine is None and x.ndim == 3 and layer.fresh and mixture.w_BTE is None and mixture.lasts:
            add = kernel.adder(dtype, x.shape)
            by_shape = self._remembered.setdefault(layer.name, {})
            if len(by_shape) >= NUM_KEPT_SHAPES:
                by_shape.clear()
            by_shape[x.shape] = warm = Warm(add, dtype, y.device, note)
            if warm.fits(x, y):
                add(x, y)
                return y
        if torch.is_grad_enabled() and x.requires_grad:
            self._weights.escaped()
        # no view where none is needed: a view with a gradient could not be changed in place
        y_BTO = y if y.shape[:-1] == x_BTI.shape[:2] else y.reshape(*x_BTI.shape[:2], layer.num_outputs)
        return _sum(mixture, layer, x_BTI, y_BTO).reshape(y.shape)

    def _projected(self, layer: TargetLayer, x: Tensor, y: Tensor, dtype: torch.dtype, lease: Lease, usage: Usage) -> Tensor:
        if self.only is not None:
            block = block_of(self.only)
            raise ScopeError(
                f"layer {layer.name!r} is not a matrix product, and {block} does not know its update: take adapters "
                f"without it, or leave {block} out"
            )
        if self._by_place and layer.kind is not conv:
            require_batch_first(layer.name, y.shape)
        y_BTO = _by_token(layer.kind.rows(layer.module, y), self._weights.num_tokens, y.ndim)
        if self._by_place:
            require_own_rows(layer.name, y_BTO.shape[0])
        update_BTO, w_BTE = self._by_token.projected(layer, x, y_BTO, y.device, dtype, lease)
        usage.saw(layer.name, Note(y.shape), w_BTE)
        return layer.kind.put_back(y_BTO + update_BTO.to(y.dtype), y)


def _sum(mixture: LayerMixture, layer: TargetLayer, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
    """Return y + ((x a^T) * w) b^T + sum over e of w_e (gain_e y0 + bias_e), as (B, T, O) in the dtype of y."""
    kernel, affine = mixture.kernel, mixture.affine
    if kernel is None:
        return y_BTO if affine is None else y_BTO + affine.on(y_BTO, layer.parameter("bias")).to(y_BTO.dtype)
    x_BTI = x_BTI.to(kernel.dtype)
    if affine is not None:
        return y_BTO + (affine.on(y_BTO, layer.parameter("bias")) + kernel.update(x_BTI)).to(y_BTO.dtype)
    if layer.fresh:
        return kernel.plus(x_BTI, y_BTO)
    # into the update's own memory, which nothing else refers to, rather than a third tensor of this size
    return kernel.update(x_BTI).to(y_BTO.dtype).add_(y_BTO)


def _by_token(x_BTI: Tensor, num_tokens: int, num_axes: int) -> Tensor:
    """Return x_BTI; if x had two axes, split into rows of `num_tokens` tokens where that can give the batch's rows."""
    num_rows, rest = divmod(x_BTI.shape[0], num_tokens)
    if num_axes == 2 and num_tokens > 1 and not rest and can_be_batch(num_rows):
        return x_BTI.reshape(num_rows, num_tokens, x_BTI.shape[2])
    return x_BTI


def make_plan(
    weights: MixtureWeights | Router,
    names: tuple[str, ...],
    workspace: Workspace,
    invocations: Invocations = lambda names: {},
    hooks: Sequence[LiveHook] = (),
) -> Plan:
    """Return the plan for resolved weights over a pool of these names; `workspace` has memory for gathered factors.

    Only experts with a weight that is not zero, or that learns, are active; a router may use all of them. Raises
    WeightingError for a router that names other experts, or in another order.
    """
    if not isinstance(weights, MixtureWeights):
        router_experts = getattr(weights, "experts", None)
        if is_list(router_experts, str) and tuple(router_experts) != names:
            raise WeightingError(
                f"router {type(weights).__name__} is for experts {tuple(router_experts)}, but the pool has {names}, in this "
                "order; make the router for this pool, or swap() to pool.subset(router.experts)"
            )
        return _routed_plan(weights, names, invocations(names))
    if weights.values_BTLE.requires_grad:
        # the tensor itself, looked at in each call: an optimizer may change it in between
        if own_invocations := invocations(weights.experts):
            return _routed_plan(weights, weights.experts, own_invocations)
        return Plan(weights.experts, None, TokenWeights.fixed(weights))
    with torch.inference_mode(False):
        # the caller may go on to change or to reuse the tensor
        # with the weights of a layer contiguous, since those of its tokens may be many
        values_LEBT = weights.values_BTLE.detach().permute(2, 3, 0, 1).clone(memory_format=torch.contiguous_format)
        used_E = (values_LEBT != 0).transpose(0, 1).flatten(1).any(dim=1)
        active = tuple(compress(weights.experts, used_E.tolist()))
        mixture = MixtureWeights(values_LEBT[:, used_E].permute(2, 3, 0, 1), active, weights.layers)
    if own_invocations := invocations(active):
        return _routed_plan(mixture, active, own_invocations)
    if mixture.values_BTLE.shape[1] > 1:
        return Plan(active, mixture, TokenWeights.fixed(mixture))
    return Plan(active, mixture, RowWeights(mixture, workspace, hooks, only=ONLY.get()))


def _routed_plan(
    router: MixtureWeights | Router, experts: tuple[str, ...], invocations: Mapping[str, tuple[int, ...]]
) -> Plan:
    """Return the plan for weights computed in each call, by a router or for invocation tokens."""
    return Plan(experts, None, TokenWeights.routed(router, experts, invocations), invocations)


NUM_KEPT = 4
KEPT_BYTES = 2**30
# the most elements of weights that are known again: comparing more takes longer than making them again
LARGEST_KEPT = 2**16


class KeptPlans:
    """A maker of plans that caches the last few plans and released tensors for reuse, up to `max_bytes` of either."""

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._workspace = Workspace(max_bytes)
        self.hooks = tuple([kind(max_bytes) for kind in hook_kinds()])
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()

    def plan(self, weights: MixtureWeights | Router, pool: ExpertPool) -> Plan:
        """Return the plan for these weights over this pool; a plan kept for equal weights is reused with its kernels."""
        key = _identity(weights)
        kept = None if key is None else self._plans.pop(key, None)
        plan = kept.again() if kept else make_plan(weights, pool.names, self._workspace, pool.invocations, self.hooks)
        if key is None:
            return plan
        self._plans[key] = plan
        self._trim(least=1)
        return plan

    def _trim(self, least: int) -> None:
        plans = self._plans.values()
        while len(plans) > NUM_KEPT or (len(plans) > least and sum(made.num_bytes for made in plans) > self._max_bytes):
            self._plans.popitem(last=False)

    def keep(self, max_bytes: int) -> bool:
        """Keep at most `max_bytes` of plans, and as many of released tensors, from now on; return True if a plan went."""
        self._max_bytes = self._workspace.max_bytes = max_bytes
        num_plans = len(self._plans)
        self._trim(least=0)
        self._workspace.give(())
        return len(self._plans) < num_plans

    def calls(self, model: Parts, mixture: Any, resolve: Resolve, activate: Activate) -> tuple[MixtureWeights | Router, Any]:
        """Return an activation's weights for a pipeline, and the function that finds each call's mixture; None for one.

        Raises CompositionError for a pipeline without a hook that knows its calls.
        """
        for hook in self.hooks:
            if (calls := hook.calls(model, mixture, resolve, activate)) is not None:
                return calls
        raise CompositionError(
            "a pipeline calls several models, and no hook that is installed knows its calls: pass one of its models"
        )

    def forget(self, name: str) -> None:
        """Drop all kept plans, and the hooks' data of an expert; plans in use stay until their activations end."""
        self.clear()
        for hook in self.hooks:
            hook.forget(name)

    def clear(self) -> None:
        """Drop all kept plans; those in use stay until their activations end."""
        self._plans.clear()


def _identity(weights: MixtureWeights | Router) -> Hashable | None:
    """Return a key that equal weights share; None for routers, and for weights that learn or are large."""
    if not isinstance(weights, MixtureWeights) or weights.values_BTLE.requires_grad:
        return None
    values = weights.values_BTLE
    if values.numel() > LARGEST_KEPT or values.device.type != "cpu":
        return None
    known = weights.experts, weights.layers, tuple(values.shape), values.dtype, tuple(values.flatten().tolist())
    return ONLY.get(), *known
