"""Rows of stored compositions: under a name the files of a folder, each by the sha256 of its bytes."""

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
    """`files` maps each path in the folder to (sha256, size in bytes); `hash` is that of paths and bytes together."""

    name: str
    created: str
    files: Mapping[str, tuple[str, int]]

    @property
    def hash(self) -> str:
        return text_digest(json.dumps(sorted((path, digest) for path, (digest, _) in self.files.items())))


def find(connection: Connection, name: str) -> CompositionRow | None:
    """The row of that name. HubCorrupt when it is damaged."""
    found = connection.execute(f"{_SELECT} WHERE name = ?", (name,)).fetchone()
    return None if found is None else _decode(found)


def every(connection: Connection) -> Iterator[CompositionRow]:
    """All rows in the order of their names. HubCorrupt at the first that is damaged."""
    for found in connection.execute(f"{_SELECT} ORDER BY name").fetchall():
        yield _decode(found)


def names(connection: Connection) -> list[str]:
    """The names in their order; no row is read."""
    return [name for (name,) in connection.execute("SELECT name FROM compositions ORDER BY name").fetchall()]


def put(connection: Connection, row: CompositionRow) -> None:
    """Stores the row, whose files are there, in place of one of its name."""
    delete(connection, row.name)
    text = json.dumps([row.name, row.created, row.files], sort_keys=True, separators=(",", ":"))
    connection.execute(
        "INSERT INTO compositions (name, hash, record, sha256) VALUES (?, ?, ?, ?)",
        (row.name, row.hash, text, text_digest(text)),
    )
    connection.execute("UPDATE state SET num_compositions = num_compositions + 1")


def delete(connection: Connection, name: str) -> bool:
    """Removes the row of that name; whether there was one. Its files stay for gc."""
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
