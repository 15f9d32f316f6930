"""(x a^T * w) b^T with gradients of x, w, a and b: a sum of experts' updates in the cheapest of several equal ways."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraweave.composer.live.kernels._parts import RATES, S_PER_OP, Cost, TokenWorkload


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


class ChosenProduct(torch.autograd.Function):
    """The `ExpertProduct` of experts with rank rows of their own, `ranks` of them one after the other, and weights by token.

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
    """Return the tokens whose weight is not 0, of one expert after the other, and how many each expert has."""
    chosen_EN = w_NE.T != 0
    return chosen_EN.nonzero()[:, 1], chosen_EN.sum(dim=1).tolist()


def _chosen_experts(token_Z: Tensor, counts: Sequence[int], ranks: Sequence[int]) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield the number, rank rows and tokens of each expert that has tokens."""
    start = 0
    for expert, (token_M, rank) in enumerate(zip(torch.split(token_Z, list(counts)), ranks, strict=True)):
        if len(token_M):
            yield expert, slice(start, start + rank), token_M
        start += rank


def _weigh(values_MR: Tensor, w_M1: Tensor) -> Tensor:
    return (values_MR.to(w_M1.dtype) * w_M1).to(values_MR.dtype)


# seconds of an operation on one expert's tokens, which are few and copied before it
S_PER_EXPERT_OP = 8e-6
# a time below this share of another is clearly less: estimates are right to about a third
CLEARLY = 0.75
# of a token's factors, which come from memory: between two layers of the same kind the caches have seen a whole block
S_PER_COLD_BYTE = 1e-10


def add_experts(
    y: Tensor | None,
    x_NI: Tensor,
    w_NE: Tensor,
    a: Tensor,
    b: Tensor,
    rows: RankRows,
    *,
    ranks: Sequence[int],
    most: int,
) -> Tensor:
    """Return y + (x a^T * w) b^T, in y's own memory, with the gradients of whatever learns; without y the update_NO.

    `ranks` are the experts'. A `most` below their number says that no token has more weights other than 0, and that a weight
    of 0 has no gradient.
    """
    learns = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (y, x_NI, w_NE, a, b))
    (num_tokens, num_inputs), (stacked, num_outputs) = x_NI.shape, b.shape
    own_rows = rows.a_row_S is None and rows.b_row_S is None
    if most < len(ranks) and own_rows and w_NE.shape[0] == num_tokens and x_NI.device.type == "cpu":
        if num_tokens == 1 and not learns and skipping_pays(most, len(ranks), a.nbytes + b.nbytes):
            return _of_one_token(y, x_NI, w_NE[0], a, b, ranks)
        work = TokenWorkload(
            num_tokens=num_tokens,
            chosen=num_tokens * most,
            num_experts=len(ranks),
            stacked=stacked,
            num_inputs=num_inputs,
            num_outputs=num_outputs,
            itemsize=a.element_size(),
        )
        if choosing_pays(work, learns=learns):
            output: Tensor = ChosenProduct.apply(y, x_NI, w_NE, a, b, tuple(ranks))  # type: ignore[no-untyped-call]
            return output
    if not learns:
        return _add(y, _mix(rows.of_a(x_NI @ a.T), w_NE, b, rows, learns=False), b)
    made: Tensor = ExpertProduct.apply(y, x_NI, w_NE, a, b, rows)  # type: ignore[no-untyped-call]
    return made


def _of_one_token(y: Tensor | None, x_1I: Tensor, w_E: Tensor, a_SI: Tensor, b_SO: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return what `add_experts` returns for one token, without reading the factors of experts whose weight is 0."""
    sum_1O = x_1I.new_zeros(1, b_SO.shape[1]) if y is None else y.view(1, -1)
    start = 0
    for weight, rank in zip(w_E.tolist(), ranks, strict=True):
        if weight:
            hidden_1R = x_1I @ a_SI[start : start + rank].T
            # below autocast the hidden values are in half precision
            sum_1O.addmm_(hidden_1R.to(sum_1O.dtype), b_SO[start : start + rank].to(sum_1O.dtype), alpha=weight)
        start += rank
    return sum_1O if y is None else y


def choosing_pays(work: TokenWorkload, *, learns: bool) -> bool:
    """Return whether, on a CPU, `ChosenProduct` clearly beats `ExpertProduct` (in both passes where the experts learn)."""
    rates = RATES["cpu", work.itemsize]
    width, rank = work.num_inputs + work.num_outputs, work.stacked / work.num_experts
    products, operations = (6, 13) if learns else (2, 5)
    # inputs and gradients are copied; a sum is read and written, and so is what is added to it
    of_inputs, of_outputs = (8, 6) if learns else (2, 4)
    moved = work.chosen * (of_inputs * work.num_inputs + of_outputs * work.num_outputs)
    # products with few rank rows are slower than long ones
    flops = products * work.chosen * rank * width * (1 + 8 / rank)
    chosen = rates.seconds(Cost(flops, 2 * work.itemsize * moved, 0))
    chosen += S_PER_EXPERT_OP * (operations * min(work.num_experts, work.chosen) + 10)
    return chosen < CLEARLY * rates.seconds(Cost(products * work.num_tokens * work.stacked * width, 0, 0))


def skipping_pays(most: int, num_experts: int, num_bytes: int) -> bool:
    """Return whether, on a CPU, a call for each of a token's `most` experts beats one that reads all of so many bytes."""
    # two products and their parts of the factors, against two products, and the weights of all rank rows
    extra_calls = 5 * most - 7
    return num_bytes * (1 - most / num_experts) * S_PER_COLD_BYTE > extra_calls * S_PER_OP
