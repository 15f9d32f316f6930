"""The kernel that multiplies all distinct experts' factors with every token and masks by the tokens' weights.

It serves weights that vary by token or learn, and rows that share one small set of experts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from loraweave.composer.live.kernels._parts import (
    Cost,
    Lend,
    Part,
    RowKernel,
    RowSets,
    TokenWorkload,
    Workload,
    kernels_with,
    repeat_rows,
    stack_a,
)
from loraweave.composer.live.kernels.naive import mix

# the w_NS expanded from one tensor of weights, by the ranks of a layer's experts and the axes of the tokens
Made = dict[tuple[tuple[int, ...], torch.Size], Tensor]


@dataclass(frozen=True, eq=False)
class Stack:
    """The factors of several experts side by side, and the expert (owner) of each rank row; independent of weights."""

    a_SI: Tensor
    b_SO: Tensor
    owner_S: Tensor
    ranks: tuple[int, ...]
    # data that faster kernels keep with the stack; tensors in a list count as its bytes
    beside: dict[Hashable, Any] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, parts: Sequence[Part], dtype: torch.dtype) -> Stack:
        ranks = tuple([part.a_RI.shape[0] for part in parts])
        owner = [number for number, rank in enumerate(ranks) for _ in range(rank)]
        b_SO = torch.cat([part.b_RO for part in parts]).to(dtype)
        return cls(by_input(stack_a(parts, dtype)), b_SO, torch.tensor(owner, device=b_SO.device), ranks)

    @property
    def num_bytes(self) -> int:
        held = [self.a_SI, self.b_SO]
        held += (tensor for kept in self.beside.values() if isinstance(kept, list) for tensor in kept)
        return sum({id(tensor): tensor.nbytes for tensor in held}.values())


@dataclass(frozen=True, eq=False)
class Dense(RowKernel):
    """A kernel of a stack of factors and the weights of its experts, in fp32 or better; B and T may be 1.

    `hidden_NS` is x a^T of the input to come, if known, and `made` collects w_NS for layers that share the weights.
    """

    is_shared: ClassVar[bool | None] = False

    stack: Stack
    w_BTP: Tensor
    hidden_NS: Tensor | None = None
    made: Made | None = None

    @staticmethod
    def cost(work: Workload) -> Cost | None:
        elements = work.num_mixtures * work.tokens * work.stacked
        # the hidden values go through fp32 and a mask
        return work.of_products(elements, work.stacked, calls=6, extra=6 * elements)

    @staticmethod
    def token_cost(work: TokenWorkload) -> Cost:
        """Return the cost of `Dense` for one layer's weights by token."""
        width, elements = work.num_inputs + work.num_outputs, work.num_tokens * work.stacked
        return Cost(2 * elements * width, work.itemsize * (work.stacked * width + 8 * elements), calls=6)

    @classmethod
    def of(cls, parts: Sequence[Part], rows: RowSets, dtype: torch.dtype, lend: Lend | None = None) -> Dense:
        w_B1P = torch.zeros(len(rows), 1, len(parts), dtype=torch.promote_types(dtype, torch.float32))
        for number, row in enumerate(rows):
            for p, weight in row:
                w_B1P[number, 0, p] = weight
        stack = Stack.of(parts, dtype)
        return cls(stack, w_B1P.to(stack.b_SO.device))

    @property
    def dtype(self) -> torch.dtype:
        return self.stack.a_SI.dtype

    @property
    def num_bytes(self) -> int:
        return self.w_BTP.nbytes

    def expanded(self, hidden_BTS: Tensor) -> Tensor:
        """Return (hidden * w) b^T for hidden values that any kind of layer computed."""
        w_BTS = repeat_rows(self.w_BTP[..., self.stack.owner_S], hidden_BTS.shape[0])
        return mix(hidden_BTS, w_BTS).to(self.dtype) @ self.stack.b_SO

    def update(self, x_BTI: Tensor) -> Tensor:
        if self._plain():
            return self.expanded(linear(x_BTI, self.stack.a_SI))
        return self._product(None, x_BTI).view(*x_BTI.shape[:2], self.stack.b_SO.shape[1])

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        if torch._C._are_functorch_transforms_active():
            y_BTO.add_(self.update(x_BTI))
            return
        for kernel in kernels_with("add_dense").values():
            if kernel.add_dense(self, x_BTI, y_BTO):
                return
        b_SO, hidden_NS = self.stack.b_SO, self.hidden_NS
        if hidden_NS is None:
            hidden_NS = linear(x_BTI.reshape(-1, x_BTI.shape[2]), self.stack.a_SI)
        y_BTO.view(-1, b_SO.shape[1]).addmm_(self._mixed(hidden_NS, x_BTI.shape).to(b_SO.dtype), b_SO)

    def plus(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        """Return y plus the update, in y's memory where autograd allows it: no layer needs its output for its gradients."""
        fixed = not y_BTO.is_contiguous() or (y_BTO.requires_grad and (y_BTO.is_leaf or y_BTO._is_view()))
        if self._plain() or y_BTO.dtype is not self.dtype or fixed:
            return super().plus(x_BTI, y_BTO)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_BTI, y_BTO, self.w_BTP)):
            return self._product(y_BTO, x_BTI)
        self.add_(x_BTI, y_BTO)
        return y_BTO

    def _plain(self) -> bool:
        """Return True if autograd must go through every operation: where factors learn, and below torch.func."""
        stack = self.stack
        return stack.a_SI.requires_grad or stack.b_SO.requires_grad or torch._C._are_functorch_transforms_active()

    def _product(self, y_BTO: Tensor | None, x_BTI: Tensor) -> Tensor:
        stack = self.stack
        x_NI, w_NP = x_BTI.reshape(-1, x_BTI.shape[2]), self.by_token(x_BTI.shape)
        output: Tensor = ExpertProduct.apply(  # type: ignore[no-untyped-call]
            y_BTO, x_NI, w_NP, stack.a_SI, stack.b_SO, RankRows(stack.owner_S)
        )
        return output

    def _mixed(self, hidden_NS: Tensor, shape: torch.Size) -> Tensor:
        """Return the hidden values of inputs of shape (B, T, I), each times its expert's weight."""
        ranks = self.stack.ranks
        if self.made is None and len(set(ranks)) == 1:
            hidden_NPR = hidden_NS.view(-1, len(ranks), ranks[0])
            return weigh(hidden_NPR, self.by_token(shape).unsqueeze(2), learns=False).flatten(1)
        key = (ranks, shape[:2])
        w_NS = None if self.made is None else self.made.get(key)
        if w_NS is None:
            w_NS = self.by_token(shape).index_select(1, self.stack.owner_S)
            if self.made is not None:
                self.made[key] = w_NS
        return weigh(hidden_NS, w_NS, learns=False)

    def by_token(self, shape: torch.Size) -> Tensor:
        """Return w_NP for the N tokens of inputs of shape (B, T, I), row by row; w_1P if all share them."""
        w_BTP = repeat_rows(self.w_BTP, shape[0])
        if w_BTP.shape[0] * w_BTP.shape[1] != 1:
            w_BTP = w_BTP.expand(*shape[:2], w_BTP.shape[2])
        return w_BTP.reshape(w_BTP.shape[0] * w_BTP.shape[1], w_BTP.shape[2])


