"""A model that answers for one candidate of a search, in whichever way its weights are meant."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from loraweave.composer.composer import Composer
from loraweave.routers.mixture import MixtureWeights


def active_candidate(engine: Composer, candidate: MixtureWeights, merge_method: str) -> AbstractContextManager[Any]:
    """Live for "linear"; any other merge is written into the base, which has to be able to take it, until it is left."""
    if merge_method == "linear":
        return engine.activate(candidate)
    weights = {name: value for name, value in candidate.as_dict().items() if value}
    # without a weight there is nothing to merge
    return engine.fused(weights, method=merge_method) if weights else nullcontext()
