"""Tables that Triton kernels read: the distinct factors of a batch, stacked, and the rank rows that each mixture uses."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from loraweave.extend.live import Part, RowKernel, RowSets

# the types of devices that Triton's kernels run on if it is installed: GPUs, and the CPU in its interpreter
DEVICES = ("cpu", "cuda") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


def triton_runs(device: str, itemsize: int) -> bool:
    """Return True if Triton's kernels, which sum in fp32, run on this type of device for floats of `itemsize` bytes."""
    return device in DEVICES and itemsize in (2, 4) and _is_installed()


@cache
def _is_installed() -> bool:
    # this does not import Triton
    return find_spec("triton") is not None


@dataclass(frozen=True, eq=False)
class RankTables:
    """The D distinct rank rows (of a and b) of a batch; mixture g uses index_GR[g, :count_G[g]], with fp32 weights w_GR."""

    a_DI: Tensor
    b_DO: Tensor
    index_GR: Tensor
    w_GR: Tensor
    count_G: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part], mixtures: Sequence[tuple[tuple[int, float], ...]], dtype: torch.dtype) -> RankTables:
        used = sorted({p for mixture in mixtures for p, _ in mixture})
        distinct = [parts[p] for p in used]
        a_DI = torch.cat([part.a_RI for part in distinct]).to(dtype).contiguous()
        b_DO = torch.cat([part.b_RO for part in distinct]).to(dtype).contiguous()
        first = dict(zip(used, accumulate((len(part.a_RI) for part in distinct), initial=0), strict=False))
        rows = [
            [(first[p] + r, weight) for p, weight in mixture for r in range(parts[p].a_RI.shape[0])] for mixture in mixtures
        ]
        width = max((len(row) for row in rows), default=0)
        filled = [row + [(0, 0.0)] * (width - len(row)) for row in rows]
        device = a_DI.device
        return cls(
            a_DI,
            b_DO,
            torch.tensor([[s for s, _ in row] for row in filled], dtype=torch.int32, device=device),
            torch.tensor([[w for _, w in row] for row in filled], dtype=torch.float32, device=device),
            torch.tensor([len(row) for row in rows], dtype=torch.int32, device=device),
        )

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.a_DI, self.b_DO, self.index_GR, self.w_GR, self.count_G))


class TableKernel(RowKernel):
    """A kernel whose factors lie in `tables`, with one row of a and one of b for each rank."""

    is_shared: ClassVar[bool | None] = False
    devices: ClassVar[tuple[str, ...] | None] = DEVICES

    tables: RankTables

    @classmethod
    def runs(cls, device: torch.device, dtype: torch.dtype) -> bool:
        return triton_runs(device.type, dtype.itemsize)

    @property
    def dtype(self) -> torch.dtype:
        return self.tables.a_DI.dtype

    @property
    def num_bytes(self) -> int:
        return self.tables.num_bytes

    def update(self, x_BTI: Tensor) -> Tensor:
        update_BTO: Tensor = _Product.apply(x_BTI, self, False)  # type: ignore[no-untyped-call]
        return update_BTO

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        self.run(x_BTI, self.tables.a_DI, self.tables.b_DO, y_BTO)

    @abstractmethod
    def run(self, x_BTI: Tensor, in_DI: Tensor, out_DO: Tensor, y_BTO: Tensor | None) -> Tensor:
        """Return (x in^T * w) out, with the weights w of `tables`, added to y_BTO in place unless that is None."""


class _Product(torch.autograd.Function):
    """The product (x a^T * w) b of a kernel's tables; its gradient is the same product with a and b swapped."""

    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, kernel: TableKernel, turned: bool) -> Tensor:
        ctx.kernel, ctx.turned = kernel, turned
        factors = kernel.tables.a_DI, kernel.tables.b_DO
        return kernel.run(x_BTI, *(factors[::-1] if turned else factors), None)

    @staticmethod
    def backward(ctx: Any, grad_BTO: Tensor) -> tuple[Tensor, None, None]:
        # as a product with a gradient of its own, for those who differentiate twice
        return _Product.apply(grad_BTO, ctx.kernel, not ctx.turned), None, None  # type: ignore[no-untyped-call]


def group_rows(rows: RowSets) -> dict[tuple[tuple[int, float], ...], list[int]]:
    """Return {distinct mixture: the numbers of its batch rows}, in the rows' order; rows without experts are left out."""
    numbers_by_mixture: dict[tuple[tuple[int, float], ...], list[int]] = {}
    for number, row in enumerate(rows):
        if row:
            numbers_by_mixture.setdefault(row, []).append(number)
    return numbers_by_mixture
