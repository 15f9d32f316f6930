"""The weights that someone chose by hand: prompt strengths of ControlPE (Sun et al. 2023, arXiv 2311.09773), for example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraweave.routers.mixture import MixtureWeights
from loraweave.routers.search.closed_form import ClosedForm


class Manual(ClosedForm):
    """w_e as given, of any size and sign; experts that `weights` does not name get 0.

    Raises UnknownExpert for names that are no experts, WeightingError for weights that are no finite numbers.
    """

    def __init__(
        self,
        experts: Sequence[str],
        *,
        weights: Mapping[str, float] | MixtureWeights,
        budget: int | None = 40,
        seconds: float | None = None,
        seed: int = 0,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(experts, weights, budget=budget, seconds=seconds, seed=seed, groups=groups)
