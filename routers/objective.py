"""What a search minimises: candidates in, losses out. Solvers see this protocol and never the model behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from loraweave.routers.mixture import MixtureWeights


class Objective(Protocol):
    """The loss of candidates, lower is better; NaN or infinity marks one that cannot be scored.

    Several candidates come in one call, so that an objective can evaluate a whole population in one forward pass. The
    result must not depend on how candidates are grouped into calls, beyond rounding.
    """

    def __call__(self, candidates: Sequence[MixtureWeights]) -> Sequence[float]: ...


def described(objective: Objective) -> dict[str, Any]:
    """What an objective with `describe()` says that its losses depend on, for JSON; nothing of any other."""
    describe = getattr(objective, "describe", None)
    return {} if describe is None else {"objective": describe()}


class DifferentiableObjective(Objective, Protocol):
    """An objective that can say how each loss changes with the candidate's weights."""

    def gradients(self, candidates: Sequence[MixtureWeights]) -> tuple[Sequence[float], Sequence[Tensor]]:
        """The loss of each candidate, and d loss / d values_BTLE, in the shape of its values."""
        ...
