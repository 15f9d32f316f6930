"""The catalogue's log of changes: for every row the generation that last added, changed or deleted it."""

from __future__ import annotations

from loraweave.hub.stores.protocols import Connection


def note(connection: Connection, seq: int) -> None:
    """Writes down that the row is added, changed or deleted by the transaction at hand."""
    connection.execute(
        "INSERT INTO changes (seq, generation) SELECT ?, generation + 1 FROM state WHERE true "
        "ON CONFLICT (seq) DO UPDATE SET generation = excluded.generation",
        (seq,),
    )