def by_input(a_SI: Tensor) -> Tensor:
    """Return a_SI with the values of one input contiguous in memory, which halves the time of x a^T on a CPU."""
    return a_SI.T.contiguous().T


class RankRows(NamedTuple):
    """The owners of S rank rows, and the rows of a and b that each rank row uses; None means that rank row s uses row s."""

    owner_S: Tensor
    a_row_S: Tensor | None = None
    b_row_S: Tensor | None = None

    def of_a(self, hidden: Tensor) -> Tensor:
        """Return hidden values (.., S), one for each rank row, from x a^T, which has one for each row of a."""
        return _pick(hidden, self.a_row_S)

    def of_b(self, b: Tensor) -> Tensor:
        """Return b_SO, with one row of b for each rank row."""
        return b if self.b_row_S is None else b[self.b_row_S]


class ExpertProduct(torch.autograd.Function):
    """y + (x a^T * w) b^T in y's memory, for y of N tokens on any axes; update_NO alone if y is None.

    w_NE are the experts' weights, or w_1E where all tokens share them. x, a and b have one dtype, in which products run;
    weights count in fp32 or better. A weight of zero that does not learn adds exactly nothing. Several rank rows may share a
    row of a, or of b. Differentiating twice raises RuntimeError if w, a or b learns.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor | None, x_NI: Tensor, w_NE: Tensor, a: Tensor, b: Tensor, rows: RankRows) -> Tensor:
        learns_w, learns_b = ctx.needs_input_grad[2], ctx.needs_input_grad[4]
        hidden_NS = rows.of_a(x_NI @ a.T)
        mixed = _mix(hidden_NS, w_NE, b, rows, learns=learns_w)
        ctx.rows = rows
        # save only tensors that a gradient needs; the mixed values are computed again
        ctx.save_for_backward(
            x_NI if ctx.needs_input_grad[3] else None, w_NE, a, b, hidden_NS if learns_w or learns_b else None
        )
        if y is not None:
            ctx.mark_dirty(y)
        return _add(y, mixed, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # the saved hidden values have no graph, so a second derivative would be wrong
        once = any(ctx.needs_input_grad[2:5])
        grads: tuple[Tensor | None, ...] = (once_differentiable(_gradients) if once else _gradients)(ctx, grad)
        return grads


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of y, x, w, a and b, None where a gradient is not needed; the last None is for `rows`."""
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
    """Return the hidden values times their weights, summed over the rank rows that share a row of b."""
    return _sum_shared(weigh(hidden_NS, w_NE.index_select(1, rows.owner_S), learns=learns), rows.b_row_S, len(b))


