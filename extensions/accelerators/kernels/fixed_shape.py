"""Each batch row's own factors, one expert after the other: the kernel of `batch_invariant`, never the cheapest.

Slot k has the k-th expert, in the order of the pool, of each row with so many; rows whose experts there have the same rank
share batched products. What a row adds up, and in which order, does not depend on other rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from loraweave.extend.live import Cost, Lend, Part, RowKernel, RowSets, Workload, group_by_mixture, place_of, weigh_b
from loraweave.extensions.accelerators.fixed_shapes import TILE, fixed_products, fixing


@dataclass(frozen=True, eq=False)
class FixedShape(RowKernel):
    """The kernel that adds the experts of each batch row one after the other, by products of fixed shapes.

    `slots` has, for each place in the rows' lists of experts and each rank, M row numbers, a_MRI, and weighted b_MOR.
    """

    block: ClassVar[str] = "batch_invariant()"
    is_chosen: ClassVar[bool] = False

    num_rows: int
    num_outputs: int
    slots: tuple[tuple[slice | Tensor, Tensor, Tensor], ...]

    @classmethod
    def around(cls, model: nn.Module) -> AbstractContextManager[None]:
        return fixing(model)

    @staticmethod
    def cost(work: Workload) -> Cost | None:
        return None

    @classmethod
    def of(cls, parts: Sequence[Part], rows: RowSets, dtype: torch.dtype, lend: Lend | None = None) -> FixedShape:
        slots = []
        for slot in range(max(map(len, rows))):
            alike: dict[int, list[int]] = defaultdict(list)
            for number, row in enumerate(rows):
                if slot < len(row):
                    alike[parts[row[slot][0]].a_RI.shape[0]].append(number)
            for numbers in alike.values():
                weighted_parts = [(parts[place], weight) for place, weight in (rows[number][slot] for number in numbers)]
                a_MRI = torch.stack([part.a_RI.to(dtype) for part, _ in weighted_parts])
                b_MOR = torch.stack([weigh_b([part], [weight], dtype).T.contiguous() for part, weight in weighted_parts])
                slots.append((place_of(numbers, a_MRI.device), a_MRI, b_MOR))
        return cls(len(rows), parts[0].b_RO.shape[1], tuple(slots))

    @property
    def dtype(self) -> torch.dtype:
        return self.slots[0][1].dtype

    @property
    def num_bytes(self) -> int:
        return sum(a_MRI.nbytes + b_MOR.nbytes for _, a_MRI, b_MOR in self.slots)

    def update(self, x_BTI: Tensor) -> Tensor:
        x_MNI = group_by_mixture(x_BTI, self.num_rows)
        tiles = []
        for x_MTI in torch.split(x_MNI, TILE, dim=1):
            y_MTO = x_MTI.new_zeros(*x_MTI.shape[:2], self.num_outputs)
            for rows_M, a_MRI, b_MOR in self.slots:
                y_MTO[rows_M] += fixed_products(fixed_products(x_MTI[rows_M], a_MRI), b_MOR)
            tiles.append(y_MTO)
        return torch.cat(tiles, dim=1).view(*x_BTI.shape[:2], self.num_outputs)

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        y_BTO += self.update(x_BTI)
