"""A composition as rows have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraweave.hub.adapter import Adapter


@dataclass(frozen=True, eq=False)
class Served:
    """The weights of a row: `mixture` is {content hash: weight}, `adapters` has these; both empty for the base.

    `canonical` is the formula in its one form, `identity` the hash of what it says with the content of its adapters.
    """

    canonical: str = "base"
    identity: str = "base"
    mixture: Mapping[str, float] = field(default_factory=dict)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
