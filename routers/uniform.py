"""Every expert counts the same: 1/E. The uniform arm of Asadi et al. 2024, arXiv 2402.15414, and every search's baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraweave.routers.search.closed_form import ClosedForm


class Uniform(ClosedForm):
    """w_e = 1/E; with `groups`, in their layers only."""

    def __init__(
        self,
        experts: Sequence[str],
        *,
        budget: int | None = 40,
        seconds: float | None = None,
        seed: int = 0,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        weights = dict.fromkeys(experts, 1 / max(len(experts), 1))
        super().__init__(experts, weights, budget=budget, seconds=seconds, seed=seed, groups=groups)
