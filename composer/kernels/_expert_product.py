"""(x a^T * w) b^T with gradients of x, w, a and b: the sum of trained experts' updates as one operation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraweave.composer.kernels._weighted_product import weigh


class RankRows(NamedTuple):
    """Of S rank rows: whose each is, and which row of a and of b each has. None is its own row, in the same order."""

    owner_S: Tensor
    a_row_S: Tensor | None = None
    b_row_S: Tensor | None = None

    def of_a(self, hidden: Tensor) -> Tensor:
        """Values of the rank rows on the last axis, from those of the rows of a."""
        return hidden if self.a_row_S is None else hidden[..., self.a_row_S]

    def of_b(self, b: Tensor) -> Tensor:
        """b_SO of all rank rows."""
        return b if self.b_row_S is None else b[self.b_row_S]


class ExpertProduct(torch.autograd.Function):
    """y + (x a^T * w) b^T in y's own memory, for y of N tokens on whatever axes; without y the update_NO alone.

    w_NE are the experts' weights, or w_1E where all tokens share them. x, a and b have one dtype, in which products run;
    weights count in fp32 or better. A weight of zero that does not learn adds exactly nothing. Several rank rows may have
    one row of a, or of b. Twice differentiated, it raises RuntimeError.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor | None, x_NI: Tensor, w_NE: Tensor, a: Tensor, b: Tensor, rows: RankRows) -> Tensor:
        learns_w, learns_b = ctx.needs_input_grad[2], ctx.needs_input_grad[4]
        hidden_SN = _rows(a @ x_NI.T, rows.a_row_S)
        mixed = _summed(weigh(hidden_SN, w_NE.T[rows.owner_S], learns=learns_w), rows.b_row_S, len(b))
        ctx.rows = rows
        # of the whole only what a gradient needs
        ctx.save_for_backward(
            x_NI if ctx.needs_input_grad[3] else None,
            w_NE,
            a,
            b,
            hidden_SN if learns_w else None,
            mixed if learns_b else None,
        )
        if y is None:
            return mixed.T @ b
        ctx.mark_dirty(y)
        # below autocast the hidden values are in half precision
        y.view(-1, b.shape[1]).addmm_(mixed.T.to(y.dtype), b.to(y.dtype))
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, w_NE, a, b, hidden_SN, mixed = ctx.saved_tensors
        rows = ctx.rows
        grad_y, grad_x, grad_w, grad_a, grad_b = grad if ctx.needs_input_grad[0] else None, None, None, None, None
        grad_NO = grad.reshape(-1, b.shape[1]).to(b.dtype)
        if mixed is not None:
            grad_b = mixed.to(b.dtype) @ grad_NO
        if any(ctx.needs_input_grad[1:4]):
            grad_SN = _rows(b @ grad_NO.T, rows.b_row_S)
            if hidden_SN is not None:
                by_rank_SN = hidden_SN.to(w_NE.dtype) * grad_SN
                by_rank_SN = by_rank_SN.sum(dim=1, keepdim=True) if len(w_NE) == 1 else by_rank_SN
                grad_w = torch.zeros_like(w_NE.T).index_add_(0, rows.owner_S, by_rank_SN).T
            if any(ctx.needs_input_grad[1:4:2]):
                inner = _summed(weigh(grad_SN, w_NE.T[rows.owner_S], learns=hidden_SN is not None), rows.a_row_S, len(a))
                grad_x = inner.T @ a if ctx.needs_input_grad[1] else None
                grad_a = inner @ x_NI if x_NI is not None else None
        return grad_y, grad_x, grad_w, grad_a, grad_b, None


def _rows(values: Tensor, row_S: Tensor | None) -> Tensor:
    """values_SN of the rank rows, from those of the rows that they share."""
    return values if row_S is None else values[row_S]


def _summed(values_SN: Tensor, row_S: Tensor | None, num_rows: int) -> Tensor:
    """The sums over the rank rows that share a row."""
    if row_S is None:
        return values_SN
    return values_SN.new_zeros(num_rows, values_SN.shape[1]).index_add_(0, row_S, values_SN)