def _add(y: Tensor | None, mixed: Tensor, b: Tensor) -> Tensor:
    if y is None:
        return mixed @ b
    # below autocast the hidden values are in half precision
    y.view(-1, b.shape[1]).addmm_(mixed.to(y.dtype), b.to(y.dtype))
    return y


def _pick(values: Tensor, row_S: Tensor | None) -> Tensor:
    """Return the columns `row_S` of `values` (.., R) as (.., S), one for each rank row; None returns all as they are."""
    return values if row_S is None else values[..., row_S]


def _sum_shared(values_NS: Tensor, row_S: Tensor | None, num_rows: int) -> Tensor:
    """Return (N, `num_rows`): the values summed over rank rows with the same index in row_S; unchanged if that is None."""
    if row_S is None:
        return values_NS
    return values_NS.new_zeros(len(values_NS), num_rows).index_add_(1, row_S, values_NS)


def weigh(hidden: Tensor, w: Tensor, *, learns: bool) -> Tensor:
    """Return hidden values times weights in the dtype of `hidden`; the axes broadcast. `learns` keeps the gradient of w."""
    mixed = hidden.to(w.dtype) * w
    # without overflow the sum is finite, and costs less than a mask; on other devices than a CPU, reading it would block
    if not learns and not (mixed.device.type == "cpu" and math.isfinite(mixed.sum().item())):
        mixed = mixed.masked_fill(w == 0, 0.0)
    return mixed.to(hidden.dtype)


def sort_by_expert(w_NE: Tensor) -> tuple[Tensor, list[int]]:
    """Return the indices of tokens with a weight other than 0, expert by expert, and their number for each expert."""
    chosen_EN = w_NE.T != 0
    return chosen_EN.nonzero()[:, 1], chosen_EN.sum(dim=1).tolist()


def add_experts(
    y: Tensor | None, x_NI: Tensor, w_NE: Tensor, a: Tensor, b: Tensor, rows: RankRows, *, ranks: Sequence[int], most: int
) -> Tensor:
    """Return y + (x a^T * w) b^T, in y's memory, with the gradients of all that learns; update_NO alone if y is None.

    `ranks` are the ranks of the experts. `most` is the largest number of weights other than 0 of a token; if it is below the
    number of experts, weights of 0 get no gradient.
    """
    learns = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (y, x_NI, w_NE, a, b))
    if most < len(ranks) and rows.a_row_S is None and rows.b_row_S is None and len(w_NE) == len(x_NI):
        for kernel in kernels_with("add_experts").values():
            sparse: Tensor | None = kernel.add_experts(y, x_NI, w_NE, a, b, tuple(ranks), most, learns=learns)
            if sparse is not None:
                return sparse
    if not learns:
        return _add(y, _mix(rows.of_a(x_NI @ a.T), w_NE, b, rows, learns=False), b)
    made: Tensor = ExpertProduct.apply(y, x_NI, w_NE, a, b, rows)  # type: ignore[no-untyped-call]
    return made
