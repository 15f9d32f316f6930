"""The figures of the hub's adapters as rows, so that a new one meets a sample of its kin and its near-duplicates at once.

The sample is those whose content hashes are smallest: random, the same whatever the order of addition, and found by an
index without looking at the others. Near-duplicates share at least one of eight pieces of their sketches' codes, each of
which is indexed. Neither look-up takes longer as the hub grows.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraweave.hub.health.figures import CODE_BITS, Figures, hamming
from loraweave.hub.stores.protocols import Connection

NUM_REFERENCE = 256
NUM_PIECES = 8
MAX_LOOKED_AT = 256
# bits that differ between adapters with cosine 0.99 are 4.5 % of all, give or take 1.8 %
MAX_DISTANCE = 16

_PIECE_BYTES = CODE_BITS // 8 // NUM_PIECES
_PIECES = tuple(f"piece_{number}" for number in range(NUM_PIECES))


def store_figures(connection: Connection, name: str, content_hash: str, figures: Figures) -> None:
    """Stores or replaces the figures of the adapter of that name."""
    (seq,) = connection.execute("SELECT seq FROM adapters WHERE name = ?", (name,)).fetchone()
    values = np.stack([figures.log_norm_L, figures.dominance_L]).astype("<f4").tobytes()
    connection.execute("DELETE FROM figures WHERE seq = ?", (seq,))
    connection.execute(
        f"INSERT INTO figures (seq, kin, hash, numbers, code, {', '.join(_PIECES)}) "
        f"VALUES (?, ?, ?, ?, ?, {', '.join('?' * NUM_PIECES)})",
        (seq, figures.kin, content_hash, values, figures.code, *_keys(figures)),
    )


def reference(connection: Connection, figures: Figures, content_hash: str) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """(log norms, dominances) by layer of a sample of the kin, without this content and what is in quarantine."""
    found = connection.execute(
        "SELECT numbers FROM figures WHERE kin = ? AND hash <> ? "
        "AND NOT EXISTS (SELECT 1 FROM quarantine WHERE quarantine.seq = figures.seq) "
        f"ORDER BY hash LIMIT {NUM_REFERENCE}",
        (figures.kin, content_hash),
    ).fetchall()
    expected = 8 * len(figures.layers)
    # rows of another size come from a damaged page, and are no reason to fail
    arrays = [np.frombuffer(bytes(data), "<f4").reshape(2, -1).astype(float) for (data,) in found if len(data) == expected]
    return [(array[0], array[1]) for array in arrays]


def alike(connection: Connection, figures: Figures, name: str) -> list[str]:
    """Names of other adapters whose sketches are near this one's, the nearest first."""
    distances: dict[str, int] = {}
    for piece, key in zip(_PIECES, _keys(figures), strict=True):
        found = connection.execute(
            f"SELECT adapters.name, figures.code FROM figures JOIN adapters ON adapters.seq = figures.seq "
            f"WHERE figures.{piece} = ? AND figures.kin = ? LIMIT {MAX_LOOKED_AT}",
            (key, figures.kin),
        ).fetchall()
        distances.update({other: hamming(bytes(code), figures.code) for other, code in found if other != name})
    near = [other for other, distance in distances.items() if distance <= MAX_DISTANCE]
    return sorted(near, key=lambda other: (distances[other], other))


def _keys(figures: Figures) -> list[int]:
    """A number for each piece of the code, signed with 64 bits as databases have them; kins do not meet by chance."""
    keys = []
    for number in range(NUM_PIECES):
        piece = figures.code[number * _PIECE_BYTES : (number + 1) * _PIECE_BYTES]
        digest = hashlib.sha256(f"{figures.kin} {number} {piece.hex()}".encode()).digest()
        keys.append(int.from_bytes(digest[:8], signed=True))
    return keys
