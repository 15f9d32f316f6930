"""Nearness in weight space: the cosine between two adapters' updates, from their factors alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable

from loraweave.errors import AdapterCorrupt, AdapterNotFound, AdapterQuarantined
from loraweave.hub.adapter import Adapter
from loraweave.hub.search.search import checked_count
from loraweave.lowrank import algebra
from loraweave.types import Candidate, Factors, Record


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


def cosine(left: Adapter, right: Adapter) -> tuple[float, int]:
    """Return <D_left, D_right> / (|D_left| |D_right|) over all layers, D = b a, and the number of layers that both update.

    A layer that only one of them updates counts in its norm. Gains, biases and magnitudes are left out.
    """
    shared = [layer for layer in left.layers if layer in right.layers and _fits(left.layers[layer], right.layers[layer])]
    product = sum(algebra.inner(left.layers[layer], right.layers[layer]) for layer in shared)
    size = _norm(left) * _norm(right)
    return (product / size if size else 0.0), len(shared)


def _norm(adapter: Adapter) -> float:
    return math.hypot(*(algebra.norm(factors) for factors in adapter.layers.values()))


def _fits(left: Factors, right: Factors) -> bool:
    # adapters of other base models may use the same module paths with other sizes
    return left.a_RI.shape[1] == right.a_RI.shape[1] and left.b_OR.shape[0] == right.b_OR.shape[0]
