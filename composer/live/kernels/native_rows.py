"""Per-row mixtures of few tokens in one call of compiled code: no casts, no copies by row, no zeros to fill ranks up.

The factors of a batch lie side by side, each once, in the layer's own dtype, or in 16 bits where these hold the same
numbers; each row adds up its own in fp32. What `_formula` says in PyTorch is what `native.c` calculates; without a compiler
this path is not offered.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from loraweave.common.compute import is_watched
from loraweave.composer.live.kernels import _native
from loraweave.composer.live.kernels._native import MOST_TOKENS, Table, native_runs
from loraweave.composer.live.kernels._parts import Adder, Cost, Lend, Part, RowKernel, RowSets, Workload, group_by_mixture


class Beside(NamedTuple):
    """The price of an operation and of a call in units of torch's."""

    flops: float
    calls: float


# by bytes of a number, fitted at one thread; registers of 512 bits hold the sums of twice as many rank rows. Whether factors
# are read in 16 bits is left out: with these rates it would change no choice for the better by more than a hundredth
NATIVE = {4: Beside(1.0 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1.4, 0.5), 2: Beside(3.0, 0.15)}


@dataclass(frozen=True, eq=False)
class NativeRows(RowKernel):
    """The distinct factors of M mixtures; `entries` has (first rank row, how many, weight) of each expert of each row."""

    widens: ClassVar[bool] = False
    devices: ClassVar[tuple[str, ...] | None] = ("cpu",)

    a_DI: Tensor
    b_DO: Tensor
    entries: tuple[tuple[tuple[int, int, float], ...], ...]
    dtype: torch.dtype
    # by the tokens of a row
    _tables: dict[int, Table] = field(default_factory=dict, init=False)

    @classmethod
    def runs(cls, device: torch.device, dtype: torch.dtype) -> bool:
        return native_runs(device, dtype)

    @staticmethod
    def cost(work: Workload) -> Cost | None:
        if not work.native or work.num_mixtures * work.tokens > MOST_TOKENS:
            return None
        rates = NATIVE[work.itemsize]
        product = work.of_products(work.total * work.tokens, work.stacked, calls=0)
        # the library has one thread, and the rates are those of two
        slower = max(1.0, work.native / 2)
        return Cost(product.flops * rates.flops * slower, product.num_bytes * slower, rates.calls)

    @classmethod
    def of(cls, parts: Sequence[Part], rows: RowSets, dtype: torch.dtype, lend: Lend | None = None) -> NativeRows:
        used = sorted({place for row in rows for place, _ in row})
        firsts, first = {}, 0
        for place in used:
            firsts[place] = first
            first += parts[place].a_RI.shape[0]
        entries = tuple(tuple((firsts[p], parts[p].a_RI.shape[0], weight) for p, weight in row) for row in rows)
        factors = [parts[place].a_RI for place in used], [parts[place].b_RO for place in used]
        # the first factors mostly tell what a look at all of them would
        short = dtype is torch.float32 and _native.shorten(factors[0][0])
        joined = _native.shorten(*map(torch.cat, factors)) if short else None
        a_DI, b_DO = joined or [_joined(matrices, first, dtype, lend) for matrices in factors]
        return cls(a_DI, b_DO, entries, dtype)

    @property
    def num_bytes(self) -> int:
        return self.a_DI.nbytes + self.b_DO.nbytes

    def update(self, x_BTI: Tensor) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            return self._formula(x_BTI)
        update_BTO: Tensor = _Product.apply(x_BTI, self)  # type: ignore[no-untyped-call]
        return update_BTO

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        self.adder(y_BTO.dtype, x_BTI.shape)(x_BTI, y_BTO)

    def adder(self, dtype: torch.dtype, shape: torch.Size) -> Adder:
        add = _native.function(dtype, self.a_DI.dtype)
        if add is None or dtype is not self.dtype:
            return self._add_formula
        address = ctypes.addressof(self._table(shape[0] * shape[1] // len(self.entries)))

        def add_native(x_BTI: Tensor, y_BTO: Tensor) -> None:
            if is_watched():
                self._add_formula(x_BTI, y_BTO)
                return
            if not x_BTI.is_contiguous():
                x_BTI = x_BTI.contiguous()
            try:
                add(address, x_BTI.data_ptr(), None, y_BTO.data_ptr())
            except RuntimeError:
                # tensors of functorch and of tracing have no memory of their own
                self._add_formula(x_BTI, y_BTO)

        return add_native

    def _table(self, tokens: int) -> Table:
        """Return the table that the library reads for so many tokens a row; it is kept as long as the kernel."""
        if tokens in self._tables:
            return self._tables[tokens]
        uses = sorted(
            (first, count, row, weight) for row, entry in enumerate(self.entries) for first, count, weight in entry
        )
        counts = {first: count for first, count, _, _ in uses}
        starts = accumulate(Counter(first for first, *_ in uses).values(), initial=0)
        numbers = torch.tensor([*counts.values(), *starts, *(row for _, _, row, _ in uses)])
        weights = torch.tensor([weight for *_, weight in uses])
        outputs = self.b_DO.shape[1]
        work = _native.work(tokens * (len(self.entries) * outputs + sum(count for _, count, _, _ in uses)))
        sizes = len(self.entries), tokens, self.a_DI.shape[1], outputs, len(counts)
        table = Table(*sizes, *(tensor.data_ptr() for tensor in (self.a_DI, self.b_DO, numbers, weights, work)))
        # the memory that it points to
        table.owned = self.a_DI, self.b_DO, numbers, weights, work
        return self._tables.setdefault(tokens, table)

    def _add_formula(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        y_BTO.add_(self._formula(x_BTI.to(self.dtype)))

    def _formula(self, x_BTI: Tensor) -> Tensor:
        """Return the update by the naive twin, with gradients: one mixture after the other."""
        wide = torch.promote_types(self.dtype, torch.float32)
        updates = []
        for x_NI, row in zip(group_by_mixture(x_BTI, len(self.entries)).to(wide), self.entries, strict=True):
            update_NO = x_NI.new_zeros(len(x_NI), self.b_DO.shape[1])
            for first, count, weight in row:
                hidden_NR = x_NI @ self.a_DI[first : first + count].to(wide).T
                update_NO = update_NO + weight * hidden_NR @ self.b_DO[first : first + count].to(wide)
            updates.append(update_NO)
        return torch.stack(updates).to(self.dtype).view(*x_BTI.shape[:2], self.b_DO.shape[1])


class _Product(torch.autograd.Function):
    """The updates; their gradient is the same product with a and b in each other's place."""

    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, kernel: NativeRows) -> Tensor:
        ctx.kernel = kernel
        update_BTO = x_BTI.new_zeros(*x_BTI.shape[:2], kernel.b_DO.shape[1])
        kernel.add_(x_BTI, update_BTO)
        return update_BTO

    @staticmethod
    def backward(ctx: Any, grad_BTO: Tensor) -> tuple[Tensor, None]:
        kernel = ctx.kernel
        # as a product with a gradient of its own, for those who differentiate twice
        return _Product.apply(grad_BTO, NativeRows(kernel.b_DO, kernel.a_DI, kernel.entries, kernel.dtype)), None  # type: ignore[no-untyped-call]


def _joined(factors: Sequence[Tensor], num_ranks: int, dtype: torch.dtype, lend: Lend | None) -> Tensor:
    if lend is None or any(matrix.dtype is not dtype for matrix in factors):
        return torch.cat(list(factors)).to(dtype)
    width = factors[0].shape[1]
    return torch.cat(list(factors), out=lend(num_ranks * width).view(num_ranks, width))
