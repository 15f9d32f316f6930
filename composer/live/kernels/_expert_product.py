"""(x a^T * w) b^T with gradients of x, w, a and b: the weighted sum of experts' updates as one operation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RankRows(NamedTuple):
    """The owners of S rank rows, and the rows of a and of b that they have; None means a row for each, in the same order."""

    owner_S: Tensor
    a_row_S: Tensor | None = None
    b_row_S: Tensor | None = None

    def of_a(self, hidden: Tensor) -> Tensor:
        """Return values of the rank rows on the last axis, from those of the rows of a."""
        return _pick(hidden, self.a_row_S)

    def of_b(self, b: Tensor) -> Tensor:
        """Return b_SO of all rank rows."""
        return b if self.b_row_S is None else b[self.b_row_S]


def plain_product(y: Tensor | None, x_NI: Tensor, w_NE: Tensor, a: Tensor, b: Tensor, rows: RankRows) -> Tensor:
    """Return what `ExpertProduct` returns, where nothing learns."""
    return _add(y, _mix(rows.of_a(x_NI @ a.T), w_NE, b, rows, learns=False), b)


class ExpertProduct(torch.autograd.Function):
    """y + (x a^T * w) b^T in y's own memory, for y of N tokens on whatever axes; without y the update_NO alone.

    w_NE are the experts' weights, or w_1E where all tokens share them. x, a and b have one dtype, in which products run;
    weights count in fp32 or better. A weight of zero that does not learn adds exactly nothing. Several rank rows may have
    one row of a, or of b. Twice differentiated, it raises RuntimeError.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor | None, x_NI: Tensor, w_NE: Tensor, a: Tensor, b: Tensor, rows: RankRows) -> Tensor:
        learns_w, learns_b = ctx.needs_input_grad[2], ctx.needs_input_grad[4]
        hidden_NS = rows.of_a(x_NI @ a.T)
        mixed = _mix(hidden_NS, w_NE, b, rows, learns=learns_w)
        ctx.rows = rows
        # only what a gradient needs is saved; the mixed values are made again
        ctx.save_for_backward(
            x_NI if ctx.needs_input_grad[3] else None, w_NE, a, b, hidden_NS if learns_w or learns_b else None
        )
        if y is not None:
            ctx.mark_dirty(y)
        return _add(y, mixed, b)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, w_NE, a, b, hidden_NS = ctx.saved_tensors
        rows = ctx.rows
        learns_y, learns_x, learns_w, learns_a, learns_b = ctx.needs_input_grad[:5]
        grad_x, grad_w, grad_a, grad_b = None, None, None, None
        grad_NO = grad.reshape(-1, b.shape[1]).to(b.dtype)
        if learns_b:
            grad_b = _mix(hidden_NS, w_NE, b, rows, learns=learns_w).to(b.dtype).T @ grad_NO
        if learns_x or learns_w or learns_a:
            grad_NS = _pick(grad_NO @ b.T, rows.b_row_S)
            if learns_w:
                by_rank_NS = hidden_NS.to(w_NE.dtype) * grad_NS
                by_rank_NS = by_rank_NS.sum(dim=0, keepdim=True) if len(w_NE) == 1 else by_rank_NS
                grad_w = torch.zeros_like(w_NE.T).index_add_(0, rows.owner_S, by_rank_NS.T).T
            if learns_x or learns_a:
                inner = weigh(grad_NS, w_NE.index_select(1, rows.owner_S), learns=learns_w)
                inner = _sum_shared(inner, rows.a_row_S, len(a))
                grad_x = inner @ a if learns_x else None
                grad_a = inner.T @ x_NI if learns_a else None
        return grad if learns_y else None, grad_x, grad_w, grad_a, grad_b, None


def _mix(hidden_NS: Tensor, w_NE: Tensor, b: Tensor, rows: RankRows, *, learns: bool) -> Tensor:
    """Return the hidden values times their weights, by the rows of b."""
    return _sum_shared(weigh(hidden_NS, w_NE.index_select(1, rows.owner_S), learns=learns), rows.b_row_S, len(b))


def _add(y: Tensor | None, mixed: Tensor, b: Tensor) -> Tensor:
    if y is None:
        return mixed @ b
    # below autocast the hidden values are in half precision
    y.view(-1, b.shape[1]).addmm_(mixed.to(y.dtype), b.to(y.dtype))
    return y


def _pick(values: Tensor, row_S: Tensor | None) -> Tensor:
    """Return values of the rank rows on the last axis, from those of the rows that they share."""
    return values if row_S is None else values[..., row_S]


def _sum_shared(values_NS: Tensor, row_S: Tensor | None, num_rows: int) -> Tensor:
    """Return the sums over the rank rows that share a row."""
    if row_S is None:
        return values_NS
    return values_NS.new_zeros(len(values_NS), num_rows).index_add_(1, row_S, values_NS)


def weigh(hidden: Tensor, w: Tensor, *, learns: bool) -> Tensor:
    """Return the hidden values times their weights, in their own dtype; the axes broadcast."""
    mixed = hidden.to(w.dtype) * w
    # a sum over what has not overflowed is finite, and costs less than a mask; elsewhere than on a CPU one would wait for it
    if not learns and not (mixed.device.type == "cpu" and math.isfinite(float(mixed.sum()))):
        mixed = mixed.masked_fill(w == 0, 0.0)
    return mixed.to(hidden.dtype)
