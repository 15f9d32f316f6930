"""The catalogue on PostgreSQL: the rows of `hub/stores/catalogue.py`, for hubs that several machines share.

Writers take an advisory lock, which the server gives back when their session ends, however it ends. The transaction runs in
the session that holds the lock: without the lock there is no commit. Readers take no lock and see one moment.

Search is exact, by pgvector: the database scores every stored vector, and sends only those that can be among the best.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from loraweave import HubError, HubLocked, HubReadOnly, Record
from loraweave.extend import get
from loraweave.extend.hubs import (
    CatalogueStore,
    Connection,
    Near,
    SharedCatalogue,
    VectorSearch,
    row_sha256,
    state_row,
    stored_rows,
)
from loraweave.extensions.cluster.catalogues._migrations import (
    MAX_SEARCHED_DIM,
    STEPS,
    migrate,
    schema_version,
    set_search_path,
)
from loraweave.extensions.cluster.catalogues._session import Translating, postgres_errors, read_address, require_psycopg

# "LoWv": advisory locks are shared with every other program that uses the database
_LOCK_CLASS = 0x4C6F5776

# sessions inherited by a fork belong to the parent: closing one here would end the parent's session
_INHERITED: list[Any] = []


class Postgresql(SharedCatalogue):
    """The rows of one hub in a schema of a PostgreSQL database. `writable` is True if this user may write them."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.address = address = read_address(url)
        self.timeout_s = timeout_s
        self.closed = False
        self._psycopg = require_psycopg()
        self._pid = os.getpid()
        self._idle: list[Any] = []
        self._guard = threading.Lock()
        self._held = threading.local()
        self.writable = True
        try:
            with postgres_errors(address, "opening the hub"):
                self._open_or_create()
        except BaseException:
            self.close()
            raise
        weakref.finalize(self, _close_all, self._idle, self._pid)

    @property
    def where(self) -> str:
        return self.address.where

    @property
    def vector_search(self) -> VectorSearch:
        return PostgresSearch(self)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection inside one read transaction: all reads see the same state of the database."""
        begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
        with postgres_errors(self.address, "reading the hub"), self._session(begin) as session:
            yield Translating(session)

    @contextmanager
    def locked(self, doing: str) -> Iterator[None]:
        """Hold the write lock between machines, processes, threads. Raises HubReadOnly, HubLocked after `timeout_s`."""
        self._require_open()
        if not self.writable:
            raise HubReadOnly(f"{doing}: {self.where} cannot be written by this user; reading it still works")
        with postgres_errors(self.address, doing), self._session("SELECT 1") as session:
            try:
                session.execute("SELECT pg_advisory_lock(%s, %s)", self._lock_key())
            except self._psycopg.errors.LockNotAvailable:
                raise HubLocked(
                    f"{doing}: another writer held the lock of {self.where} for {self.timeout_s:g} s; try again when it is "
                    "done, or open the hub with a larger timeout_s"
                ) from None
            self._held.session = session
            try:
                yield
            finally:
                self._held.session = None
                # a session that is lost has lost its lock too
                with suppress(self._psycopg.OperationalError):
                    session.execute("SELECT pg_advisory_unlock(%s, %s)", self._lock_key())

    @contextmanager
    def transaction(self, doing: str) -> Iterator[Connection]:
        """Yield a write transaction, committed on leaving. The caller holds the lock. Changed rows raise the generation."""
        session = self._held.session
        connection = Translating(session)
        with postgres_errors(self.address, doing):
            session.execute("BEGIN")
            try:
                yield connection
                make_embeddings(connection)
                if connection.num_changed:
                    connection.execute("UPDATE state SET generation = generation + 1")
                self._commit(session, doing)
            except BaseException:
                with suppress(self._psycopg.Error):
                    session.execute("ROLLBACK")
                raise

    def problems(self, connection: Connection) -> list[str]:
        """Return a sentence for each invalid index. PostgreSQL itself checks its pages if data checksums are on."""
        broken = connection.execute(
            "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid AND indrelid = ANY (ARRAY["
            "'state'::regclass, 'adapters'::regclass, 'blobs'::regclass, 'vectors'::regclass])"
        ).fetchall()
        return [f"PostgreSQL's index {name} is not valid: REINDEX it" for (name,) in broken]

    def claim(self) -> tuple[str, str | None]:
        """Return the hub's identity and the recorded URL of its blobs, None if there is none."""
        with self.reading() as connection:
            identity, place = state_row(connection, "identity, blobs", self.where)
        return identity, place

    def note_blobs(self, place: str) -> None:
        """Record the URL of the hub's blobs, so that later openings need not pass it."""
        with self.writing("opening the hub") as connection:
            connection.execute("UPDATE state SET blobs = ?", (place,))

    def close(self) -> None:
        """Close the sessions; a second call does nothing."""
        self.closed = True
        with self._guard:
            _close_all(self._idle, self._pid)

    def _open_or_create(self) -> None:
        with self._session("SELECT 1") as session:
            version = schema_version(session, self.address)
            self.writable = self._may_write(session, version)
        if version == len(STEPS):
            return
        if not self.writable:
            raise HubReadOnly(
                f"{self.where} holds no hub of schema {len(STEPS)} (but {version}), and this user may not bring it there"
            )
        with self.locked("creating the hub" if version == 0 else "bringing the hub's catalogue up to date"):
            # another process may have been faster; then this finds its steps done
            migrate(self._held.session, self.address)
        # sessions opened before the migration do not have pgvector's schema on their search path
        with self._guard:
            _close_all(self._idle, self._pid)

    def _may_write(self, session: Any, version: int) -> bool:
        statement = "SELECT pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool"
        if session.execute(statement).fetchone() == (True,):
            return False
        if version == 0:
            statement, parameter = "SELECT has_database_privilege(current_database(), %s)", "CREATE"
        else:
            statement, parameter = "SELECT has_table_privilege('adapters', %s)", "INSERT"
        return bool(session.execute(statement, (parameter,)).fetchone()[0])

    @contextmanager
    def _session(self, first: str) -> Iterator[Any]:
        """Yield a session in which the statement `first` has run."""
        self._require_open()
        session = self._begun(first)
        try:
            yield session
        finally:
            self._give_back(session)

    def _begun(self, first: str) -> Any:
        while (session := self._take()) is not None:
            try:
                session.execute(first)
                return session
            except self._psycopg.OperationalError:
                # the server was restarted, or the network gone, since the session was used last
                session.close()
        session = self._connect()
        session.execute(first)
        return session

    def _take(self) -> Any:
        with self._guard:
            if self._pid != os.getpid():
                _INHERITED.extend(self._idle)
                self._idle.clear()
                self._pid = os.getpid()
            return self._idle.pop() if self._idle else None

    def _give_back(self, session: Any) -> None:
        try:
            if session.info.transaction_status != self._psycopg.pq.TransactionStatus.IDLE:
                session.execute("ROLLBACK")
        except self._psycopg.Error:
            session.close()
        with self._guard:
            if session.closed or self.closed or self._pid != os.getpid():
                session.close()
            else:
                self._idle.append(session)

    def _connect(self) -> Any:
        wait_s = max(2, round(self.timeout_s))
        # a partition of the network must end a call, not hang it
        timeouts = {"connect_timeout": wait_s, "tcp_user_timeout": 1000 * wait_s, "keepalives_idle": 30}
        parameters = {"application_name": "loraweave", **timeouts, **self.address.parameters, "client_encoding": "utf8"}
        session = self._psycopg.connect(**parameters, autocommit=True)
        try:
            session.execute("SELECT set_config('lock_timeout', %s, false)", (f"{max(1, round(1000 * self.timeout_s))}ms",))
            # a change that add() has confirmed must survive a crash of the server
            session.execute(
                "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
            )
            set_search_path(session, self.address)
        except BaseException:
            session.close()
            raise
        return session

    def _commit(self, session: Any, doing: str) -> None:
        try:
            session.execute("COMMIT")
        except self._psycopg.OperationalError as error:
            if session.closed:
                raise HubError(
                    f"{doing}: the connection to {self.where} was lost while the change was committed "
                    f"({self.address.redacted(str(error))}); read the hub again to see whether it was made"
                ) from error
            raise

    def _lock_key(self) -> tuple[int, int]:
        digest = hashlib.sha256(self.address.schema.encode()).digest()
        return _LOCK_CLASS, int.from_bytes(digest[:4], "big", signed=True)

    def _require_open(self) -> None:
        if self.closed:
            raise HubError(f"the hub {self.where} is closed; open it again")


