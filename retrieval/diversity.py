"""Candidates that fit and differ: maximal marginal relevance (Carbonell and Goldstein 1998)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loraweave.hub.search import Hit


def diverse(hits: Sequence[Hit], num_wanted: int, diversity: float) -> list[Hit]:
    """The hits that are chosen, in their original order (by score)."""
    if not hits or not num_wanted:
        return []
    keys_ND = np.stack([hit.key_D for hit in hits]).astype(np.float64)
    scores_N = np.array([hit.score for hit in hits])
    open_N = np.ones(len(hits), dtype=bool)
    # the first is the best fit at any diversity: there is nothing yet that it could resemble
    nearest_N = np.full(len(hits), -np.inf)
    chosen = [0]
    while len(chosen) < min(num_wanted, len(hits)):
        open_N[chosen[-1]] = False
        nearest_N = np.maximum(nearest_N, keys_ND @ keys_ND[chosen[-1]])
        gain_N = (1 - diversity) * scores_N - diversity * nearest_N
        chosen.append(int(np.argmax(np.where(open_N, gain_N, -np.inf))))
    return [hits[position] for position in sorted(chosen)]
