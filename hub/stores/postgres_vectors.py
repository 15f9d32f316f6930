"""pgvector's side of the stored vectors: made from their bytes in the transaction that stores them, and searched by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraweave.hub.stores.postgres_migrations import MAX_SEARCHED_DIM
from loraweave.hub.stores.protocols import Connection

if TYPE_CHECKING:
    import numpy as np

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
