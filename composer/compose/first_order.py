"""How the loss begins to change when an adapter is faded in, for a whole pool from one backward pass.

At any mixture d loss / d w_e = sum over layers of <G, B_e A_e>, with G the loss's gradient by the layer's weight. G is a
sum over tokens of g x^T, so that the product is sum over tokens of (A_e x) . (B_e^T g): the factors meet the layer's input
and the gradient at its output, and neither G nor an update is ever formed. Gain and bias meet sum g * y0 and sum g.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.composer.compose.collect_statistics import GradientTap
from loraweave.composer.composer import Composer
from loraweave.composer.model.batches import batch, mean_losses, untouched
from loraweave.composer.model.kinds import linear
from loraweave.composer.model.layers import TargetLayer
from loraweave.composer.model.scoring import encode_pairs
from loraweave.errors import CompositionError
from loraweave.hub.pool import StackedFactors, require_everywhere
from loraweave.lowrank import algebra
from loraweave.types import Factors, Task


@dataclass(frozen=True)
class LossSlopes:
    """The loss on the examples at a mixture, and each expert's d loss / d weight there."""

    loss: float
    slopes: Mapping[str, float]


def first_order(
    engine: Composer, tokenizer: Any, task: Task, *, mixture: Mapping[str, float] | None = None, batch_size: int = 8
) -> LossSlopes:
    """The slope of the loss for every expert of the engine's pool; the loss is the mean over the task's examples.

    It is taken at a `mixture`, by default at the base model. One forward and one backward pass for each `batch_size`
    examples, whatever the size of the pool. The products run in fp32 or better. The model is left as it was.
    Raises InvalidTask for examples that cannot be encoded, AlreadyActive while another Composer is active, CompositionError
    for a loss that is not finite.
    """
    model, pool = engine.model, engine.bound_pool
    for name in pool.invocations():
        require_everywhere(name, pool[name], "the slope of the loss is that of an expert that counts for every token")
    rows = encode_pairs(model, tokenizer, task, task.examples)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    total = 0.0
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        # also without a mixture: other Composers are kept away from the model meanwhile
        stack.enter_context(engine.activate(mixture or {}))
        # below a caller's inference_mode, tensors would take no part in a backward pass
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if fused := next((name for name, layer in engine.target_layers.items() if layer.number is not None), None):
            raise CompositionError(
                f"layer {fused!r} is an expert of a fused parameter, whose slopes are not known: choose by search instead"
            )
        slopes = [_Slopes(layer, pool.stacked(name), len(pool)) for name, layer in engine.target_layers.items()]
        for layer in slopes:
            stack.callback(layer.target.module.register_forward_hook(layer.saw, with_kwargs=True).remove)
        for start in range(0, len(order), batch_size):
            chunk = batch(model, tokenizer, [rows[index] for index in order[start : start + batch_size]])
            loss = mean_losses(model, chunk).sum() / len(rows)
            total += float(loss.detach())
            if not math.isfinite(total):
                raise CompositionError(
                    f"the loss on the examples is {total}, so nothing can be said of its change; load the model in a wider "
                    "dtype, or look for damaged weights"
                )
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
    slope_E = torch.stack([layer.slope_E.cpu() for layer in slopes]).sum(dim=0)
    return LossSlopes(total, dict(zip(pool.names, slope_E.tolist(), strict=True)))


def update_norm(engine: Composer, name: str) -> float:
    """The Frobenius norm of one expert's whole update: of every layer's b a + diag(gain) W, and its bias."""
    layers = engine.bound_pool[name].layers
    return math.sqrt(math.fsum(_squared_norm(factors, engine.target_layers[layer]) for layer, factors in layers.items()))


class _Slopes:
    """The slopes of one layer, summed up as backward passes go by."""

    def __init__(self, target: TargetLayer, stack: StackedFactors, num_experts: int) -> None:
        self.target = target
        self._kind = target.kind
        parameter = next(target.module.parameters())
        self.slope_E = torch.zeros(num_experts, dtype=torch.float64, device=parameter.device)
        self._stack = stack
        self._placed: dict[torch.dtype, StackedFactors] = {}
        self._wanted = torch.zeros((), device=parameter.device, requires_grad=True)

    def saw(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        return GradientTap.apply(output, self._wanted, x, self.receive)  # type: ignore[no-untyped-call, no-any-return]

    @torch.no_grad()
    def receive(self, gradient: Tensor, x: Tensor) -> None:
        """Adds the products of one call of the layer."""
        g_NO = self._kind.rows(self.target.module, gradient).flatten(0, 1)
        # padding gets no gradient, and neither do tokens that no target looks back to
        touched_N = g_NO.any(dim=1)
        exact = torch.promote_types(gradient.dtype, torch.float32)
        g_NO = g_NO[touched_N].to(exact)
        stack = self._on(g_NO)
        slope_S = (self._project(x, stack.a_SI, touched_N) * (g_NO @ stack.b_OS)).sum(dim=0, dtype=torch.float64)
        self.slope_E.index_add_(0, stack.owner_S, slope_S)
        if stack.gain_EO is not None:
            y_NO = self._project(x, self.target.dense_weight_OI().to(exact), touched_N)
            self.slope_E += stack.gain_EO.double() @ (g_NO * y_NO).sum(dim=0, dtype=torch.float64)
        if stack.bias_EO is not None:
            self.slope_E += stack.bias_EO.double() @ g_NO.sum(dim=0, dtype=torch.float64)

    def _project(self, x: Tensor, rows_SI: Tensor, touched_N: Tensor) -> Tensor:
        """x rows^T of the touched tokens."""
        if self._kind is linear:
            return functional.linear(x.reshape(-1, self.target.num_inputs)[touched_N].to(rows_SI.dtype), rows_SI)
        return self._kind.project(self.target.module, x, rows_SI).flatten(0, 1)[touched_N]

    def _on(self, g_NO: Tensor) -> StackedFactors:
        """The factors where the layer is, in the dtype of the products."""
        if g_NO.dtype not in self._placed:
            device, given = self.slope_E.device, self._stack
            self._placed[g_NO.dtype] = StackedFactors(
                given.a_SI.to(device, g_NO.dtype),
                given.b_OS.to(device, g_NO.dtype),
                given.owner_S.to(device),
                None if given.gain_EO is None else given.gain_EO.to(device),
                None if given.bias_EO is None else given.bias_EO.to(device),
            )
        return self._placed[g_NO.dtype]


def _squared_norm(factors: Factors, layer: TargetLayer) -> float:
    square = algebra.inner(factors, factors)
    if factors.gain_O is not None:
        gain_O = factors.gain_O.double()
        weight_OI = layer.dense_weight_OI().detach().cpu().double()
        # |b a + diag(gain) W|^2 without the sum: rows of W meet the factors one by one
        crossed_O = ((weight_OI @ factors.a_RI.double().T) * factors.b_OR.double()).sum(dim=1)
        square += float(2 * gain_O @ crossed_O + gain_O.square() @ weight_OI.square().sum(dim=1))
    if factors.bias_O is not None:
        square += float(factors.bias_O.double().square().sum())
    return max(square, 0.0)
