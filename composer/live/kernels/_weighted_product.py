"""(x a^T * w) b^T with gradients of x and w, of which only the hidden values and the weights are kept."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class WeightedProduct(torch.autograd.Function):
    """y + (x a^T * w) b^T in y's own memory, for y of N tokens on whatever axes; without y the update_NO alone.

    w_PN are weights of experts, or w_P1 where all tokens share them, and `owner_S` says whose each rank row is. Products run
    in the dtype of x, a and b, weights count in fp32 or better. A weight of zero that does not learn adds exactly nothing.
    Twice differentiated, it raises RuntimeError.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor | None, x_NI: Tensor, w_PN: Tensor, a_SI: Tensor, b_SO: Tensor, owner_S: Tensor
    ) -> Tensor:
        learns = ctx.needs_input_grad[2]
        hidden_SN = (x_NI @ a_SI.T).T.contiguous()
        # of the whole only what a gradient needs
        ctx.save_for_backward(w_PN, a_SI, b_SO, owner_S, *([hidden_SN] if learns else []))
        mixed_SN = weigh(hidden_SN, w_PN.index_select(0, owner_S), learns=learns)
        if y is None:
            return mixed_SN.T @ b_SO
        ctx.mark_dirty(y)
        # below autocast the hidden values are in half precision
        y.view(-1, b_SO.shape[1]).addmm_(mixed_SN.T.to(y.dtype), b_SO)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w_PN, a_SI, b_SO, owner_S, *hidden = ctx.saved_tensors
        grad_y, grad_x, grad_w = None, None, None
        if ctx.needs_input_grad[0]:
            grad_y = grad
        # below autocast the gradient is in half precision
        grad_NO = grad.reshape(-1, b_SO.shape[1]).to(b_SO.dtype)
        mixed_SN = (grad_NO @ b_SO.T).T.contiguous()
        if ctx.needs_input_grad[1]:
            hidden_SN = weigh(mixed_SN, w_PN.index_select(0, owner_S), learns=bool(hidden))
            grad_x = hidden_SN.T @ a_SI
        if hidden:
            by_rank_SN = hidden[0].to(w_PN.dtype) * mixed_SN
            # as many columns as the weights have
            by_rank_SN = by_rank_SN.sum(dim=1, keepdim=True) if w_PN.shape[1] == 1 else by_rank_SN
            grad_w = torch.zeros_like(w_PN).index_add_(0, owner_S, by_rank_SN)
        return grad_y, grad_x, grad_w, None, None, None


def weigh(hidden: Tensor, w: Tensor, *, learns: bool) -> Tensor:
    """The hidden values times their weights, in their own dtype; the axes broadcast."""
    mixed = hidden.to(w.dtype) * w
    # a sum over what has not overflowed is finite, and costs less than a mask; elsewhere than on a CPU one would wait for it
    if not learns and not (mixed.device.type == "cpu" and math.isfinite(float(mixed.sum()))):
        mixed = mixed.masked_fill(w == 0, 0.0)
    return mixed.to(hidden.dtype)