def _close_all(sessions: list[Any], pid: int) -> None:
    if pid != os.getpid():
        _INHERITED.extend(sessions)
        sessions.clear()
    while sessions:
        sessions.pop().close()


if TYPE_CHECKING:
    import numpy as np


# How far pgvector's fp32 inner product of unit vectors can be from the exact one, with a margin: it adds up some hundreds of
# products one by one, and every sum is rounded to 6e-8 of its size.
_SLACK = 1e-4


class PostgresSearch:
    """The `VectorSearch` of a catalogue on PostgreSQL."""

    def __init__(self, catalogue: CatalogueStore) -> None:
        self._catalogue = catalogue

    def unready(self, embedder: str, limit: int) -> list[Record]:
        with self._catalogue.reading() as connection:
            seq_rows = connection.execute(
                "SELECT adapters.seq FROM adapters "
                "LEFT JOIN vectors ON vectors.seq = adapters.seq AND vectors.embedder = ? "
                "WHERE (vectors.seq IS NULL OR vectors.stale) AND adapters.seq NOT IN (SELECT seq FROM quarantine) "
                "ORDER BY adapters.seq LIMIT ?",
                (embedder, limit),
            ).fetchall()
            return [row.record for row in stored_rows(connection, [seq for (seq,) in seq_rows])]

    def nearest(self, embedder: str, query_D: np.ndarray, k: int, seqs: Sequence[int] | None) -> list[Near] | None:
        import numpy as np

        with self._catalogue.reading() as connection:
            (num_adapters,) = connection.execute("SELECT count(*) FROM adapters").fetchone()
            num_adapters -= connection.execute("SELECT COUNT(*) FROM quarantine").fetchone()[0]
            num_wanted = min(k, num_adapters if seqs is None else len(seqs))
            if not num_wanted:
                return []
            near = _near(connection, embedder, query_D, num_wanted, seqs)
            if len(near) < num_wanted:
                return None
            # the reference index, `flat`, decides order and score
            index = get("indexes", "flat")(len(query_D))
            index.add(np.stack([key_D for _, _, key_D in near]))
            (scores_K,), (positions_K,) = index.search(query_D[None], num_wanted)
            best = [near[position] for position in positions_K.tolist()]
            records = {row.seq: row.record for row in stored_rows(connection, [seq for seq, _, _ in best])}
        return [
            Near(records[seq], text_digest, round(score, 6), key_D)
            for score, (seq, text_digest, key_D) in zip(scores_K.tolist(), best, strict=True)
        ]


