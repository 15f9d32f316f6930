"""Weights chosen by hand, such as the prompt strengths of ControlPE (Sun et al. 2023, arXiv 2311.09773)."""

from collections.abc import Mapping
from dataclasses import dataclass

from loraweave.routers.searches._solver import ClosedForm
from loraweave.routers.weights import MixtureWeights


@dataclass(eq=False, kw_only=True)
class Manual(ClosedForm):
    """Weights w_e as given, of any size and sign; experts that `weights` does not name get 0.

    Raises UnknownExpert for names that are not experts, WeightingError for weights that are not finite numbers.
    """

    weights: Mapping[str, float] | MixtureWeights

    def _weights(self) -> Mapping[str, float] | MixtureWeights:
        return self.weights
