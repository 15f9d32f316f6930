"""The schema of a catalogue on PostgreSQL as numbered steps, kept in step with SQLite's in `hub/stores/migrations.py`.

A step that has been released is never edited: a change is a new step there and one here.
"""

from typing import Any

from loraweave import HubCorrupt, HubError, HubReadOnly
from loraweave.extend.hubs import run_step, store_labels
from loraweave.extensions.cluster.catalogues._session import PostgresAddress, Translating, require_psycopg

# pgvector stores at most this many numbers; longer vectors are kept, but searched at the client
MAX_SEARCHED_DIM = 16_000

# The columns are those of SQLite, so that both are read by the same statements. `embedding` is derived from `vector`: its
# bytes are what a row's sha256 covers, and a change of them clears the embedding, which is then made again. `stale` marks
# a vector made before the adapter's record changed, and with it perhaps the texts.
STEPS: tuple[tuple[Any, ...], ...] = (
    (
        """CREATE TABLE state (
            id INTEGER PRIMARY KEY CHECK (id = 1),
            schema_version INTEGER NOT NULL,
            identity TEXT NOT NULL,
            blobs TEXT,
            generation BIGINT NOT NULL,
            num_adapters BIGINT NOT NULL
        )""",
        "INSERT INTO state VALUES (1, 0, gen_random_uuid()::text, NULL, 0, 0)",
        """CREATE TABLE adapters (
            seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            name TEXT COLLATE "C" NOT NULL UNIQUE,
            hash TEXT COLLATE "C" NOT NULL,
            record TEXT NOT NULL,
            sha256 TEXT NOT NULL
        )""",
        "CREATE INDEX adapters_by_hash ON adapters (hash)",
        """CREATE TABLE blobs (
            hash TEXT COLLATE "C" PRIMARY KEY,
            file_sha256 TEXT NOT NULL,
            size_bytes BIGINT NOT NULL,
            sha256 TEXT NOT NULL
        )""",
        """CREATE TABLE vectors (
            embedder TEXT COLLATE "C" NOT NULL,
            seq BIGINT NOT NULL REFERENCES adapters (seq) ON DELETE CASCADE,
            text_digest TEXT NOT NULL,
            vector BYTEA NOT NULL,
            sha256 TEXT NOT NULL,
            embedding VECTOR,
            stale BOOLEAN NOT NULL DEFAULT false,
            PRIMARY KEY (embedder, seq)
        )""",
        "CREATE INDEX vectors_by_adapter ON vectors (seq)",
        f"""CREATE INDEX vectors_without_embedding ON vectors (embedder, seq)
            WHERE embedding IS NULL AND length(vector) <= {4 * MAX_SEARCHED_DIM}""",
        """CREATE FUNCTION vector_changed() RETURNS trigger LANGUAGE plpgsql
            AS 'BEGIN NEW.embedding := NULL; NEW.stale := false; RETURN NEW; END'""",
        """CREATE TRIGGER vector_changed BEFORE UPDATE OF vector ON vectors
            FOR EACH ROW EXECUTE FUNCTION vector_changed()""",
        """CREATE FUNCTION record_changed() RETURNS trigger LANGUAGE plpgsql
            AS 'BEGIN UPDATE vectors SET stale = true WHERE vectors.seq = NEW.seq; RETURN NULL; END'""",
        """CREATE TRIGGER record_changed AFTER UPDATE OF record ON adapters
            FOR EACH ROW EXECUTE FUNCTION record_changed()""",
    ),
    (
        "ALTER TABLE state ADD COLUMN num_versions BIGINT NOT NULL DEFAULT 0",
        """CREATE TABLE versions (
            seq BIGINT NOT NULL REFERENCES adapters (seq) ON DELETE CASCADE,
            version BIGINT NOT NULL,
            hash TEXT COLLATE "C" NOT NULL,
            record TEXT NOT NULL,
            sha256 TEXT NOT NULL,
            PRIMARY KEY (seq, version)
        )""",
        "CREATE INDEX versions_by_hash ON versions (hash)",
        """CREATE TABLE bases (
            base_model TEXT COLLATE "C" NOT NULL,
            fingerprint TEXT COLLATE "C" NOT NULL,
            PRIMARY KEY (base_model, fingerprint)
        )""",
    ),
    (
        "CREATE TABLE changes (seq BIGINT PRIMARY KEY, generation BIGINT NOT NULL)",
        "CREATE INDEX changes_by_generation ON changes (generation, seq)",
        """CREATE TABLE labels (
            kind TEXT COLLATE "C" NOT NULL,
            value TEXT COLLATE "C" NOT NULL,
            seq BIGINT NOT NULL REFERENCES adapters (seq) ON DELETE CASCADE,
            PRIMARY KEY (kind, value, seq)
        )""",
        "CREATE INDEX labels_by_adapter ON labels (seq)",
        store_labels,
        # a search reads every embedding, so it is stored in the row, and the bytes that it was made of out of line
        "ALTER TABLE vectors ALTER COLUMN embedding SET STORAGE MAIN",
        "ALTER TABLE vectors ALTER COLUMN vector SET STORAGE EXTERNAL",
    ),
    (
        """CREATE TABLE figures (
            seq BIGINT PRIMARY KEY REFERENCES adapters (seq) ON DELETE CASCADE,
            kin TEXT COLLATE "C" NOT NULL,
            hash TEXT COLLATE "C" NOT NULL,
            numbers BYTEA NOT NULL,
            code BYTEA NOT NULL,
            piece_0 BIGINT NOT NULL,
            piece_1 BIGINT NOT NULL,
            piece_2 BIGINT NOT NULL,
            piece_3 BIGINT NOT NULL,
            piece_4 BIGINT NOT NULL,
            piece_5 BIGINT NOT NULL,
            piece_6 BIGINT NOT NULL,
            piece_7 BIGINT NOT NULL
        )""",
        "CREATE INDEX figures_by_kin ON figures (kin, hash)",
        *(f"CREATE INDEX figures_by_piece_{number} ON figures (piece_{number})" for number in range(8)),
        "CREATE TABLE quarantine (seq BIGINT PRIMARY KEY REFERENCES adapters (seq) ON DELETE CASCADE)",
    ),
    (
        "CREATE INDEX blobs_by_size ON blobs (size_bytes, hash)",
        store_labels,
    ),
    (
        "ALTER TABLE state ADD COLUMN num_compositions BIGINT NOT NULL DEFAULT 0",
        """CREATE TABLE compositions (
            name TEXT COLLATE "C" PRIMARY KEY,
            hash TEXT NOT NULL,
            record TEXT NOT NULL,
            sha256 TEXT NOT NULL
        )""",
    ),
)


