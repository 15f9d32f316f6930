"""The same weight 1/E for every expert: the uniform arm of Asadi et al. 2024, arXiv 2402.15414, and a baseline."""

from collections.abc import Mapping

from loraweave.registry import traits
from loraweave.routers.searches._solver import ClosedForm


@traits("orderless")
class Uniform(ClosedForm):
    """Weights w_e = 1/E; with `groups`, in their layers only."""

    def _weights(self) -> Mapping[str, float]:
        return dict.fromkeys(self.experts, 1 / max(len(self.experts), 1))
