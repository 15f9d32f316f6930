"""Rows of stored compositions: a name, and the files of a folder, each by the sha256 of its bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loraweave.common.names import text_digest
from loraweave.errors import HubCorrupt
from loraweave.hub.stores.protocols import Connection

_SELECT = "SELECT name, hash, record, sha256 FROM compositions"


@dataclass(frozen=True)
class CompositionRow:
    """A stored composition. `files` maps each path in its folder to (sha256, size in bytes)."""

    name: str
    created: str
    files: Mapping[str, tuple[str, int]]

    @property
    def hash(self) -> str:
        return text_digest(json.dumps(sorted((path, digest) for path, (digest, _) in self.files.items())))


def find(connection: Connection, name: str) -> CompositionRow | None:
    """Return the row with that name, or None. Raises HubCorrupt if it is damaged."""
    row = connection.execute(f"{_SELECT} WHERE name = ?", (name,)).fetchone()
    return None if row is None else _decode(row)


def every(connection: Connection) -> Iterator[CompositionRow]:
    """Yield all rows in the order of their names. Raises HubCorrupt at the first that is damaged."""
    for row in connection.execute(f"{_SELECT} ORDER BY name").fetchall():
        yield _decode(row)


def names(connection: Connection) -> list[str]:
    """Return the names in order, without reading the rows."""
    return [name for (name,) in connection.execute("SELECT name FROM compositions ORDER BY name").fetchall()]


def put(connection: Connection, row: CompositionRow) -> None:
    """Store the row, whose files are in the store, in place of the row with its name."""
    delete(connection, row.name)
    text = json.dumps([row.name, row.created, row.files], sort_keys=True, separators=(",", ":"))
    connection.execute(
        "INSERT INTO compositions (name, hash, record, sha256) VALUES (?, ?, ?, ?)",
        (row.name, row.hash, text, text_digest(text)),
    )
    connection.execute("UPDATE state SET num_compositions = num_compositions + 1")


def delete(connection: Connection, name: str) -> bool:
    """Remove the row with that name, and return whether there was one. Its files stay for gc."""
    if connection.execute("SELECT 1 FROM compositions WHERE name = ?", (name,)).fetchone() is None:
        return False
    connection.execute("DELETE FROM compositions WHERE name = ?", (name,))
    connection.execute("UPDATE state SET num_compositions = num_compositions - 1")
    return True


def _decode(found: tuple[Any, ...]) -> CompositionRow:
    name, content_hash, text, digest = found
    if not isinstance(text, str) or text_digest(text) != digest:
        raise HubCorrupt(f"the row of composition {name!r} in the catalogue is damaged; save the composition again")
    told, created, files = json.loads(text)
    row = CompositionRow(told, created, {path: (str(sha256), int(size)) for path, (sha256, size) in files.items()})
    if (told, row.hash) != (name, content_hash):
        raise HubCorrupt(f"the row of composition {name!r} in the catalogue is damaged: its record is of {told!r}")
    return row
