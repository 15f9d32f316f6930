"""Nearness in weight space: the cosine between two adapters' updates, from their factors alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

from loraweave.errors import AdapterCorrupt, AdapterNotFound, AdapterQuarantined
from loraweave.hub.adapter import Adapter, cosine
from loraweave.hub.search.search import checked_count
from loraweave.types import Candidate, Record


def most_similar(own: Adapter, records: Iterable[Record], read: Callable[[str], Adapter], k: int) -> list[Candidate]:
    """Return the k adapters opened by `read` whose updates have the largest cosine with `own`'s; see `Hub.similar`."""
    count = checked_count(k)
    candidates = []
    for record in records:
        if record.name == own.name:
            continue
        try:
            other = read(record.name)
        except (AdapterCorrupt, AdapterNotFound, AdapterQuarantined) as error:
            warnings.warn(f"left out of the comparison with {own.name!r}: {error}", stacklevel=3)
            continue
        score, num_shared = cosine(own, other)
        if num_shared:
            evidence = f"updates {num_shared} of the {len(own.layers)} layers of {own.name!r}"
            candidates.append(Candidate(record.name, score, evidence, record))
    return sorted(candidates, key=lambda candidate: -candidate.score)[:count]
