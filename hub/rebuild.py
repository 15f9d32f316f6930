"""Makes a new catalogue from the blobs and from what can still be read of the old one."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from loraweave.errors import AdapterCorrupt, HubError, HubLocked
from loraweave.hub import rows
from loraweave.hub.blob_files import file_digest, sync_folder
from loraweave.hub.blobs import read_blob
from loraweave.hub.folder_blobs import FolderBlobs
from loraweave.hub.migrations import migrate
from loraweave.hub.storage_errors import storage_errors
from loraweave.hub.stores import BlobStore
from loraweave.types import Record

_SIDE_FILES = ("", "-wal", "-shm")


def rebuild(folder: str | Path, *, timeout_s: float = 30.0) -> list[str]:
    """Gives a hub whose catalogue is damaged or lost a new one, and returns the names it holds.

    Rows of the old catalogue that are intact are kept, in their order. A sound blob without one comes back under the name it
    was first added with (and a part of its hash where that is taken), even when that adapter had been removed and not
    collected. The old catalogue is kept as `catalogue.sqlite.corrupt-<n>`. No other program may have the hub open.
    A rebuild that was interrupted is finished by the next.
    """
    folder = Path(folder)
    path, new = folder / "catalogue.sqlite", folder / "catalogue.sqlite.rebuilt"
    with storage_errors(folder, "rebuilding the catalogue"):
        try:
            with FileLock(folder / "write.lock", timeout=timeout_s):
                # otherwise a rebuild was killed after it had set the old catalogue aside, whose rows the new one has
                if path.exists() or not new.exists():
                    _make(folder, path, new)
                _set_aside(path)
                os.replace(new, path)
                sync_folder(folder)
                return [record.name for record in _intact_rows(path)]
        except Timeout:
            raise HubLocked(f"rebuilding the catalogue: {folder / 'write.lock'} was held for {timeout_s:g} s") from None


def _make(folder: Path, path: Path, new: Path) -> None:
    """Writes the new catalogue beside the old one; it has its name only when it is complete."""
    unfinished = new.with_name(f"{new.name}.unfinished")
    for stale in (new, *(unfinished.with_name(f"{unfinished.name}{side}") for side in _SIDE_FILES)):
        stale.unlink(missing_ok=True)
    _write(unfinished, list(_records(FolderBlobs(folder), path)))
    os.replace(unfinished, new)
    sync_folder(folder)


def _records(blobs: BlobStore, path: Path) -> Iterator[tuple[Record, rows.BlobRow]]:
    sound = {blob.hash: (blob, origin) for blob, origin in _sound_blobs(blobs)}
    taken: set[str] = set()
    used: set[str] = set()
    for record in _intact_rows(path):
        if record.hash in sound and record.name not in taken:
            taken.add(record.name)
            used.add(record.hash)
            yield record, sound[record.hash][0]
    lost = [(blob, origin) for blob, origin in sound.values() if blob.hash not in used]
    for blob, origin in sorted(lost, key=lambda entry: (entry[1].created, entry[1].name)):
        name = origin.name if origin.name not in taken else f"{origin.name[:180]} {blob.hash[:12]}"
        taken.add(name)
        yield replace(origin, name=name), blob


def _sound_blobs(blobs: BlobStore) -> Iterator[tuple[rows.BlobRow, Record]]:
    for content_hash in blobs.names():
        try:
            file = blobs.local(content_hash, None, "rebuilding")
            blob = read_blob(file, "rebuilding")
            if blob.content_hash() == content_hash:
                yield rows.BlobRow(content_hash, file_digest(file), file.stat().st_size), rows.record_from_json(blob.origin)
        except AdapterCorrupt:
            # it stays where it is, for whoever can mend it
            continue


def _intact_rows(path: Path) -> Iterator[Record]:
    if not path.exists():
        return
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        seqs = [seq for (seq,) in connection.execute("SELECT seq FROM adapters ORDER BY seq").fetchall()]
        for seq in seqs:
            try:
                if row := rows.at(connection, seq):
                    yield row.record
            except (HubError, sqlite3.Error, UnicodeDecodeError):
                continue
    except (sqlite3.Error, UnicodeDecodeError):
        return
    finally:
        connection.close()


def _write(new: Path, records: list[tuple[Record, rows.BlobRow]]) -> None:
    connection = sqlite3.connect(new, isolation_level=None)
    try:
        migrate(connection, new)
        connection.execute("BEGIN IMMEDIATE")
        for record, blob in records:
            rows.put_blob(connection, blob)
            rows.insert(connection, record)
        connection.execute("UPDATE state SET generation = 1")
        connection.execute("COMMIT")
    finally:
        # closing the only connection moves the log into the file, which is then complete by itself
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
