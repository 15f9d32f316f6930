"""Products in training for tokens that chose few experts: each expert meets only its tokens, one token only its experts.

The naive twin is `ExpertProduct` of the core, in which every expert runs on every token.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraweave.extend.live import Cost, TokenWorkload, sort_by_expert
from loraweave.extensions.accelerators.kernels.sorted_tokens import S_PER_OP

# seconds of an operation on one expert's tokens, which are few and copied before it
S_PER_EXPERT_OP = 8e-6
# a time below this share of another is clearly less: estimates are right to about a third
CLEARLY = 0.75
# seconds to read a byte of factors from memory, since a whole block passed the caches since the last such layer
S_PER_COLD_BYTE = 1e-10


class ChosenExperts:
    """The faster products that `add_experts` of the core tries first, on a CPU."""

    @staticmethod
    def add_experts(
        y: Tensor | None,
        x_NI: Tensor,
        w_NE: Tensor,
        a_SI: Tensor,
        b_SO: Tensor,
        ranks: tuple[int, ...],
        most: int,
        *,
        learns: bool,
    ) -> Tensor | None:
        """Return y + (x a^T * w) b in y's own memory, the update_NO alone without y, or None where that would not pay.

        N are tokens; `ranks` are the E experts' numbers of rows of a and b. A token has at most `most` weights that are
        not 0; a weight of 0 has no gradient. `learns`: whether a gradient is needed.
        """
        num_tokens, num_inputs = x_NI.shape
        if x_NI.device.type != "cpu":
            return None
        if num_tokens == 1 and not learns and skipping_pays(most, len(ranks), a_SI.nbytes + b_SO.nbytes):
            return _of_one_token(y, x_NI, w_NE[0], a_SI, b_SO, ranks)
        sizes = len(ranks), b_SO.shape[0], num_inputs, b_SO.shape[1], a_SI.element_size()
        if not choosing_pays(TokenWorkload(num_tokens, num_tokens * most, *sizes), learns=learns):
            return None
        output: Tensor = ChosenProduct.apply(y, x_NI, w_NE, a_SI, b_SO, ranks)  # type: ignore[no-untyped-call]
        return output


class ChosenProduct(torch.autograd.Function):
    """The product y + (x a^T * w) b of experts whose rank rows, `ranks` of them, are stacked in a and b; N are tokens.

    A weight of exactly 0 has no gradient, and its expert is skipped for the token: the work grows with the number of weights
    that are not 0, not of experts. Twice differentiated, it raises RuntimeError.
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


def _chosen_experts(token_Z: Tensor, counts: Sequence[int], ranks: Sequence[int]) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield each expert that has tokens as (its number, the slice of its rank rows, its token numbers).

    `token_Z` has the token numbers of one expert after the other, `counts` of each.
    """
    start = 0
    for expert, (token_M, rank) in enumerate(zip(torch.split(token_Z, list(counts)), ranks, strict=True)):
        if len(token_M):
            yield expert, slice(start, start + rank), token_M
        start += rank


def _weigh(values_MR: Tensor, w_M1: Tensor) -> Tensor:
    return (values_MR.to(w_M1.dtype) * w_M1).to(values_MR.dtype)


def _of_one_token(y: Tensor | None, x_1I: Tensor, w_E: Tensor, a_SI: Tensor, b_SO: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return `add_experts` for one token, in y's own memory, without reading the factors of experts whose weight is 0."""
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
    """Return True if `ChosenProduct` clearly beats `ExpertProduct` on a CPU, in both passes if the experts learn."""
    width, rank = work.num_inputs + work.num_outputs, work.stacked / work.num_experts
    products, operations = (6, 13) if learns else (2, 5)
    # inputs and gradients are copied; a sum is read and written, and so is what is added to it
    of_inputs, of_outputs = (8, 6) if learns else (2, 4)
    moved = work.chosen * (of_inputs * work.num_inputs + of_outputs * work.num_outputs)
    # products with few rank rows are slower than long ones
    flops = products * work.chosen * rank * width * (1 + 8 / rank)
    chosen = work.rates.seconds(Cost(flops, 2 * work.itemsize * moved, 0))
    chosen += S_PER_EXPERT_OP * (operations * min(work.num_experts, work.chosen) + 10)
    return chosen < CLEARLY * work.rates.seconds(Cost(products * work.num_tokens * work.stacked * width, 0, 0))


def skipping_pays(most: int, num_experts: int, num_bytes: int) -> bool:
    """Return whether, for one token on a CPU, a product for each of its `most` experts beats one of all experts' factors.

    `num_bytes` is the size of all factors.
    """
    # two products and two slices of factors for each expert, against two products and one of weights for all
    extra_calls = 5 * most - 7
    return num_bytes * (1 - most / num_experts) * S_PER_COLD_BYTE > extra_calls * S_PER_OP
