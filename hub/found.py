"""What a search of a hub found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from loraweave.types import Candidate

if TYPE_CHECKING:
    from loraweave.hub.hub import Hub


class Found(list[Candidate]):
    """Candidates, best first, and the hub that has their adapters."""

    def __init__(self, candidates: Iterable[Candidate], hub: Hub) -> None:
        super().__init__(candidates)
        self.hub = hub
