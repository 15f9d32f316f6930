"""The word about licenses when adapters are mixed live: nothing is given away by that, so nothing is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from loraweave.errors import InvalidLicense
from loraweave.hub.intake.license_terms import require_one_work
from loraweave.hub.pool import ExpertPool
from loraweave.routers.combined import ByRow
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Router


def warn_of_licenses(weights: MixtureWeights | Router, pool: ExpertPool) -> None:
    """Warns where a row mixes experts whose licenses exclude each other, or derived works; an expert alone is none."""
    licenses = pool.clashing_licenses
    if not licenses:
        return
    for names in _mixed(weights, pool.names):
        try:
            if len(names) > 1:
                require_one_work((name, licenses[name]) for name in names)
        except InvalidLicense as error:
            # of one line of code, Python's default filter shows each text once
            warnings.warn(f"this mixture may be used, but not be given away as one adapter: {error}", stacklevel=1)
            return


def _mixed(weights: MixtureWeights | Router | None, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The experts that each row has weights for; all that it knows where a router decides, or where weights learn."""
    if isinstance(weights, ByRow):
        for router in weights.routers:
            yield from _mixed(router, names)
    elif isinstance(weights, MixtureWeights) and not weights.values_BTLE.requires_grad:
        used_BE = (weights.values_BTLE != 0).flatten(1, 2).any(dim=1)
        for used_E in set(map(tuple, used_BE.tolist())):
            yield tuple(name for name, used in zip(weights.experts, used_E, strict=True) if used)
    elif weights is not None:
        yield weights.experts if isinstance(weights, MixtureWeights) else names
