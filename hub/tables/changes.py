"""What changed in a catalogue since a generation, read page by page: work for what changed, not for what is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraweave.hub import quarantine
from loraweave.hub.stores.catalogue import state_row
from loraweave.hub.stores.protocols import Connection
from loraweave.hub.tables import rows, vectors
from loraweave.types import Record

if TYPE_CHECKING:
    import numpy as np

# the plus keeps SQLite from walking through all rows in their order instead of finding those of late generations
CHANGED = "SELECT seq FROM changes WHERE generation > ? AND +seq > ? ORDER BY +seq LIMIT ?"


@dataclass(frozen=True, eq=False)
class Change:
    """An adapter's place in the order of addition, its record, and its stored vector, if any.

    `record` is None for one that is gone or in quarantine, `vector` is (digest of the text that was embedded, fp32 vector).
    """

    seq: int
    record: Record | None
    vector: tuple[str, np.ndarray] | None


@dataclass(frozen=True, eq=False)
class Changes:
    """A page of changes, by ascending seq, and the state of the catalogue at the moment it was read.

    `identity` is another for every catalogue, so that generations of two are never compared.
    """

    identity: str
    generation: int
    num_adapters: int
    page: tuple[Change, ...]


def read_changes(connection: Connection, embedder: str, *, since: int, after: int, limit: int, where: str) -> Changes:
    """The next `limit` changes later than generation `since`, of rows above `after`; since 0 it is every adapter."""
    identity, generation, num_adapters = state_row(connection, "identity, generation, num_adapters", where)
    if since:
        seqs = [seq for (seq,) in connection.execute(CHANGED, (since, after, limit)).fetchall()]
    else:
        every = "SELECT seq FROM adapters WHERE seq > ? ORDER BY seq LIMIT ?"
        seqs = [seq for (seq,) in connection.execute(every, (after, limit)).fetchall()]
    # one that was put in quarantine is as good as gone until its release
    records = {row.seq: row.record for row in rows.some(connection, seqs) if not row.record.quarantined}
    stored = vectors.vectors_at(connection, embedder, list(records))
    page = [Change(seq, records.get(seq), stored.get(seq)) for seq in seqs]
    return Changes(str(identity), int(generation), int(num_adapters) - quarantine.count(connection), tuple(page))
