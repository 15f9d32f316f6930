"""Versions of one name: the newest is the adapter's row, and those before it keep their records, numbers and blobs.

A superseded version is a copy of the former row in the table `versions`, with the adapter's number in the order of addition.
It is deleted with its adapter, or when it is pruned. `state` counts these rows too, so that a lost one is noticed.
"""

from collections.abc import Iterator
from dataclasses import replace

from loraweave.common.checks import is_whole
from loraweave.common.names import now
from loraweave.errors import AdapterNotFound, HubError
from loraweave.hub.stores.protocols import Connection
from loraweave.hub.tables import rows
from loraweave.types import Record

_COLUMNS = "versions.seq, NULL, versions.hash, versions.record, versions.sha256"
_SELECT = f"SELECT {_COLUMNS}, {rows.BLOB_COLUMNS} FROM versions LEFT JOIN blobs ON blobs.hash = versions.hash"


def supersede(connection: Connection, row: rows.Row, record: Record) -> Record:
    """Make `record`, whose blob has a row already, the adapter's newest version; keep the former newest as superseded."""
    connection.execute(
        "INSERT INTO versions SELECT seq, ?, hash, record, sha256 FROM adapters WHERE seq = ?", (row.record.version, row.seq)
    )
    connection.execute("UPDATE state SET num_versions = num_versions + 1")
    # a vector belongs to the content it was made for
    connection.execute("DELETE FROM vectors WHERE seq = ?", (row.seq,))
    connection.execute("DELETE FROM figures WHERE seq = ?", (row.seq,))
    return rows.change(connection, row, record)


def superseded(connection: Connection, row: rows.Row) -> list[rows.Row]:
    """Return the versions before the newest, oldest first, under the current name. Raises HubCorrupt if one is damaged."""
    numbers = connection.execute("SELECT version FROM versions WHERE seq = ? ORDER BY version", (row.seq,)).fetchall()
    older = (at(connection, row.seq, number) for (number,) in numbers)
    return [replace(old, record=replace(old.record, name=row.record.name)) for old in older if old is not None]


def chosen(connection: Connection, row: rows.Row, version: int) -> rows.Row:
    """Return the row of the version with this number, newest or not. Raises AdapterNotFound, which lists the versions."""
    known = [*superseded(connection, row), row]
    for one in known:
        if one.record.version == version and not isinstance(version, bool):
            return one
    listed = ", ".join(str(one.record.version) for one in known[-20:])
    raise AdapterNotFound(f"adapter {row.record.name!r} has no version {version!r}; it has {listed}")


def at(connection: Connection, seq: int, version: int) -> rows.Row | None:
    """Return the row of a superseded version, under the name it had then, or None. Raises HubCorrupt if it is damaged."""
    row = connection.execute(f"{_SELECT} WHERE versions.seq = ? AND versions.version = ?", (seq, version)).fetchone()
    return None if row is None else rows.decode_version(row, version)


def every(connection: Connection) -> Iterator[tuple[int, int]]:
    """Yield (seq, version) of every superseded version."""
    yield from connection.execute("SELECT seq, version FROM versions ORDER BY seq, version").fetchall()


def prune(connection: Connection, row: rows.Row, keep: int) -> int:
    """Forget all versions but the newest `keep`, and return how many. Raises HubError if `keep` is below 1."""
    if not is_whole(keep, 1):
        raise HubError(
            f"pruning adapter {row.record.name!r}: keep is {keep!r}, but at least 1 version stays; hub.remove() takes all"
        )
    return forget(connection, row, keep - 1)


def forget(connection: Connection, row: rows.Row, keep: int = 0) -> int:
    """Forget all superseded versions but the newest `keep`, and return how many. The blobs stay for gc."""
    numbers = connection.execute("SELECT version FROM versions WHERE seq = ? ORDER BY version DESC", (row.seq,)).fetchall()
    dropped = numbers[keep:]
    if dropped:
        (newest,) = dropped[0]
        connection.execute("DELETE FROM versions WHERE seq = ? AND version <= ?", (row.seq, newest))
        connection.execute("UPDATE state SET num_versions = num_versions - ?", (len(dropped),))
    return len(dropped)


def restore(connection: Connection, row: rows.Row, version: int) -> Record:
    """Make an older version's record and content the newest version, unless they already are; return the newest record."""
    old = chosen(connection, row, version).record
    newest = row.record
    if replace(old, version=newest.version, created=newest.created, restored=newest.restored) == newest:
        return newest
    fresh = replace(old, version=newest.version + 1, created=now(), restored=version)
    return supersede(connection, row, fresh)
