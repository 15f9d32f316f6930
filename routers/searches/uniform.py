"""Every expert counts the same: 1/E. The uniform arm of Asadi et al. 2024, arXiv 2402.15414, and every search's baseline."""

from __future__ import annotations

from collections.abc import Mapping

from loraweave.registry import traits
from loraweave.routers.searches._solver import ClosedForm


@traits("orderless")
class Uniform(ClosedForm):
    """w_e = 1/E; with `groups`, in their layers only."""

    def _weights(self) -> Mapping[str, float]:
        return dict.fromkeys(self.experts, 1 / max(len(self.experts), 1))
