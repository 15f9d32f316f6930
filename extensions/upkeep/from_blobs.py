"""The rebuilding of a hub's catalogue from its blobs and the readable rows of the old catalogue."""

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from filelock import FileLock, Timeout

from loraweave import AdapterCorrupt, HubError, HubLocked, Record
from loraweave.extend import storage_errors, sync
from loraweave.extend.hubs import BlobStore, blobs_of, compositions, examine_blob, is_damage, migrate, rows, versions

CATALOGUE = "catalogue.sqlite"
_SIDE_FILES = ("", "-wal", "-shm")

# an adapter's records, the newest version last
History = list[Record]

# content hash -> the blob's row, and the record that the adapter had when the blob was written
Blobs = Mapping[str, tuple[rows.BlobRow, Record]]


def rebuild(folder: str | Path, *, timeout_s: float = 30.0) -> list[str]:
    """Replace the damaged or lost catalogue of a hub by a new one, and return the names in it.

    Intact rows of the old catalogue are kept, in their order, with their versions, and so are compositions whose files are
    there. A sound blob without a row comes back under the name it was first added with, even if that adapter had been
    removed and not collected: several blobs of one name are its versions if their numbers differ; else a part of their hash
    is added to the name. The old catalogue is kept as `catalogue.sqlite.corrupt-<n>`. No other program may have the hub
    open. The next rebuild finishes an interrupted one. Raises HubLocked after `timeout_s`.
    """
    folder = Path(folder)
    path, new = folder / CATALOGUE, folder / f"{CATALOGUE}.rebuilt"
    with storage_errors(folder, "rebuilding the catalogue"):
        try:
            with FileLock(folder / "write.lock", timeout=timeout_s):
                # otherwise a killed rebuild has already set the old catalogue aside, and the new one has its rows
                if path.exists() or not new.exists():
                    _make(folder, path, new)
                _set_aside(path)
                os.replace(new, path)
                sync(folder)
                return [history[-1].name for history in _intact_rows(path)]
        except Timeout:
            raise HubLocked(f"rebuilding the catalogue: {folder / 'write.lock'} was held for {timeout_s:g} s") from None


def _make(folder: Path, path: Path, new: Path) -> None:
    """Write the new catalogue under a temporary name, and rename it to `new` once it is complete."""
    unfinished = new.with_name(f"{new.name}.unfinished")
    for stale in (new, *(unfinished.with_name(f"{unfinished.name}{side}") for side in _SIDE_FILES)):
        stale.unlink(missing_ok=True)
    place = blobs_of(folder)
    blobs = dict(_sound_blobs(place))
    histories = [*_read_listed(path, blobs)]
    histories += _read_unlisted(blobs, histories)
    kept = [row for row in _intact_compositions(path) if all(place.has(digest) for digest, _ in row.files.values())]
    _write(unfinished, histories, blobs, kept)
    os.replace(unfinished, new)
    sync(folder)


def _read_listed(path: Path, blobs: Blobs) -> Iterator[History]:
    """Yield the histories of the old catalogue, without versions whose row or blob is damaged."""
    taken: set[str] = set()
    for records in _intact_rows(path):
        history = [record for record in records if record.hash in blobs]
        if history and history[-1].name not in taken:
            taken.add(history[-1].name)
            yield history


def _read_unlisted(blobs: Blobs, listed: Sequence[History]) -> Iterator[History]:
    """Yield the histories of blobs that no listed history has, from the record that each blob was written with."""
    used = {record.hash for history in listed for record in history}
    taken = {history[-1].name for history in listed}
    lost: dict[str, list[Record]] = {}
    for origin in sorted(
        (origin for hash, (_, origin) in blobs.items() if hash not in used), key=attrgetter("created", "name")
    ):
        lost.setdefault(origin.name, []).append(origin)
    for name, origins in lost.items():
        numbers = [origin.version for origin in origins]
        is_history = name not in taken and len(set(numbers)) == len(numbers)
        for history in [sorted(origins, key=attrgetter("version"))] if is_history else [[origin] for origin in origins]:
            unique_name = name if name not in taken else f"{name[:180]} {history[-1].hash[:12]}"
            taken.add(unique_name)
            yield [replace(origin, name=unique_name) for origin in history]


