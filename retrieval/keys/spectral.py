"""The singular directions of two adapters' updates, weighted by their singular values, from a small sketch of the weights.

Each layer's update b a is multiplied by a fixed random matrix on either side, which needs no dense update; the inner product
of two sketches is that of the updates on average (Johnson and Lindenstrauss 1984), and layers are independent of each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from loraweave.hub.embedders._embedder import unit
from loraweave.retrieval.query import KeySpace, Query
from loraweave.types import Record

if TYPE_CHECKING:
    from loraweave.hub.adapter import Adapter

SIDE = 24
ID = f"spectral:1:{SIDE}"


class Spectral:
    """An estimate, to a few hundredths, of the cosine of two adapters' updates over all layers, from 576 numbers each."""

    def scores(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray:
        if query.adapter is None or not records:
            return np.full(len(records), np.nan)
        sketches_ND = space.stored(ID, records, sketch)
        scores_N: np.ndarray = np.clip(sketches_ND @ sketch(query.adapter).astype(np.float64), -1.0, 1.0)
        return scores_N


def sketch(adapter: Adapter) -> np.ndarray:
    """Sketch the adapter's updates as a unit vector (576,), without gains, biases and magnitudes."""
    total_MM = np.zeros((SIDE, SIDE))
    for layer, factors in sorted(adapter.layers.items()):
        a_RI, b_OR = factors.a_RI.double().numpy(), factors.b_OR.double().numpy()
        left_MO, right_MI = _random(f"{layer}/out", b_OR.shape[0]), _random(f"{layer}/in", a_RI.shape[1])
        total_MM += (left_MO @ b_OR) @ (a_RI @ right_MI.T)
    return unit(total_MM.ravel())


@lru_cache(maxsize=512)
def _random(name: str, width: int) -> np.ndarray:
    """Draw the Gaussian matrix (SIDE, width) that belongs to one side of one layer, always the same."""
    seed = int.from_bytes(hashlib.sha256(f"{name}/{width}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=seed)).standard_normal((SIDE, width), dtype=np.float32)
