"""Rebuilding a catalogue from the blobs and the readable rows of the old one."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loraweave.common.files import file_digest, sync
from loraweave.common.storage_errors import is_damage, storage_errors
from loraweave.errors import AdapterCorrupt, HubError, HubLocked
from loraweave.hub.stores.blobs import read_blob
from loraweave.hub.stores.catalogue import FILE
from loraweave.hub.stores.folder_blobs import FolderBlobs
from loraweave.hub.stores.migrations import migrate
from loraweave.hub.stores.open_stores import open_blobs, read_claim
from loraweave.hub.stores.protocols import BlobStore
from loraweave.hub.tables import compositions, rows, versions
from loraweave.types import Record

_SIDE_FILES = ("", "-wal", "-shm")

# an adapter's records, the newest version last
History = list[Record]

# content hash -> the blob's row, and the adapter's record when it was written
Blobs = Mapping[str, tuple[rows.BlobRow, Record]]


def rebuild(folder: str | Path, *, timeout_s: float = 30.0) -> list[str]:
    """Give a hub whose catalogue is damaged or lost a new one, and return the names in it.

    Intact rows of the old catalogue are kept, in their order, with their versions, and so are compositions whose files are
    there. A sound blob without a row comes back under the name it was first added with, even if that adapter had been
    removed and not collected: several blobs of one name are its versions if their numbers differ, and else get a part of
    their hash into the name. The old catalogue is kept as `catalogue.sqlite.corrupt-<n>`. No other program may have the hub
    open. The next rebuild finishes an interrupted one. Raises HubLocked after `timeout_s`.
    """
    folder = Path(folder)
    path, new = folder / FILE, folder / f"{FILE}.rebuilt"
    with storage_errors(folder, "rebuilding the catalogue"):
        try:
            with FileLock(folder / "write.lock", timeout=timeout_s):
                # otherwise a killed rebuild had set the old catalogue aside already, and the new one has its rows
                if path.exists() or not new.exists():
                    _make(folder, path, new)
                _set_aside(path)
                os.replace(new, path)
                sync(folder)
                return [history[-1].name for history in _intact_rows(path)]
        except Timeout:
            raise HubLocked(f"rebuilding the catalogue: {folder / 'write.lock'} was held for {timeout_s:g} s") from None


def _make(folder: Path, path: Path, new: Path) -> None:
    """Write the new catalogue beside the old one; it gets its name when it is complete."""
    unfinished = new.with_name(f"{new.name}.unfinished")
    for stale in (new, *(unfinished.with_name(f"{unfinished.name}{side}") for side in _SIDE_FILES)):
        stale.unlink(missing_ok=True)
    claim = read_claim(folder)
    place = FolderBlobs(folder) if claim is None else open_blobs(claim.place, str(folder.absolute()))
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
    """Yield the histories of blobs that no listed history has, by the record of when each was written."""
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
        try:
            file = blobs.local(content_hash, None, "rebuilding")
            blob = read_blob(file, "rebuilding")
            if blob.content_hash() == content_hash:
                row = rows.BlobRow(content_hash, file_digest(file), file.stat().st_size)
                yield content_hash, (row, rows.record_from_json(blob.origin))
        except AdapterCorrupt:
            # the blob is left in place for repair
            continue


def _intact_rows(path: Path) -> Iterator[History]:
    """Yield the intact records of every adapter in order of addition, newest version last."""
    if not path.exists():
        return
    connection = sqlite3.connect(path, isolation_level=None)
    seqs: list[int] = []
    try:
        with _damage_ignored():
            seqs = [seq for (seq,) in connection.execute("SELECT seq FROM adapters ORDER BY seq").fetchall()]
        older: dict[int, list[int]] = {}
        # a catalogue of schema 1 has no versions
        with _damage_ignored():
            for seq, version in versions.every(connection):
                older.setdefault(seq, []).append(version)
        for seq in seqs:
            kept = [_intact(versions.at, connection, seq, version) for version in older.get(seq, ())]
            history = [row.record for row in [*kept, _intact(rows.at, connection, seq)] if row is not None]
            if history:
                yield [replace(record, name=history[-1].name) for record in history]
    finally:
        connection.close()


def _intact_compositions(path: Path) -> list[compositions.CompositionRow]:
    """Return the compositions of the old catalogue whose rows are intact."""
    if not path.exists():
        return []
    connection = sqlite3.connect(path, isolation_level=None)
    intact: list[compositions.CompositionRow] = []
    names: list[str] = []
    try:
        # a catalogue of schema 5 has none
        with _damage_ignored():
            names = compositions.names(connection)
        for name in names:
            with _damage_ignored():
                intact += filter(None, [compositions.find(connection, name)])
    finally:
        connection.close()
    return intact


def _intact(read: Callable[..., rows.Row | None], *where: Any) -> rows.Row | None:
    result: tuple[rows.Row | None, ...] = (None,)
    with _damage_ignored():
        result = (read(*where),)
    return result[0]


@contextmanager
def _damage_ignored() -> Iterator[None]:
    """Ignore damage of the old catalogue, but raise for a disk that fails now: intact rows must not be lost."""
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
        # the file must be complete without its log; closing moves the log into it, too, but ignores a failure
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
