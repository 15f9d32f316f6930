"""A mixture for some rows of a batch: the others, which have the base alone, take no part in any product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave.composer.live.kernels._parts import AddsInPlace, Kernel, add_at, group_by_mixture


@dataclass(frozen=True, eq=False)
class SomeRows(AddsInPlace):
    """`kernel` for the mixtures at `place` among `num_rows`: a slice where they are consecutive, else an index."""

    kernel: Kernel
    num_rows: int
    place: slice | Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.kernel.dtype

    @property
    def num_bytes(self) -> int:
        return self.kernel.num_bytes

    def update(self, x_BTI: Tensor) -> Tensor:
        found_MNO = self.kernel.update(group_by_mixture(x_BTI, self.num_rows)[self.place])
        update_MNO = found_MNO.new_zeros(self.num_rows, *found_MNO.shape[1:])
        update_MNO[self.place] = found_MNO
        return update_MNO.view(*x_BTI.shape[:2], found_MNO.shape[2])

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        x_MNI = group_by_mixture(x_BTI, self.num_rows)
        y_MNO = y_BTO.view(*x_MNI.shape[:2], y_BTO.shape[2])
        add_at(self.kernel, self.place, x_MNI, y_MNO)
