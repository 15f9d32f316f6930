"""All distinct experts' factors side by side for every token, masked by the tokens' weights.

For weights that vary by token or learn, and for rows that share one small set of experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraweave.common.compute import is_watched
from loraweave.composer.live.kernels._expert_product import ExpertProduct, RankRows, weigh
from loraweave.composer.live.kernels._native import MOST_TOKENS, Table, function, native_runs, shorten, work
from loraweave.composer.live.kernels._parts import (
    Cost,
    Lend,
    Part,
    RowKernel,
    RowSets,
    TokenWorkload,
    Workload,
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
    # by the tokens and the stride
    _tables: dict[tuple[int, int | None], Table] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, parts: Sequence[Part], dtype: torch.dtype) -> Stack:
        ranks = tuple(part.a_RI.shape[0] for part in parts)
        owner = [number for number, rank in enumerate(ranks) for _ in range(rank)]
        b_SO = torch.cat([part.b_RO for part in parts]).to(dtype)
        return cls(by_input(stack_a(parts, dtype)), b_SO, torch.tensor(owner, device=b_SO.device), ranks)

    @property
    def num_bytes(self) -> int:
        made = vars(self)
        held = (self.a_SI, self.b_SO, *made.get("by_row", ()), *made.get("b_by_row", ()))
        return sum({id(tensor): tensor.nbytes for tensor in held}.values())

    @cached_property
    def by_row(self) -> list[Tensor]:
        """The two factors row by row, in 16 bits where these hold the same numbers."""
        a_SI = self.a_SI.contiguous()
        return shorten(a_SI, self.b_SO) or [a_SI, self.b_SO]

    @cached_property
    def b_by_row(self) -> list[Tensor]:
        """The factor b alone, row by row, in 16 bits where these hold the same numbers."""
        return shorten(self.b_SO) or [self.b_SO]

    def table(self, num_tokens: int, stride: int | None) -> Table:
        """Return the table that the library reads: for inputs or, with a `stride`, for hidden values."""
        table = self._tables.get((num_tokens, stride))
        if table is None:
            factors = self.by_row if stride is None else self.b_by_row
            (num_ranks, outputs), width = self.b_SO.shape, self.a_SI.shape[1] if stride is None else stride
            owned = *factors, _uses(self.ranks, num_tokens), work(num_tokens * (outputs + num_ranks))
            *a, b, uses, sums = (tensor.data_ptr() for tensor in owned)
            table = Table(num_tokens, 1, width, outputs, len(self.ranks), a[0] if a else None, b, uses, None, sums)
            # the memory that it points to
            table.owned = owned
            self._tables[num_tokens, stride] = table
        return table

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
        b_SO, hidden_NS = self.stack.b_SO, self.hidden_NS
        native = self._runs_native(x_BTI, y_BTO)
        if native and hidden_NS is None:
            self._add_native(x_BTI.contiguous(), None, x_BTI.shape, y_BTO)
            return
        if hidden_NS is None:
            hidden_NS = linear(x_BTI.reshape(-1, x_BTI.shape[2]), self.stack.a_SI)
        # below autocast the hidden values are in half precision
        if native and hidden_NS.dtype is self.dtype and hidden_NS.stride(1) == 1:
            self._add_native(hidden_NS, hidden_NS.stride(0), x_BTI.shape, y_BTO)
            return
        y_BTO.view(-1, b_SO.shape[1]).addmm_(self._mixed(hidden_NS, x_BTI.shape).to(b_SO.dtype), b_SO)

    def _runs_native(self, x_BTI: Tensor, y_BTO: Tensor) -> bool:
        """Return whether the update, of few tokens, is one call of compiled code."""
        num_tokens, dtype = x_BTI.shape[0] * x_BTI.shape[1], self.dtype
        if num_tokens * torch.get_num_threads() > MOST_TOKENS or not x_BTI.dtype is y_BTO.dtype is dtype:
            return False
        # a tensor of another class may have no memory of its own
        return native_runs(self.stack.b_SO.device, dtype) and not is_watched() and type(y_BTO) is type(x_BTI) is Tensor

    def _add_native(self, read: Tensor, stride: int | None, shape: torch.Size, y_BTO: Tensor) -> None:
        """Add the update for inputs of `shape`; the library reads them, or their hidden values if there is a `stride`."""
        num_tokens, w_BTP = shape[0] * shape[1], self.w_BTP
        if w_BTP.shape[:2] != shape[:2] or w_BTP.dtype is not torch.float32 or not w_BTP.is_contiguous():
            w_BTP = self._by_token(shape).to(torch.float32).expand(num_tokens, -1).contiguous()
        table = self.stack.table(num_tokens, stride)
        add = function(self.dtype, table.owned[0].dtype)
        add(ctypes.addressof(table), read.data_ptr(), w_BTP.data_ptr(), y_BTO.data_ptr())

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
        x_NI, w_NP = x_BTI.reshape(-1, x_BTI.shape[2]), self._by_token(x_BTI.shape)
        output: Tensor = ExpertProduct.apply(  # type: ignore[no-untyped-call]
            y_BTO, x_NI, w_NP, stack.a_SI, stack.b_SO, RankRows(stack.owner_S)
        )
        return output

    def _mixed(self, hidden_NS: Tensor, shape: torch.Size) -> Tensor:
        """Return the hidden values, of inputs of that shape, times their weights."""
        ranks = self.stack.ranks
        if self.made is None and len(set(ranks)) == 1:
            hidden_NPR = hidden_NS.view(-1, len(ranks), ranks[0])
            return weigh(hidden_NPR, self._by_token(shape).unsqueeze(2), learns=False).flatten(1)
        key = (ranks, shape[:2])
        w_NS = None if self.made is None else self.made.get(key)
        if w_NS is None:
            w_NS = self._by_token(shape).index_select(1, self.stack.owner_S)
            if self.made is not None:
                self.made[key] = w_NS
        return weigh(hidden_NS, w_NS, learns=False)

    def _by_token(self, shape: torch.Size) -> Tensor:
        """Return w_NP for the tokens of inputs of that shape, row by row; w_1P where all share them."""
        w_BTP = repeat_rows(self.w_BTP, shape[0])
        if w_BTP.shape[0] * w_BTP.shape[1] != 1:
            w_BTP = w_BTP.expand(*shape[:2], w_BTP.shape[2])
        return w_BTP.reshape(w_BTP.shape[0] * w_BTP.shape[1], w_BTP.shape[2])


@lru_cache(maxsize=256)
def _uses(ranks: tuple[int, ...], num_tokens: int) -> Tensor:
    """Return the numbers of a table, for all layers of these ranks, in which each token is a row that uses every factor."""
    starts = [num_tokens * number for number in range(len(ranks) + 1)]
    return torch.tensor([*ranks, *starts, *(len(ranks) * [*range(num_tokens)])])


def by_input(a_SI: Tensor) -> Tensor:
    """Return the same values, with those of one input contiguous, which halves the time of x a^T on a CPU."""
    return a_SI.T.contiguous().T


def _may_change(y_BTO: Tensor) -> bool:
    return y_BTO.is_contiguous() and not (y_BTO.requires_grad and (y_BTO.is_leaf or y_BTO._is_view()))
