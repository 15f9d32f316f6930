"""The mean negative log-likelihood of the target's tokens, the end-of-sequence token included."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from loraweave.composer.compose.objectives._row_sums import OneTarget, RowSums


class CrossEntropy(OneTarget):
    """Each example counts the same, however long its target."""

    differentiable: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"loss"})

    def losses(self, sums: RowSums) -> Tensor:
        """The mean over the target's tokens."""
        return (sums.asked("loss") / sums.count_NR)[:, 0]
