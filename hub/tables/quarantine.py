"""Quarantine: an adapter stays stored and its name taken, but nothing finds or reads it until it is released.

The record has the flag; the table `quarantine` repeats it, so that counting need not read every record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from loraweave.errors import AdapterQuarantined
from loraweave.hub.stores.protocols import Connection
from loraweave.types import Record


def mark(connection: Connection, record: Record) -> None:
    """Write the quarantine flag of the record, whose row is there, to the table."""
    chosen = "(SELECT seq FROM adapters WHERE name = ?)"
    connection.execute(f"DELETE FROM quarantine WHERE seq = {chosen}", (record.name,))
    if record.quarantined:
        connection.execute("INSERT INTO quarantine (seq) SELECT seq FROM adapters WHERE name = ?", (record.name,))


def count(connection: Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM quarantine").fetchone()[0])


def seqs(connection: Connection) -> list[int]:
    """Return the numbers of the adapters in quarantine, in the order of addition."""
    return [seq for (seq,) in connection.execute("SELECT seq FROM quarantine ORDER BY seq").fetchall()]


def require_released(record: Record) -> None:
    """Raise AdapterQuarantined, with the record's anomalies, if the adapter is in quarantine."""
    if record.quarantined:
        reasons = "; ".join(anomaly.detail for anomaly in record.anomalies) or "it was put there by hand"
        raise AdapterQuarantined(
            f"adapter {record.name!r} is in quarantine: {reasons}; look at it with hub.get({record.name!r}, "
            f"quarantined=True), and hub.release({record.name!r}) if it is sound"
        )


def problems(connection: Connection, seqs: Iterable[tuple[int, bool]]) -> Iterator[str]:
    """Yield a sentence for each disagreement of the table with the records, given as (seq, whether in quarantine)."""
    marked = {seq for (seq,) in connection.execute("SELECT seq FROM quarantine").fetchall()}
    for seq, quarantined in seqs:
        if quarantined != (seq in marked):
            yield f"row {seq} {'is' if quarantined else 'is not'} in quarantine, and the table of those says the opposite"
