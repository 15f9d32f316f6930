"""The catalogue's schema as numbered steps. A step that has been released is never edited: a change is a new step."""

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

from loraweave.common.files import sync
from loraweave.errors import HubCorrupt
from loraweave.hub.stores.protocols import Connection
from loraweave.hub.tables.filtering import store_labels

# "LoWv", so that a file can be told from another program's database
APPLICATION_ID = 0x4C6F5776

Step = tuple[str | Callable[[Connection], None], ...]

# A row holds its record as canonical JSON with a sha256: a damaged page can change text without SQLite noticing. For the
# same reason `state` counts the adapters: vanished rows are noticed. `seq` orders by addition, whatever the clock says.
STEPS: tuple[Step, ...] = (
    (
        f"PRAGMA application_id = {APPLICATION_ID}",
        """CREATE TABLE state (
            id INTEGER PRIMARY KEY CHECK (id = 1),
            generation INTEGER NOT NULL,
            num_adapters INTEGER NOT NULL
        ) STRICT""",
        "INSERT INTO state VALUES (1, 0, 0)",
        """CREATE TABLE adapters (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            name TEXT NOT NULL UNIQUE,
            hash TEXT NOT NULL,
            record TEXT NOT NULL,
            sha256 TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX adapters_by_hash ON adapters (hash)",
        """CREATE TABLE blobs (
            hash TEXT PRIMARY KEY,
            file_sha256 TEXT NOT NULL,
            size_bytes INTEGER NOT NULL,
            sha256 TEXT NOT NULL
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE vectors (
            embedder TEXT NOT NULL,
            seq INTEGER NOT NULL REFERENCES adapters (seq) ON DELETE CASCADE,
            text_digest TEXT NOT NULL,
            vector BLOB NOT NULL,
            sha256 TEXT NOT NULL,
            PRIMARY KEY (embedder, seq)
        ) STRICT, WITHOUT ROWID""",
        "CREATE INDEX vectors_by_adapter ON vectors (seq)",
    ),
    (
        # versions of a name that a newer one has replaced; `adapters` keeps the newest
        "ALTER TABLE state ADD COLUMN num_versions INTEGER NOT NULL DEFAULT 0",
        """CREATE TABLE versions (
            seq INTEGER NOT NULL REFERENCES adapters (seq) ON DELETE CASCADE,
            version INTEGER NOT NULL,
            hash TEXT NOT NULL,
            record TEXT NOT NULL,
            sha256 TEXT NOT NULL,
            PRIMARY KEY (seq, version)
        ) STRICT, WITHOUT ROWID""",
        "CREATE INDEX versions_by_hash ON versions (hash)",
        # the fingerprints that adapters gave for the id of a base model, so that a second one is noticed at once
        """CREATE TABLE bases (
            base_model TEXT NOT NULL,
            fingerprint TEXT NOT NULL,
            PRIMARY KEY (base_model, fingerprint)
        ) STRICT, WITHOUT ROWID""",
    ),
    (
        # different for every catalogue, so that the search index of one is not taken for that of another
        "ALTER TABLE state ADD COLUMN identity TEXT NOT NULL DEFAULT ''",
        "UPDATE state SET identity = lower(hex(randomblob(16)))",
        # the generation that last added, changed or deleted a row; a deleted row keeps its entry
        "CREATE TABLE changes (seq INTEGER PRIMARY KEY, generation INTEGER NOT NULL) STRICT",
        "CREATE INDEX changes_by_generation ON changes (generation, seq)",
        # the values that filters compare
        """CREATE TABLE labels (
            kind TEXT NOT NULL,
            value TEXT NOT NULL,
            seq INTEGER NOT NULL REFERENCES adapters (seq) ON DELETE CASCADE,
            PRIMARY KEY (kind, value, seq)
        ) STRICT, WITHOUT ROWID""",
        "CREATE INDEX labels_by_adapter ON labels (seq)",
        store_labels,
    ),
    (
        # what a new adapter is compared with: statistics of each layer, and a sketch whose pieces find near-duplicates
        """CREATE TABLE figures (
            seq INTEGER PRIMARY KEY REFERENCES adapters (seq) ON DELETE CASCADE,
            kin TEXT NOT NULL,
            hash TEXT NOT NULL,
            numbers BLOB NOT NULL,
            code BLOB NOT NULL,
            piece_0 INTEGER NOT NULL,
            piece_1 INTEGER NOT NULL,
            piece_2 INTEGER NOT NULL,
            piece_3 INTEGER NOT NULL,
            piece_4 INTEGER NOT NULL,
            piece_5 INTEGER NOT NULL,
            piece_6 INTEGER NOT NULL,
            piece_7 INTEGER NOT NULL
        ) STRICT""",
        "CREATE INDEX figures_by_kin ON figures (kin, hash)",
        *(f"CREATE INDEX figures_by_piece_{number} ON figures (piece_{number})" for number in range(8)),
        "CREATE TABLE quarantine (seq INTEGER PRIMARY KEY REFERENCES adapters (seq) ON DELETE CASCADE) STRICT",
    ),
    (
        # filters by size; those by language and rank read labels, which older rows do not have
        "CREATE INDEX blobs_by_size ON blobs (size_bytes)",
        store_labels,
    ),
    (
        # compositions under names of their own: which files each has, by the sha256 that names their blobs
        "ALTER TABLE state ADD COLUMN num_compositions INTEGER NOT NULL DEFAULT 0",
        """CREATE TABLE compositions (
            name TEXT PRIMARY KEY,
            hash TEXT NOT NULL,
            record TEXT NOT NULL,
            sha256 TEXT NOT NULL
        ) STRICT, WITHOUT ROWID""",
    ),
)


def needs_migration(connection: sqlite3.Connection, path: Path) -> bool:
    """Return True if the catalogue is older than this program. Raises HubCorrupt if it is newer or no catalogue at all."""
    version = _version(connection)
    if version > len(STEPS):
        raise HubCorrupt(
            f"the catalogue {path} has schema {version}, but this version of loraweave knows schemas up to {len(STEPS)}; "
            "install the newer loraweave that wrote it"
        )
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    is_new = version == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    if not is_new and application != APPLICATION_ID:
        raise HubCorrupt(
            f"{path} is a database of another program (application id {application:#x}, not {APPLICATION_ID:#x}); "
            "choose another folder for the hub"
        )
    return version < len(STEPS)


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Run the missing steps, each in its own transaction, after a backup of the file as `<catalogue>.v<old>.backup`.

    The caller holds the write lock. A step that fails leaves the catalogue at the step before.
    """
    if not needs_migration(connection, path):
        return
    version = _version(connection)
    if version > 0:
        _back_up(connection, path.with_name(f"{path.name}.v{version}.backup"))
    # the journal mode is a property of the file, and cannot be changed inside a transaction
    connection.execute("PRAGMA journal_mode = WAL")
    for number, step in enumerate(STEPS[version:], start=version + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            run_step(connection, step)
            connection.execute(f"PRAGMA user_version = {number:d}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def run_step(connection: Connection, step: Step) -> None:
    """Run the statements and functions of a step in the current transaction."""
    for action in step:
        if isinstance(action, str):
            connection.execute(action)
        else:
            action(connection)


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def _back_up(connection: sqlite3.Connection, target: Path) -> None:
    unfinished = target.with_name(f"{target.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    copy = sqlite3.connect(unfinished)
    try:
        connection.backup(copy)
        # a plain file of its own: a copy that needs a -wal beside it is easily separated from it
        copy.execute("PRAGMA journal_mode = DELETE")
    finally:
        copy.close()
    sync(unfinished)
    os.replace(unfinished, target)