def schema_version(connection: Any, address: PostgresAddress) -> int:
    """Return the number of migration steps applied, 0 for none. Raises HubCorrupt for a catalogue damaged or too new."""
    table = connection.execute("SELECT to_regclass(%s)", (f"{address.schema}.state",)).fetchone()
    if table == (None,):
        return 0
    row = connection.execute("SELECT schema_version FROM state").fetchone()
    if row is None:
        raise HubCorrupt(f"the catalogue {address.where} is damaged: its state row is missing; restore it from a dump")
    if row[0] > len(STEPS):
        raise HubCorrupt(
            f"the catalogue {address.where} has schema {row[0]}, but this version of loraweave knows schemas up to "
            f"{len(STEPS)}; install the newer loraweave that wrote it"
        )
    return int(row[0])


def migrate(connection: Any, address: PostgresAddress) -> None:
    """Run the missing steps in one transaction, after a copy of the tables to a schema `<schema>_v<old>_backup`.

    The caller holds the write lock. A step that fails leaves the catalogue as it was.
    """
    version = schema_version(connection, address)
    if version == len(STEPS):
        return
    with connection.transaction():
        if version == 0:
            _create_schema(connection, address)
        else:
            _back_up(connection, address.schema, f"{address.schema}_v{version}_backup")
        for step in STEPS[version:]:
            run_step(Translating(connection), step)
        connection.execute("UPDATE state SET schema_version = %s", (len(STEPS),))


def _create_schema(connection: Any, address: PostgresAddress) -> None:
    (encoding,) = connection.execute("SELECT current_setting('server_encoding')").fetchone()
    if encoding != "UTF8":
        raise HubError(
            f"the database {address.where} stores text as {encoding}, which cannot hold every name; "
            "create one with ENCODING 'UTF8'"
        )
    (available,) = connection.execute("SELECT count(*) FROM pg_available_extensions WHERE name = 'vector'").fetchone()
    if not available:
        raise HubError(
            f"the server of {address.where} does not have the extension pgvector, which searches need; install it there "
            "(Debian: postgresql-17-pgvector)"
        )
    connection.execute(f"CREATE SCHEMA IF NOT EXISTS {address.schema}")
    _create_extension(connection, address)
    set_search_path(connection, address)


def _create_extension(connection: Any, address: PostgresAddress) -> None:
    user, database = connection.execute("SELECT current_user, current_database()").fetchone()
    try:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector WITH SCHEMA public")
    except require_psycopg().errors.InsufficientPrivilege as error:
        raise HubReadOnly(
            f"creating the hub: {address.where} does not have the extension pgvector yet, and the user {user!r} may not "
            "create it: where it is not marked as trusted, as in Debian's package, only a superuser may. Let one run "
            f"CREATE EXTENSION vector in the database {database!r}, once, and open the hub again"
        ) from error


def set_search_path(connection: Any, address: PostgresAddress) -> None:
    """Set the session's search path to the hub's schema and that of pgvector, so that short names work."""
    statement = "SELECT nspname FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace WHERE extname = 'vector'"
    schemas = [schema for (schema,) in connection.execute(statement).fetchall()]
    path = ", ".join('"' + name.replace('"', '""') + '"' for name in (address.schema, *schemas))
    connection.execute("SELECT set_config('search_path', %s, false)", (path,))


def _back_up(connection: Any, schema: str, target: str) -> None:
    connection.execute(f"CREATE SCHEMA IF NOT EXISTS {target}")
    listed = "SELECT tablename FROM pg_tables WHERE schemaname = %s"
    for (table,) in connection.execute(listed, (schema,)).fetchall():
        connection.execute(f"DROP TABLE IF EXISTS {target}.{table}")
        connection.execute(f"CREATE TABLE {target}.{table} AS TABLE {schema}.{table}")
