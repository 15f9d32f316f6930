"""Exact search by pgvector: the database scores every stored vector, and sends only those that can be among the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import loraweave.registry as registry
from loraweave.hub import quarantine
from loraweave.hub.stores.postgres_migrations import MAX_SEARCHED_DIM
from loraweave.hub.stores.protocols import CatalogueStore, Connection, Near
from loraweave.hub.tables import rows, vectors
from loraweave.types import Record

if TYPE_CHECKING:
    import numpy as np


# How far pgvector's fp32 inner product of unit vectors can be from the exact one, with a margin: it adds up some hundreds of
# products one by one, and every sum is rounded to 6e-8 of its size.
_SLACK = 1e-4


class PostgresSearch:
    """The `VectorSearch` of a catalogue on PostgreSQL."""

    def __init__(self, catalogue: CatalogueStore) -> None:
        self._catalogue = catalogue

    def unready(self, embedder: str, limit: int) -> list[Record]:
        with self._catalogue.reading() as connection:
            found = connection.execute(
                "SELECT adapters.seq FROM adapters "
                "LEFT JOIN vectors ON vectors.seq = adapters.seq AND vectors.embedder = ? "
                "WHERE (vectors.seq IS NULL OR vectors.stale) AND adapters.seq NOT IN (SELECT seq FROM quarantine) "
                "ORDER BY adapters.seq LIMIT ?",
                (embedder, limit),
            ).fetchall()
            return [row.record for row in rows.some(connection, [seq for (seq,) in found])]

    def nearest(self, embedder: str, query_D: np.ndarray, k: int, seqs: Sequence[int] | None) -> list[Near] | None:
        import numpy as np

        with self._catalogue.reading() as connection:
            (num_adapters,) = connection.execute("SELECT count(*) FROM adapters").fetchone()
            num_adapters -= quarantine.count(connection)
            num_wanted = min(k, num_adapters if seqs is None else len(seqs))
            if not num_wanted:
                return []
            near = _near(connection, embedder, query_D, num_wanted, seqs)
            if len(near) < num_wanted:
                return None
            # the index that is the reference has the last word on order and score
            index = registry.get("indexes", "flat")(len(query_D))
            index.add(np.stack([key_D for _, _, key_D in near]))
            (scores_K,), (positions_K,) = index.search(query_D[None], num_wanted)
            best = [near[position] for position in positions_K.tolist()]
            records = {row.seq: row.record for row in rows.some(connection, [seq for seq, _, _ in best])}
        return [
            Near(records[seq], text_digest, round(score, 6), key_D)
            for score, (seq, text_digest, key_D) in zip(scores_K.tolist(), best, strict=True)
        ]


def _near(
    connection: Connection, embedder: str, query_D: np.ndarray, k: int, seqs: Sequence[int] | None
) -> list[tuple[int, str, np.ndarray]]:
    """(number, digest of the text, vector) of all that can be among the k best, in order of addition.

    A damaged vector is not among them, nor is one of another size.
    """
    import numpy as np

    among = "" if seqs is None else "AND seq = ANY (CAST(? AS bigint[])) "
    given = [] if seqs is None else [list(seqs)]
    slack = _SLACK * max(1.0, float(np.linalg.norm(query_D)))
    found = connection.execute(
        "WITH scored AS MATERIALIZED ("
        "SELECT seq, CASE WHEN vector_dims(embedding) = ? THEN embedding <#> CAST(? AS vector) END AS distance "
        f"FROM vectors WHERE embedder = ? AND seq NOT IN (SELECT seq FROM quarantine) {among}), "
        "best AS (SELECT distance FROM scored WHERE distance IS NOT NULL ORDER BY distance LIMIT ?) "
        "SELECT seq, text_digest, vector, sha256 FROM vectors JOIN scored USING (seq) "
        "WHERE embedder = ? AND scored.distance <= (SELECT max(distance) FROM best) + ? ORDER BY seq",
        (len(query_D), as_text(query_D), embedder, *given, k, embedder, slack),
    ).fetchall()
    return [
        (seq, text_digest, np.frombuffer(vector, dtype="<f4"))
        for seq, text_digest, vector, digest in found
        if vectors.row_sha256(embedder, seq, text_digest, vector) == digest
    ]


# how many vectors are translated at once: 1,000 of 384 numbers are 1.5 MB here and 4 MB as text
_BATCH = 1000

# as the index of postgres_migrations.py has it
_MISSING = f"embedding IS NULL AND length(vector) <= {4 * MAX_SEARCHED_DIM}"


def make_embeddings(connection: Connection) -> None:
    """Gives every vector without an embedding its own, number for number."""
    while (first := connection.execute(f"SELECT embedder FROM vectors WHERE {_MISSING} LIMIT 1").fetchone()) is not None:
        import numpy as np

        found = connection.execute(
            f"SELECT seq, vector FROM vectors WHERE embedder = ? AND {_MISSING} LIMIT {_BATCH}", first
        ).fetchall()
        connection.execute(
            "UPDATE vectors SET embedding = CAST(made.text AS vector) "
            "FROM unnest(CAST(? AS bigint[]), CAST(? AS text[])) AS made (seq, text) "
            "WHERE vectors.embedder = ? AND vectors.seq = made.seq",
            ([seq for seq, _ in found], [as_text(np.frombuffer(vector, dtype="<f4")) for _, vector in found], *first),
        )


def as_text(vector_D: np.ndarray) -> str:
    """The vector as pgvector reads it, with as many digits as bring the same fp32 numbers back."""
    return f"[{','.join([f'{number:.9g}' for number in vector_D.tolist()])}]"