def _sound_blobs(blobs: BlobStore) -> Iterator[tuple[str, tuple[rows.BlobRow, Record]]]:
    for content_hash in blobs.names():
        # a damaged blob is left in place for repair
        with suppress(AdapterCorrupt):
            digest, size_bytes, origin = examine_blob(blobs.local(content_hash, None, "rebuilding"), content_hash)
            yield content_hash, (rows.BlobRow(content_hash, digest, size_bytes), rows.record_from_json(origin))


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection to the old catalogue; an empty one in memory if there is none."""
    connection = sqlite3.connect(path if path.exists() else ":memory:", isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


def _intact_rows(path: Path) -> Iterator[History]:
    """Yield the intact records of every adapter in order of addition, newest version last."""
    seqs: list[int] = []
    older: dict[int, list[int]] = {}
    with _reading(path) as connection:
        with _damage_ignored():
            seqs = [seq for (seq,) in connection.execute("SELECT seq FROM adapters ORDER BY seq").fetchall()]
        # a catalogue of schema 1 has no versions
        with _damage_ignored():
            for seq, version in versions.every(connection):
                older.setdefault(seq, []).append(version)
        for seq in seqs:
            intact: list[rows.Row | None] = []
            for version in older.get(seq, ()):
                with _damage_ignored():
                    intact.append(versions.at(connection, seq, version))
            with _damage_ignored():
                intact.append(rows.at(connection, seq))
            history = [row.record for row in intact if row is not None]
            if history:
                yield [replace(record, name=history[-1].name) for record in history]


def _intact_compositions(path: Path) -> list[compositions.CompositionRow]:
    """Return the compositions of the old catalogue whose rows are intact."""
    intact: list[compositions.CompositionRow] = []
    names: list[str] = []
    with _reading(path) as connection:
        # a catalogue of schema 5 has no compositions
        with _damage_ignored():
            names = compositions.names(connection)
        for name in names:
            with _damage_ignored():
                intact += filter(None, [compositions.find(connection, name)])
    return intact


@contextmanager
def _damage_ignored() -> Iterator[None]:
    """Ignore damage of the old catalogue in the block, but raise for a disk that fails now: intact rows must not be lost."""
    try:
        yield
    except sqlite3.Error as error:
        if not is_damage(error):
            raise
    except (HubError, UnicodeDecodeError):
        return


def _write(new: Path, histories: Sequence[History], blobs: Blobs, kept: Sequence[compositions.CompositionRow]) -> None:
    connection = sqlite3.connect(new, isolation_level=None)
    try:
        migrate(connection, new)
        connection.execute("BEGIN IMMEDIATE")
        for history in histories:
            for record in history:
                rows.put_blob(connection, blobs[record.hash][0])
            rows.insert(connection, history[0])
            for record in history[1:]:
                row = rows.find(connection, record.name)
                assert row is not None
                versions.supersede(connection, row, record)
        for composition in kept:
            compositions.put(connection, composition)
        connection.execute("UPDATE state SET generation = 1")
        connection.execute("COMMIT")
        # the file must be complete without its log; closing would move the log too, but ignores a failure
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:
        connection.close()


def _set_aside(path: Path) -> None:
    number = 1
    while path.with_name(f"{path.name}.corrupt-{number}").exists():
        number += 1
    if not path.exists():
        # the log of a catalogue that an interrupted rebuild has moved already
        number = max(number - 1, 1)
    for side in _SIDE_FILES:
        old = path.with_name(f"{path.name}{side}")
        if old.exists():
            os.replace(old, path.with_name(f"{path.name}.corrupt-{number}{side}"))
