"""Checks everything a hub holds: the database, every row's own digest, every blob's bytes and content."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

from loraweave.errors import HubError
from loraweave.hub import rows, vectors
from loraweave.hub.blobs import read_blob
from loraweave.hub.stores import BlobStore, CatalogueStore, Connection


@dataclass(frozen=True)
class Verification:
    """What is wrong, one sentence each; which adapters are whole; and which blobs no row names (gc removes those)."""

    problems: tuple[str, ...]
    intact: tuple[str, ...]
    orphans: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(catalogue: CatalogueStore, blobs: BlobStore) -> Verification:
    """Reads every row and every blob. Damage is reported, not raised."""
    problems: list[str] = []
    found: list[rows.Row] = []
    try:
        with catalogue.reading() as connection:
            problems += catalogue.problems(connection)
            for seq in [seq for (seq,) in connection.execute("SELECT seq FROM adapters ORDER BY seq").fetchall()]:
                found += _row(connection, seq, problems)
            problems += _vector_problems(connection)
            counted = connection.execute("SELECT num_adapters FROM state").fetchone()
            listed = connection.execute("SELECT count(*) FROM adapters").fetchone()
            if counted != listed:
                problems.append(
                    f"the catalogue has the rows of {listed[0]} adapters, but {counted and counted[0]} were added"
                )
    except HubError as error:
        problems.append(str(error))
    intact = []
    for row in found:
        faults = list(_blob_problems(blobs, row))
        problems += faults
        if not faults:
            intact.append(row.record.name)
    named = {row.blob.hash for row in found}
    orphans = tuple(content_hash for content_hash in blobs.names() if content_hash not in named)
    return Verification(tuple(problems), tuple(intact), orphans)


def _row(connection: Connection, seq: int, problems: list[str]) -> list[rows.Row]:
    try:
        row = rows.at(connection, seq)
    except (HubError, sqlite3.Error, UnicodeDecodeError) as error:
        problems.append(f"row {seq}: {error}")
        return []
    if row is None:
        problems.append(f"row {seq} is listed by an index of the catalogue, but cannot be found")
        return []
    return [row]


def _vector_problems(connection: Connection) -> Iterator[str]:
    columns = "SELECT embedder, seq, text_digest, vector, sha256 FROM vectors"
    for embedder, seq, text_digest, vector, digest in connection.execute(columns).fetchall():
        if vectors.row_sha256(embedder, seq, text_digest, vector) != digest:
            yield f"the vector of row {seq} from embedder {embedder!r} is damaged; the next search makes it anew"


def _blob_problems(blobs: BlobStore, row: rows.Row) -> Iterator[str]:
    who = f"adapter {row.record.name!r}"
    place = blobs.place(row.blob.hash)
    try:
        blobs.require(row.blob.hash, row.blob.file_sha256, who)
        content = read_blob(blobs.local(row.blob.hash, row.blob.file_sha256, who), who).content_hash()
    except FileNotFoundError:
        yield f"{who}: blob {place} is missing; add the adapter again from its source"
    except (HubError, OSError) as error:
        yield str(error)
    else:
        if content != row.record.hash:
            yield f"{who}: the content of blob {place} has the hash {content}, not {row.record.hash}"
