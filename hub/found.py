"""What a search of a hub found, and what a notebook shows of a hub."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from loraweave.hub.tables.filtering import Filters
from loraweave.types import Candidate

if TYPE_CHECKING:
    from loraweave.hub.hub import Hub


# rows of a hub in a notebook
SHOWN = 20


class Found(list[Candidate]):
    """Candidates, best first, and the hub that has their adapters."""

    def __init__(self, candidates: Iterable[Candidate], hub: Hub) -> None:
        super().__init__(candidates)
        self.hub = hub

    def __reduce__(self) -> tuple[type[list[Candidate]], tuple[list[Candidate]]]:
        # a hub stays where its files are open
        return list, (list(self),)

    def _repr_html_(self) -> str:
        from loraweave.hub.shown_table import ShownTable

        rows = [(each.name, each.score, each.evidence) for each in self]
        return ShownTable.of(("adapter", "score", "evidence"), rows)._repr_html_()


def html_of_hub(hub: Hub) -> str:
    """A table of the first adapters, and how many there are."""
    from loraweave.hub.shown_table import ShownTable

    seqs = hub.seqs(Filters())
    found = hub.records_at(seqs[:SHOWN])
    records = [found[seq] for seq in seqs[:SHOWN] if seq in found]
    title = f"{hub!r}: {len(seqs):,} adapters" + (f", the first {SHOWN}" if len(seqs) > SHOWN else "")
    rows = [(r.name, r.rank, r.base_model, r.license or "", ", ".join(r.tags), r.description) for r in records]
    return ShownTable.of(("name", "rank", "base model", "license", "tags", "description"), rows, title=title)._repr_html_()
