"""The catalogue's connections, its write lock and its transactions: safe with several processes and threads.

SQLite up to 3.51.2 can corrupt a database in WAL mode when two connections write and checkpoint at the same instant. So
every write and every checkpoint happens under one lock between processes, SQLite itself never checkpoints after a commit,
and the file is never memory-mapped. The checkpoint that SQLite makes when the last connection closes is safe: it first takes
the file's exclusive lock, which it gets only when no other connection is open. Readers take no lock and are never blocked.
"""

import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loraweave.common.files import storage_errors, sync
from loraweave.errors import HubCorrupt, HubError, HubLocked, HubReadOnly
from loraweave.hub.stores.migrations import migrate, needs_migration
from loraweave.hub.stores.protocols import BlobStore, CatalogueStore, Connection

FILE = "catalogue.sqlite"

# the log may grow to this before a write moves it into the database
CHECKPOINT_BYTES = 4 * 2**20

# how long a fork waits for other threads to give their connections back
_FORK_WAIT_S = 2.0


class Catalogue(CatalogueStore):
    """The SQLite file of one hub. `writable` is True if the folder can be written; reading works either way.

    `blobs` is the store of the blobs that the rows describe: a hub that has blobs is never given an empty catalogue.
    """

    def __init__(self, folder: Path, timeout_s: float, blobs: BlobStore) -> None:
        self.folder = folder
        self.blobs = blobs
        self.path = folder / FILE
        self.lock_path = folder / "write.lock"
        self.timeout_s = timeout_s
        self.closed = False
        self._idle: list[sqlite3.Connection] = []
        self._num_busy = 0
        self._changed = threading.Condition()
        weakref.finalize(self, _close_all, self._idle)
        try:
            with storage_errors(self.path, "opening the hub"):
                self.writable = self._folder_is_writable()
                self._open_or_create()
        except BaseException:
            self.close()
            raise
        _ALL.add(self)

    @property
    def where(self) -> str:
        return str(self.folder)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection inside one read transaction: everything read belongs to the same moment."""
        with storage_errors(self.path, "reading the hub"), self._connection() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    @contextmanager
    def locked(self, doing: str) -> Iterator[None]:
        """Hold the write lock between processes and threads. Raises HubReadOnly, or HubLocked after `timeout_s`."""
        self._require_open()
        if not self.writable:
            raise HubReadOnly(f"{doing}: the folder {self.folder} cannot be written; reading it still works")
        # filelock takes 30 ms to import, which listing a hub need not pay
        from filelock import FileLock, Timeout

        # a lock object per use: flock then also holds between the threads of one process
        lock = FileLock(self.lock_path, timeout=self.timeout_s, poll_interval=0.01)
        with storage_errors(self.folder, doing), self._busy():
            try:
                lock.acquire()
            except Timeout:
                raise HubLocked(
                    f"{doing}: another writer held {self.lock_path} for {self.timeout_s:g} s; try again when it is done, "
                    "or open the hub with a larger timeout_s"
                ) from None
            try:
                yield
            finally:
                lock.release()

    @contextmanager
    def transaction(self, doing: str) -> Iterator[sqlite3.Connection]:
        """Yield a write transaction, committed on leaving. The caller holds the lock. Changed rows raise the generation."""
        with storage_errors(self.path, doing), self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            before = connection.total_changes
            try:
                yield connection
                if connection.total_changes > before:
                    connection.execute("UPDATE state SET generation = generation + 1")
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            self._checkpoint(connection)

    def problems(self, connection: Connection) -> list[str]:
        """Return the problems that SQLite's integrity check of the file reports."""
        answers = [str(answer) for (answer,) in connection.execute("PRAGMA integrity_check").fetchall()]
        return [] if answers == ["ok"] else [f"SQLite's integrity check: {answer}" for answer in answers]

    def empty_log(self) -> None:
        """Move the log into the database and free its space, unless a reader needs it. The caller holds the lock."""
        with suppress(sqlite3.Error), self._connection() as connection:
            # a truncation would have to wait until all readers are done, which it is not worth
            connection.execute("PRAGMA busy_timeout = 0")
            try:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                connection.execute(f"PRAGMA busy_timeout = {int(self.timeout_s * 1000):d}")

    def close(self) -> None:
        """Close the connections; a second call does nothing."""
        self.closed = True
        _ALL.discard(self)
        with self._changed:
            _close_all(self._idle)

    def _open_or_create(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise HubError(f"a hub is a folder, and {self.folder} is a file")
        if not self.path.exists():
            if not self.writable:
                raise HubReadOnly(f"{self.folder} holds no hub, and none can be created there: the folder cannot be written")
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.locked("creating the hub"):
                # another process may have been faster; then this opens what it made
                self._migrate("rwc")
                sync(self.folder)
                sync(self.folder.absolute().parent)
            return
        with self._connection() as connection:
            outdated = needs_migration(connection, self.path)
        if outdated:
            with self.locked("bringing the hub's catalogue up to date"):
                self._migrate("rw")

    def _migrate(self, mode: str) -> None:
        connection = self._connect(mode)
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0 and (blob := next(iter(self.blobs.names()), None)):
                # an empty catalogue would present the adapters as gone, and gc would then make it true
                raise HubCorrupt(
                    f"the catalogue {self.path} is missing or empty, but there are blobs such as {blob}; put its "
                    "backup back, or rebuild it from the blobs (docs/extensions/upkeep.md)"
                )
            migrate(connection, self.path)
        finally:
            connection.close()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        self._require_open()
        with self._busy():
            with self._changed:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = self._connect("rw" if self.writable else "ro")
            healthy = False
            try:
                yield connection
                healthy = True
            finally:
                # after an error the connection may be in any state; one to an immutable file must not outlive its use
                if healthy and self.writable and not self.closed and not connection.in_transaction:
                    with self._changed:
                        self._idle.append(connection)
                else:
                    connection.close()

    def _connect(self, mode: str) -> sqlite3.Connection:
        # a URI because its mode keeps a vanished hub from being created again; as_uri() escapes ? # %
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        wal = self.path.with_name(f"{self.path.name}-wal")
        if mode == "ro" and not wal.exists():
            # without a log to read, SQLite needs no shared-memory file, which a read-only folder could not hold
            uri += "&immutable=1"
        connection = sqlite3.connect(uri, uri=True, timeout=self.timeout_s, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            connection.execute("PRAGMA mmap_size = 0")
            connection.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    def _checkpoint(self, connection: sqlite3.Connection) -> None:
        wal = self.path.with_name(f"{self.path.name}-wal")
        # what is committed stays committed when moving it fails; the next write tries again
        with suppress(OSError, sqlite3.Error):
            if wal.stat().st_size > CHECKPOINT_BYTES:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _folder_is_writable(self) -> bool:
        nearest = next(parent for parent in (self.folder, *self.folder.absolute().parents) if parent.exists())
        parts = [part for part in (nearest, self.path, self.lock_path) if part.exists()]
        return all(os.access(part, os.W_OK) for part in parts)

    def _is_unused(self) -> bool:
        return self._num_busy == 0

    def _require_open(self) -> None:
        if self.closed:
            raise HubError(f"the hub {self.folder} is closed; open it again with Hub({str(self.folder)!r})")

    @contextmanager
    def _busy(self) -> Iterator[None]:
        with self._changed:
            self._num_busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_busy -= 1
                self._changed.notify_all()


def state_row(connection: Connection, columns: str, where: str) -> tuple[Any, ...]:
    """Return the named columns of the single row of `state`. Raises HubCorrupt if the row is missing."""
    row: tuple[Any, ...] | None = connection.execute(f"SELECT {columns} FROM state").fetchone()
    if row is None:
        raise HubCorrupt(
            f"the catalogue {where} is damaged: its state row is missing; Hub.verify() lists what can still be read"
        )
    return row


_ALL: weakref.WeakSet[Catalogue] = weakref.WeakSet()
_PAUSED: list[Catalogue] = []
_FORKING = threading.Lock()


def _close_all(connections: list[sqlite3.Connection]) -> None:
    while connections:
        with suppress(sqlite3.Error):
            connections.pop().close()


def _before_fork() -> None:
    # SQLite's file locks do not survive a fork, and a child that uses an inherited connection can corrupt the file
    _FORKING.acquire()
    _PAUSED.extend(_ALL)
    for catalogue in _PAUSED:
        catalogue._changed.acquire()
        catalogue._changed.wait_for(catalogue._is_unused, timeout=_FORK_WAIT_S)
        _close_all(catalogue._idle)


def _after_fork() -> None:
    while _PAUSED:
        _PAUSED.pop()._changed.release()
    _FORKING.release()


def _after_fork_in_child() -> None:
    for catalogue in _PAUSED:
        # only threads of the parent were busy
        catalogue._num_busy = 0
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