def _near(
    connection: Connection, embedder: str, query_D: np.ndarray, k: int, seqs: Sequence[int] | None
) -> list[tuple[int, str, np.ndarray]]:
    """Return (row number, digest of the text, vector) of all candidates for the k best, in order of addition.

    Vectors that are damaged or of another size than the query are left out.
    """
    import numpy as np

    among = "" if seqs is None else "AND seq = ANY (CAST(? AS bigint[])) "
    seqs_argument = [] if seqs is None else [list(seqs)]
    slack = _SLACK * max(1.0, float(np.linalg.norm(query_D)))
    nearest = connection.execute(
        "WITH scored AS MATERIALIZED ("
        "SELECT seq, CASE WHEN vector_dims(embedding) = ? THEN embedding <#> CAST(? AS vector) END AS distance "
        f"FROM vectors WHERE embedder = ? AND seq NOT IN (SELECT seq FROM quarantine) {among}), "
        "best AS (SELECT distance FROM scored WHERE distance IS NOT NULL ORDER BY distance LIMIT ?) "
        "SELECT seq, text_digest, vector, sha256 FROM vectors JOIN scored USING (seq) "
        "WHERE embedder = ? AND scored.distance <= (SELECT max(distance) FROM best) + ? ORDER BY seq",
        (len(query_D), as_text(query_D), embedder, *seqs_argument, k, embedder, slack),
    ).fetchall()
    return [
        (seq, text_digest, np.frombuffer(vector, dtype="<f4"))
        for seq, text_digest, vector, digest in nearest
        if row_sha256(embedder, seq, text_digest, vector) == digest
    ]


# how many vectors are translated at once: 1,000 of 384 numbers are 1.5 MB here and 4 MB as text
_BATCH = 1000

# the condition of the index `vectors_without_embedding` of _migrations.py
_MISSING = f"embedding IS NULL AND length(vector) <= {4 * MAX_SEARCHED_DIM}"


def make_embeddings(connection: Connection) -> None:
    """Make pgvector's embedding of every stored vector that has none, with the same numbers."""
    while (first := connection.execute(f"SELECT embedder FROM vectors WHERE {_MISSING} LIMIT 1").fetchone()) is not None:
        import numpy as np

        missing = connection.execute(
            f"SELECT seq, vector FROM vectors WHERE embedder = ? AND {_MISSING} LIMIT {_BATCH}", first
        ).fetchall()
        connection.execute(
            "UPDATE vectors SET embedding = CAST(made.text AS vector) "
            "FROM unnest(CAST(? AS bigint[]), CAST(? AS text[])) AS made (seq, text) "
            "WHERE vectors.embedder = ? AND vectors.seq = made.seq",
            ([seq for seq, _ in missing], [as_text(np.frombuffer(vector, dtype="<f4")) for _, vector in missing], *first),
        )


def as_text(vector_D: np.ndarray) -> str:
    """Return the vector as pgvector's text, with enough digits to give the same fp32 numbers back."""
    return f"[{','.join([f'{number:.9g}' for number in vector_D.tolist()])}]"
