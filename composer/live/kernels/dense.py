"""All distinct experts' factors side by side for every token, masked by the tokens' weights.

For weights that vary by token or learn, and for rows that share one small set of experts.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraweave.composer.live.kernels._expert_product import ExpertProduct, RankRows, weigh
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

# the w_NS that were made of one tensor of weights, by the ranks of layers and the axes of the tokens
Made = dict[tuple[tuple[int, ...], torch.Size], Tensor]


@dataclass(frozen=True, eq=False)
class Stack:
    """The factors of several experts side by side, and the expert of each rank row; for any weights."""

    a_SI: Tensor
    b_SO: Tensor
    owner_S: Tensor
    ranks: tuple[int, ...]
    # what faster ways keep beside it; tensors in a list are counted
    beside: dict[Hashable, Any] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, parts: Sequence[Part], dtype: torch.dtype) -> Stack:
        ranks = tuple(part.a_RI.shape[0] for part in parts)
        owner = [number for number, rank in enumerate(ranks) for _ in range(rank)]
        b_SO = torch.cat([part.b_RO for part in parts]).to(dtype)
        return cls(by_input(stack_a(parts, dtype)), b_SO, torch.tensor(owner, device=b_SO.device), ranks)

    @property
    def num_bytes(self) -> int:
        held = [self.a_SI, self.b_SO]
        held += (tensor for kept in self.beside.values() if isinstance(kept, list) for tensor in kept)
        return sum({id(tensor): tensor.nbytes for tensor in held}.values())

    def weigh(self, w_BTP: Tensor, hidden_NS: Tensor | None = None, made: Made | None = None) -> Dense:
        """Return its kernel for the parts' weights; B and T may be 1. `hidden_NS` is x a^T of the x to come, if known."""
        return Dense(self, w_BTP, hidden_NS, made)


@dataclass(frozen=True, eq=False)
class Dense(RowKernel):
    """A stack of factors and the weights of its experts, in fp32 or better."""

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
        """Return the cost of this path where weights vary by token."""
        width, elements = work.num_inputs + work.num_outputs, work.num_tokens * work.stacked
        return Cost(2 * elements * width, work.itemsize * (work.stacked * width + 8 * elements), calls=6)

    @classmethod
    def of(cls, parts: Sequence[Part], rows: RowSets, dtype: torch.dtype, lend: Lend | None = None) -> Dense:
        w_B1P = torch.zeros(len(rows), 1, len(parts), dtype=torch.promote_types(dtype, torch.float32))
        for number, row in enumerate(rows):
            for p, weight in row:
                w_B1P[number, 0, p] = weight
        stack = Stack.of(parts, dtype)
        return stack.weigh(w_B1P.to(stack.b_SO.device))

    @property
    def dtype(self) -> torch.dtype:
        return self.stack.a_SI.dtype

    @property
    def num_bytes(self) -> int:
        return self.w_BTP.nbytes

    def expanded(self, hidden_BTS: Tensor) -> Tensor:
        """Return (hidden * w) b^T, for the hidden values of whatever layer."""
        w_BTS = repeat_rows(self.w_BTP[..., self.stack.owner_S], hidden_BTS.shape[0])
        return mix(hidden_BTS, w_BTS).to(self.dtype) @ self.stack.b_SO

    def update(self, x_BTI: Tensor) -> Tensor:
        if self._plain():
            return self.expanded(linear(x_BTI, self.stack.a_SI))
        return self._product(None, x_BTI).view(*x_BTI.shape[:2], self.stack.b_SO.shape[1])

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        for kernel in kernels_with("add_dense").values():
            if kernel.add_dense(self, x_BTI, y_BTO):
                return
        b_SO, hidden_NS = self.stack.b_SO, self.hidden_NS
        if hidden_NS is None:
            hidden_NS = linear(x_BTI.reshape(-1, x_BTI.shape[2]), self.stack.a_SI)
        y_BTO.view(-1, b_SO.shape[1]).addmm_(self._mixed(hidden_NS, x_BTI.shape).to(b_SO.dtype), b_SO)

    def plus(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        """Return the sum, in y's own memory where autograd allows that: no layer needs its own output for its gradients."""
        if self._plain() or y_BTO.dtype is not self.dtype or not _may_change(y_BTO):
            return super().plus(x_BTI, y_BTO)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_BTI, y_BTO, self.w_BTP)):
            return self._product(y_BTO, x_BTI)
        self.add_(x_BTI, y_BTO)
        return y_BTO

    def _plain(self) -> bool:
        """Return whether autograd goes through every step: where factors learn, and below torch.func."""
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
        """Return the hidden values, of inputs of that shape, times their weights."""
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
        """Return w_NP for the tokens of inputs of that shape, row by row; w_1P where all share them."""
        w_BTP = repeat_rows(self.w_BTP, shape[0])
        if w_BTP.shape[0] * w_BTP.shape[1] != 1:
            w_BTP = w_BTP.expand(*shape[:2], w_BTP.shape[2])
        return w_BTP.reshape(w_BTP.shape[0] * w_BTP.shape[1], w_BTP.shape[2])


def by_input(a_SI: Tensor) -> Tensor:
    """Return the same values, with those of one input contiguous, which halves the time of x a^T on a CPU."""
    return a_SI.T.contiguous().T


def _may_change(y_BTO: Tensor) -> bool:
    return y_BTO.is_contiguous() and not (y_BTO.requires_grad and (y_BTO.is_leaf or y_BTO._is_view()))
