"""The sum of trained experts' updates where each expert meets only the tokens that chose it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ChosenProduct(torch.autograd.Function):
    """`ExpertProduct` for experts with rank rows of their own, `ranks` of them one after the other, and weights by token.

    A weight of exactly 0 has no gradient, and its expert no part in the token. The work grows with the number of other
    weights, not of experts. Twice differentiated, it raises RuntimeError.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor | None, x_NI: Tensor, w_NE: Tensor, a_SI: Tensor, b_SO: Tensor, ranks: tuple[int, ...]
    ) -> Tensor:
        token_Z, counts = sort_by_expert(w_NE)
        sum_NO = x_NI.new_zeros(len(x_NI), b_SO.shape[1]) if y is None else y.view(-1, b_SO.shape[1])
        hidden = []
        for expert, rows, token_M in _chosen_experts(token_Z, counts, ranks):
            hidden_MR = x_NI[token_M] @ a_SI[rows].T
            mixed_MR = _weigh(hidden_MR, w_NE[token_M, expert, None])
            sum_NO.index_add_(0, token_M, (mixed_MR @ b_SO[rows]).to(sum_NO.dtype))
            hidden.append(hidden_MR)
        ctx.ranks, ctx.counts = ranks, counts
        ctx.save_for_backward(x_NI if ctx.needs_input_grad[3] else None, w_NE, a_SI, b_SO, token_Z, *hidden)
        if y is None:
            return sum_NO
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, w_NE, a_SI, b_SO, token_Z, *hidden = ctx.saved_tensors
        learns_y, learns_x, learns_w, learns_a, learns_b = ctx.needs_input_grad[:5]
        grad_NO = grad.reshape(-1, b_SO.shape[1]).to(b_SO.dtype)
        grad_x = grad_NO.new_zeros(len(grad_NO), a_SI.shape[1]) if learns_x else None
        grad_EN = torch.zeros_like(w_NE.T) if learns_w else None
        grad_a, grad_b = torch.zeros_like(a_SI) if learns_a else None, torch.zeros_like(b_SO) if learns_b else None
        used = _chosen_experts(token_Z, ctx.counts, ctx.ranks)
        for (expert, rows, token_M), hidden_MR in zip(used, hidden, strict=True):
            grad_MO, w_M1 = grad_NO[token_M], w_NE[token_M, expert, None]
            if grad_b is not None:
                grad_b[rows] = _weigh(hidden_MR, w_M1).to(b_SO.dtype).T @ grad_MO
            grad_MR = grad_MO @ b_SO[rows].T
            if grad_EN is not None:
                grad_EN[expert].index_copy_(0, token_M, (hidden_MR.to(w_NE.dtype) * grad_MR).sum(dim=1))
            inner_MR = _weigh(grad_MR, w_M1)
            if grad_x is not None:
                grad_x.index_add_(0, token_M, (inner_MR @ a_SI[rows]).to(grad_x.dtype))
            if grad_a is not None:
                grad_a[rows] = inner_MR.T @ x_NI[token_M]
        return grad if learns_y else None, grad_x, None if grad_EN is None else grad_EN.T, grad_a, grad_b, None


def sort_by_expert(w_NE: Tensor) -> tuple[Tensor, list[int]]:
    """The tokens whose weight of it is not 0, of one expert after the other, and how many each has."""
    chosen_EN = w_NE.T != 0
    return chosen_EN.nonzero()[:, 1], chosen_EN.sum(dim=1).tolist()


def _chosen_experts(token_Z: Tensor, counts: Sequence[int], ranks: Sequence[int]) -> Iterator[tuple[int, slice, Tensor]]:
    """Number, rank rows and tokens of each expert that has tokens."""
    start = 0
    for expert, (token_M, rank) in enumerate(zip(torch.split(token_Z, list(counts)), ranks, strict=True)):
        if len(token_M):
            yield expert, slice(start, start + rank), token_M
        start += rank


def _weigh(values_MR: Tensor, w_M1: Tensor) -> Tensor:
    return (values_MR.to(w_M1.dtype) * w_M1).to(values_MR.dtype)
