"""Per-row mixtures as batched products: each row meets its own experts' factors only, not those of the whole batch.

The idea is BGMV's (Punica, Chen et al., MLSys 2024), for mixtures of any ranks and for any number of tokens a row: the
rows' factors are gathered once, with the weights in b, and used by every forward pass of the activation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from loraweave.extend.live import Cost, Lend, Part, RowKernel, RowSets, Workload, group_by_mixture


@dataclass(frozen=True, eq=False)
class Gathered(RowKernel):
    """The factors of B mixtures, each padded with zeros to the R rank rows of the largest, with the weights in b."""

    is_shared: ClassVar[bool | None] = False

    a_BRI: Tensor
    b_BRO: Tensor

    @staticmethod
    def cost(work: Workload) -> Cost | None:
        rank_rows = work.num_mixtures * work.largest
        return work.of_products(rank_rows * work.tokens, rank_rows, calls=2, items=2 * work.num_mixtures)

    @classmethod
    def of(cls, parts: Sequence[Part], rows: RowSets, dtype: torch.dtype, lend: Lend | None = None) -> Gathered:
        filling = _filling(rows, tuple([part.a_RI.shape[0] for part in parts]))
        num_rows, largest = len(rows), filling.largest
        a_BRI = _joined([part.a_RI for part in parts], filling, num_rows, lend).to(dtype).view(num_rows, largest, -1)
        b_SO = _joined([part.b_RO for part in parts], filling, num_rows, lend)
        if filling.weights is not None:
            exact = torch.promote_types(dtype, torch.float32)
            w_S1 = torch.tensor(filling.weights, dtype=exact, device=b_SO.device)[:, None]
            # a product of a half and a single is rounded once
            b_SO = b_SO * w_S1 if lend is None else b_SO.mul_(w_S1)
        return cls(a_BRI, b_SO.to(dtype).view(num_rows, largest, -1))

    def update(self, x_BTI: Tensor) -> Tensor:
        hidden_BTR = self._hidden(group_by_mixture(x_BTI, self.a_BRI.shape[0]))
        return torch.bmm(hidden_BTR, self.b_BRO).view(*x_BTI.shape[:2], self.b_BRO.shape[2])

    def add_(self, x_BTI: Tensor, y_BTO: Tensor) -> None:
        x_MNI = group_by_mixture(x_BTI, self.a_BRI.shape[0])
        y_BTO.view(*x_MNI.shape[:2], self.b_BRO.shape[2]).baddbmm_(self._hidden(x_MNI), self.b_BRO)

    def adder(self, dtype: torch.dtype, shape: torch.Size) -> Callable[[Tensor, Tensor], object]:
        a_BRI, b_BRO, wide = self.a_BRI, self.b_BRO, self.dtype
        if shape[:2] != (a_BRI.shape[0], 1):
            return super().adder(dtype, shape)

        def add(x_B1I: Tensor, y_B1O: Tensor) -> None:
            y_B1O.baddbmm_(torch.bmm(a_BRI, x_B1I.mT).mT, b_BRO)

        def add_wide(x_B1I: Tensor, y_B1O: Tensor) -> None:
            y_B1O.add_(torch.bmm(torch.bmm(a_BRI, x_B1I.to(wide).mT).mT, b_BRO))

        return add if wide is dtype else add_wide

    def _hidden(self, x_BTI: Tensor) -> Tensor:
        if x_BTI.shape[1] == 1:
            # the result is the same; a product with one column reads the factors a fifth faster than one with one row
            return torch.bmm(self.a_BRI, x_BTI.mT).mT
        return torch.bmm(x_BTI, self.a_BRI.mT)


class _Filling(NamedTuple):
    """The pieces that a batch's factors are joined from, in order: (index of a part, number of its rows or None for all).

    A part has one expert's factors; the index after the last part stands for zeros, and `padded` is True if these are used.
    `largest` is the rank that all batch rows are padded to. `weights` has one for each joined rank row; None if all are 1.
    """

    largest: int
    pieces: list[tuple[int, int | None]]
    padded: bool
    weights: list[float] | None


@lru_cache(maxsize=64)
def _filling(rows: RowSets, ranks: tuple[int, ...]) -> _Filling:
    """Return the pieces for a batch's rows; they are the same for all layers in which the parts have these `ranks`."""
    largest = max(sum(ranks[p] for p, _ in row) for row in rows)
    pieces: list[tuple[int, int | None]] = []
    weights: list[float] = []
    for row in rows:
        for p, weight in row:
            pieces.append((p, None))
            weights.extend([weight] * ranks[p])
        missing = largest - sum(ranks[p] for p, _ in row)
        if missing:
            pieces.append((len(ranks), missing))
            weights.extend([0.0] * missing)
    padded = any(size is not None for _, size in pieces)
    return _Filling(largest, pieces, padded, None if all(w in (0.0, 1.0) for w in weights) else weights)


def _joined(factors: list[Tensor], filling: _Filling, num_rows: int, lend: Lend | None) -> Tensor:
    """Return the pieces of `factors`, which has one matrix per part, below each other: (num_rows * largest rank, width)."""
    width = factors[0].shape[1]
    if filling.padded:
        factors.append(factors[0].new_zeros(filling.largest, width))
    pieces = [factors[p] if size is None else factors[p][:size] for p, size in filling.pieces]
    if lend is None:
        return torch.cat(pieces)
    num_ranks = num_rows * filling.largest
    return torch.cat(pieces, out=lend(num_ranks * width).view(num_ranks, width))
