"""What adapters are searched by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraweave.hub.adapter import Adapter


@dataclass(frozen=True, eq=False)
class Query:
    """Inputs of one task, their outputs where known (one for each input, empty where it has none; or none at all), its
    description, an adapter.

    A key compares what it knows; a query that lacks that part gets no opinion from it.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    description: str = ""
    adapter: Adapter | None = None
