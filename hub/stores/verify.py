"""Verification of a whole hub: the database, every row's own digest, every blob's bytes and content."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from loraweave.common.spread import spreader
from loraweave.errors import HubError
from loraweave.hub import compositions
from loraweave.hub.stores.blobs import read_blob
from loraweave.hub.stores.folder_blobs import blob_fault, file_problems
from loraweave.hub.stores.protocols import BlobStore, CatalogueStore, Connection
from loraweave.hub.tables import rows, vectors, versions
from loraweave.types import Record


@dataclass(frozen=True)
class Verification:
    """The problems, one sentence each; the names of intact adapters; and orphans, the blobs without a row, which gc removes.

    An adapter whose newest version is intact counts as intact; damage to a superseded one is a separate problem.
    """

    problems: tuple[str, ...]
    intact: tuple[str, ...]
    orphans: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


# errors of reading a damaged row
DAMAGE = (HubError, sqlite3.Error, ValueError)

# a blob, the content hash in its record, and its owner, for messages
BlobCheck = tuple[rows.BlobRow, str, str]
# yields a sentence for each problem of some records
Check = Callable[[Sequence[Record]], Iterable[str]]


def verify(
    hub: compositions.CompositionShelf, index_problems: Callable[[], Iterable[str]], also: Check | None, n_jobs: int | None
) -> Verification:
    """Read every row and every blob, and report damage without raising; `index_problems` checks the search index's files.

    `also`, if any, checks the records of all adapters. With `n_jobs`, an extension's workers read the newest blobs.
    """
    workers = spreader("reading", n_jobs)
    catalogue, blobs = hub._catalogue, hub._blobs
    problems: list[str] = []
    newest: list[rows.Row] = []
    older: list[rows.Row] = []
    kept: list[compositions.CompositionRow] = []
    with _told(problems), catalogue.reading() as connection:
        problems += catalogue.problems(connection)
        for (seq,) in connection.execute("SELECT seq FROM adapters ORDER BY seq").fetchall():
            with _told(problems, f"row {seq}: ", DAMAGE):
                newest += _row(connection, seq, problems)
        for seq, version in versions.every(connection):
            with _told(problems, f"version {version} of row {seq}: ", DAMAGE):
                older += filter(None, [versions.at(connection, seq, version)])
        problems += _vector_problems(connection)
        problems += _count_problems(connection)
        problems += rows.quarantine_problems(connection, [(row.seq, row.record.quarantined) for row in newest])
    with _told(problems), catalogue.reading() as connection:
        for name in compositions.names(connection):
            with _told(problems, "", DAMAGE):
                kept += filter(None, [compositions.find(connection, name)])
    problems += index_problems()
    problems += () if also is None else also([row.record for row in newest])
    intact = []
    files: dict[str, str] = {}
    checks = [(row.blob, row.record.hash, f"adapter {row.record.name!r}") for row in newest]
    read: Iterable[Iterable[str]] = (blob_problems(blobs, check) for check in checks)
    if workers is not None:
        read = workers.problems_of_blobs(hub, checks, n_jobs)
    for row, blob_faults in zip(newest, read, strict=True):
        faults = [*blob_faults, *file_problems(blobs, row.record, files)]
        if not faults:
            intact.append(row.record.name)
        elif _stands(catalogue, row):
            problems += faults
    seen = {row.blob.hash for row in newest}
    for row in older:
        # one blob serves several versions, and is read and reported once
        if row.blob.hash not in seen:
            seen.add(row.blob.hash)
            who = f"version {row.record.version} of adapter {row.record.name!r}"
            faults = list(blob_problems(blobs, (row.blob, row.record.hash, who)))
            problems += faults if faults and _stands(catalogue, row) else []
        faults = list(file_problems(blobs, row.record, files))
        problems += faults if faults and _stands(catalogue, row) else []
    for stored in kept:
        for path, (digest, _) in stored.files.items():
            if fault := blob_fault(blobs, digest, files):
                problems.append(f"{path} of composition {stored.name!r}: {fault}; save the composition again")
    orphans = tuple(name for name in blobs.names() if name not in seen and name not in files)
    return Verification(tuple(problems), tuple(intact), orphans)


@contextmanager
def _told(problems: list[str], what: str = "", kinds: tuple[type[Exception], ...] = (HubError,)) -> Iterator[None]:
    """Catch errors of these kinds inside the block and add them to `problems`, after the text `what`."""
    try:
        yield
    except kinds as error:
        problems.append(f"{what}{error}")


def _row(connection: Connection, seq: int, problems: list[str]) -> list[rows.Row]:
    row = rows.at(connection, seq)
    if row is None:
        problems.append(f"row {seq} is listed by an index of the catalogue, but cannot be found")
        return []
    stored = connection.execute("SELECT kind, value FROM labels WHERE seq = ?", (seq,)).fetchall()
    if set(stored) != rows.labels(row.record):
        problems.append(f"row {seq}: the labels of adapter {row.record.name!r}, which filters ask for, are not its record's")
    return [row]


def _count_problems(connection: Connection) -> Iterator[str]:
    columns = "num_adapters, num_versions, num_compositions"
    counted = connection.execute(f"SELECT {columns} FROM state").fetchone() or (None,) * 3
    tables = {"adapters": "adapters", "versions": "superseded versions", "compositions": "compositions"}
    for number, (table, what) in zip(counted, tables.items(), strict=True):
        (listed,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
        if number != listed:
            yield f"the catalogue has the rows of {listed} {what}, but {number} were added"


def _vector_problems(connection: Connection) -> Iterator[str]:
    columns = "SELECT embedder, seq, text_digest, vector, sha256 FROM vectors"
    for embedder, seq, text_digest, vector, digest in connection.execute(columns).fetchall():
        if vectors.row_sha256(embedder, seq, text_digest, vector) != digest:
            yield f"the vector of row {seq} from embedder {embedder!r} is damaged; the next search makes it again"


def blob_problems(blobs: BlobStore, check: BlobCheck) -> Iterator[str]:
    """Yield a sentence for each problem of a blob: missing, damaged, or with other content."""
    blob, expected, who = check
    place = blobs.place(blob.hash)
    try:
        blobs.require(blob.hash, blob.file_sha256, who)
        content = read_blob(blobs.local(blob.hash, blob.file_sha256, who), who).content_hash()
    except FileNotFoundError:
        yield f"{who}: blob {place} is missing; add the adapter again from its source"
    except (HubError, OSError) as error:
        yield str(error)
    else:
        if content != expected:
            yield f"{who}: the content of blob {place} has the hash {content}, not {expected}"


def _stands(catalogue: CatalogueStore, row: rows.Row) -> bool:
    """Return True if the catalogue still has this row with this blob; it may have been removed since it was read."""
    named = "SELECT 1 FROM adapters WHERE seq = ? AND hash = ? UNION SELECT 1 FROM versions WHERE seq = ? AND hash = ?"
    try:
        with catalogue.reading() as connection:
            hit = connection.execute(named, (row.seq, row.blob.hash) * 2).fetchone()
            return hit is not None and rows.find_blob(connection, row.blob.hash) == row.blob
    except HubError:
        return True
