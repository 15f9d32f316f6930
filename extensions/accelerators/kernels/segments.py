"""Rows sorted by their mixture, and one pair of products for all rows of the same one.

The idea is SGMV's (Punica, Chen et al., MLSys 2024). Ranks differ from segment to segment without being filled up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loraweave.extend import get
from loraweave.extend.live import Cost, Kernel, Lend, Part, RowKernel, RowSets, Workload, group_by_mixture, place_of
from loraweave.extensions.accelerators.rank_tables import group_rows


@dataclass(frozen=True, eq=False)
class Segments(RowKernel):
    """The distinct mixtures of a batch: for each, its rows (a slice if consecutive, else their numbers) and its kernel."""

    is_shared: ClassVar[bool | None] = False

    num_rows: int
    num_outputs: int
    mixtures: tuple[tuple[slice | Tensor, Kernel], ...]

    @staticmethod
    def cost(work: Workload) -> Cost | None:
        return work.of_products(work.total * work.tokens, work.distinct, calls=3 * work.num_segments)

    @classmethod
    def of(cls, parts: Sequence[Part], rows: RowSets, dtype: torch.dtype, lend: Lend | None = None) -> Segments:
        """Return the segments of a batch's rows; rows without an expert are in none."""
        device = parts[0].a_RI.device
        members = group_rows(rows).items()
        of_all: type[RowKernel] = get("kernels", "shared")
        segments = tuple((place_of(numbers, device), of_all.of(parts, (row,), dtype)) for row, numbers in members)
        return cls(len(rows), parts[0].b_RO.shape[1], segments)

    @property
    def dtype(self) -> torch.dtype:
        return self.mixtures[0][1].dtype

    @property
    def num_bytes(self) -> int:
        return sum(mixture.num_bytes for _, mixture in self.mixtures)

    def update(self, x_BTI: Tensor) -> Tensor:
        x_MNI = group_by_mixture(x_BTI, self.num_rows)
        update_MNO = x_BTI.new_zeros(*x_MNI.shape[:2], self.num_outputs)
        for place, mixture in self.mixtures:
            update_MNO[place] = mixture.update(x_MNI[place])
        return update_MNO.view(*x_BTI.shape[:2], self.num_outputs)

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        x_MNI = group_by_mixture(x_BTI, self.num_rows)
        y_MNO = y_BTO.view(*x_MNI.shape[:2], self.num_outputs)
        for place, mixture in self.mixtures:
            if isinstance(place, slice):
                mixture.add_(x_MNI[place], y_MNO[place])
            else:
                y_MNO.index_add_(0, place, mixture.update(x_MNI[place]).to(y_MNO.dtype))
