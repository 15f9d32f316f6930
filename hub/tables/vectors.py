"""Embeddings in the catalogue: one vector per adapter and embedder, so that a search need not embed every text.

`read_changes` reads page by page what changed since a generation, with its embedding: an index reads no more than that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from loraweave.errors import DimensionMismatch
from loraweave.hub.stores.catalogue import state_row
from loraweave.hub.stores.protocols import Connection
from loraweave.hub.tables import rows

if TYPE_CHECKING:
    import numpy as np


def read_vectors(connection: Connection, embedder: str) -> dict[str, tuple[str, np.ndarray]]:
    """Map each adapter's name to (digest of the embedded text, fp32 vector), in order of addition, without damaged rows."""
    names = dict(connection.execute("SELECT seq, name FROM adapters ORDER BY seq").fetchall())
    stored = vectors_at(connection, embedder, list(names))
    return {names[seq]: (text_digest, vector.copy()) for seq, (text_digest, vector) in stored.items()}


def vectors_at(connection: Connection, embedder: str, seqs: Sequence[int]) -> dict[int, tuple[str, np.ndarray]]:
    """Map each adapter's seq to (digest of the embedded text, fp32 vector); missing and damaged vectors are left out."""
    # numpy takes 0.1 s to import, which listing a hub need not pay
    import numpy as np

    select = "SELECT seq, text_digest, vector, sha256 FROM vectors WHERE embedder = ? AND seq"
    return {
        seq: (text_digest, np.frombuffer(vector, dtype="<f4"))
        for seq, text_digest, vector, digest in rows.at_seqs(connection, select, seqs, (embedder,))
        if row_sha256(embedder, seq, text_digest, vector) == digest
    }


def write_vectors(connection: Connection, embedder: str, made: Sequence[tuple[str, str, np.ndarray]]) -> None:
    """Store (name, digest of the text, vector) rows, except for names that no longer exist.

    Vectors of another size under the same embedder are dropped: they came from another version of it. Raises
    DimensionMismatch for vectors that differ in size, are not one-dimensional or not finite.
    """
    import numpy as np

    vectors = [np.ascontiguousarray(vector, dtype="<f4") for _, _, vector in made]
    for (name, _, _), vector in zip(made, vectors, strict=True):
        if vector.ndim != 1 or vector.shape != vectors[0].shape or not vector.size:
            raise DimensionMismatch(
                f"the vector of {name!r} from embedder {embedder!r} has shape {vector.shape}, the first {vectors[0].shape}; "
                "vectors of one embedder have one axis of one size"
            )
        if not np.isfinite(vector).all():
            raise DimensionMismatch(f"the vector of {name!r} from embedder {embedder!r} is not finite")
    if vectors:
        # all stored ones have one size, since every call ensures it: checking each would cost a scan of the table
        one = connection.execute("SELECT length(vector) FROM vectors WHERE embedder = ? LIMIT 1", (embedder,)).fetchone()
        if one is not None and one[0] != vectors[0].nbytes:
            connection.execute("DELETE FROM vectors WHERE embedder = ?", (embedder,))
    for (name, text_digest, _), vector in zip(made, vectors, strict=True):
        row = connection.execute("SELECT seq FROM adapters WHERE name = ?", (name,)).fetchone()
        if row is not None:
            data = vector.tobytes()
            connection.execute(
                "INSERT INTO vectors (embedder, seq, text_digest, vector, sha256) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (embedder, seq) DO UPDATE SET "
                "text_digest = excluded.text_digest, vector = excluded.vector, sha256 = excluded.sha256",
                (embedder, row[0], text_digest, data, row_sha256(embedder, row[0], text_digest, data)),
            )


def row_sha256(embedder: str, seq: int, text_digest: str, vector: bytes) -> str:
    """Return the digest that a stored vector is checked by, over its embedder, adapter, text and bytes."""
    digest = hashlib.sha256(repr((embedder, seq, text_digest)).encode())
    digest.update(vector)
    return digest.hexdigest()


# the plus keeps SQLite from scanning all rows in order of seq instead of using the index of generations
CHANGED = "SELECT seq FROM changes WHERE generation > ? AND +seq > ? ORDER BY +seq LIMIT ?"


class Change(NamedTuple):
    """An adapter's number in the order of addition, the texts of its search keys, and its stored vector, if any.

    `said` is None for an adapter that was removed or quarantined. `vector` is (digest of the embedded text, fp32 vector).
    """

    seq: int
    said: rows.Said | None
    vector: tuple[str, np.ndarray] | None


@dataclass(frozen=True, eq=False)
class Changes:
    """A page of changes, by ascending seq, and the state of the catalogue when it was read.

    `identity` is different for every catalogue, so that generations of two are never compared.
    """

    identity: str
    generation: int
    num_adapters: int
    page: tuple[Change, ...]


def read_changes(connection: Connection, embedder: str, *, since: int, after: int, limit: int, where: str) -> Changes:
    """Return the first `limit` adapters with a seq above `after` that changed after generation `since`; 0 gives all."""
    identity, generation, num_adapters = state_row(connection, "identity, generation, num_adapters", where)
    if since:
        seqs = [seq for (seq,) in connection.execute(CHANGED, (since, after, limit)).fetchall()]
    else:
        every = "SELECT seq FROM adapters WHERE seq > ? ORDER BY seq LIMIT ?"
        seqs = [seq for (seq,) in connection.execute(every, (after, limit)).fetchall()]
    # a quarantined adapter counts as removed until its release
    said = rows.said(connection, seqs)
    stored = vectors_at(connection, embedder, list(said))
    page = [Change(seq, said.get(seq), stored.get(seq)) for seq in seqs]
    return Changes(str(identity), int(generation), int(num_adapters) - rows.num_quarantined(connection), tuple(page))
