"""Each token's strongest expert, and colours for the experts that are strongest most often."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Self

from torch import Tensor

# Okabe and Ito's colours, told apart with any kind of colour vision; numbers say the same
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#0072B2", "#D55E00")
OTHER = "#999999"


@dataclass(frozen=True)
class Strongest:
    """For each row of weights the place of the expert with the largest |w| (None without weight), and its share of |w|."""

    experts: tuple[int | None, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, w_NE: Tensor) -> Self:
        """NaN counts as no weight."""
        magnitude_NE = w_NE.abs().nan_to_num()
        total_N = magnitude_NE.sum(dim=1)
        share_N = magnitude_NE.amax(dim=1) / total_N.clamp(min=1e-30)
        best_N = magnitude_NE.argmax(dim=1).tolist()
        experts = [best if total else None for best, total in zip(best_N, total_N.tolist(), strict=True)]
        return cls(tuple(experts), tuple(share_N.tolist()))

    @property
    def colours(self) -> dict[int, str]:
        """A colour for each of the experts that are strongest most often; the others are OTHER."""
        counted = Counter(expert for expert in self.experts if expert is not None)
        often = sorted(counted, key=lambda expert: (-counted[expert], expert))
        return dict(zip(often, PALETTE, strict=False))
