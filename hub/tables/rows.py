"""Rows of the catalogue and their contents: canonical JSON that carries its own sha256.

An adapter in quarantine stays stored and its name taken, but nothing finds or reads it until it is released. Its record has
the flag; the table `quarantine` repeats it, so that counting need not read every record.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from typing import Any, NamedTuple

from loraweave.common.checks import one_or_many
from loraweave.common.names import text_digest
from loraweave.errors import AdapterQuarantined, AdapterUnsupported, HubCorrupt
from loraweave.hub.stores.protocols import Connection
from loraweave.hub.tables.fields import MAX_CARD_BYTES, OWN_FIELDS, Fields
from loraweave.types import Anomaly, Fingerprint, Record, Source

_COLUMNS = "adapters.seq, adapters.name, adapters.hash, adapters.record, adapters.sha256"
BLOB_COLUMNS = "blobs.hash, blobs.file_sha256, blobs.size_bytes, blobs.sha256"
_DECODER = json.JSONDecoder()
_SELECT = f"SELECT {_COLUMNS}, {BLOB_COLUMNS} FROM adapters LEFT JOIN blobs ON blobs.hash = adapters.hash"

# fields of a record that are stored as they are
_PLAIN = ("name", "hash", "base_model", "rank", "created", "version", "restored", "base_revision", "quarantined")
_UNKNOWN_TO_SCHEMA_1: dict[str, Any] = {
    "language": (),
    "version": 1,
    "restored": None,
    "base_revision": None,
    "quarantined": False,
    "source": None,
    "anomalies": (),
}

# databases limit the number of parameters of a statement
MOST_PARAMETERS = 500

# comparing a name with this many others takes a tenth of a second
_MOST_NAMES = 10_000
_NUM_ALIKE = 3


@dataclass(frozen=True)
class BlobRow:
    """A stored file: the content hash that names it, the sha256 of its bytes, and their number."""

    hash: str
    file_sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Row:
    """An adapter's number in the order of addition, its record and its blob."""

    seq: int
    record: Record
    blob: BlobRow


class Said(NamedTuple):
    """The texts of an adapter that its search keys are made from."""

    name: str
    description: str
    examples: tuple[str, ...]


def find(connection: Connection, name: str) -> Row | None:
    """Return the row with that name, or None. Raises HubCorrupt if it is damaged."""
    row = connection.execute(f"{_SELECT} WHERE adapters.name = ?", (name,)).fetchone()
    return None if row is None else _decode(row)


def every(connection: Connection) -> Iterator[Row]:
    """Yield all rows in order of addition. Raises HubCorrupt at the first that is damaged."""
    for row in connection.execute(f"{_SELECT} ORDER BY adapters.seq").fetchall():
        yield _decode(row)


def stored_rows(connection: Connection, seqs: Sequence[int]) -> Iterator[Row]:
    """Return the rows of these numbers that exist, in order of addition. Raises HubCorrupt at the first damaged one."""
    return map(_decode, at_seqs(connection, f"{_SELECT} WHERE adapters.seq", seqs))


def said(connection: Connection, seqs: Sequence[int]) -> dict[int, Said]:
    """Map the seq of each of these adapters to its texts; absent and quarantined adapters are left out.

    Takes a fifth of the time of reading whole records. Raises HubCorrupt at the first row that is damaged.
    """
    texts = {}
    for row in at_seqs(connection, f"SELECT {_COLUMNS} FROM adapters WHERE adapters.seq", seqs):
        data = _decode_json(*row)
        if not data.get("quarantined"):
            texts[row[0]] = Said(data["name"], data["description"], tuple(data["examples"]))
    return texts


def at_seqs(
    connection: Connection, select: str, seqs: Sequence[int], given: tuple[Any, ...] = ()
) -> Iterator[tuple[Any, ...]]:
    """Yield rows by ascending seq. `select` begins "SELECT seq" and ends "WHERE .. seq"; `given` are its parameters."""
    ordered = sorted(seqs)
    for start in range(0, len(ordered), MOST_PARAMETERS):
        part = ordered[start : start + MOST_PARAMETERS]
        if part[-1] - part[0] < 2 * len(part):
            # one range for neighbours takes a third of the time of looking up each
            rows = connection.execute(f"{select} BETWEEN ? AND ? ORDER BY 1", (*given, part[0], part[-1])).fetchall()
            if len(part) <= part[-1] - part[0]:
                wanted = set(part)
                rows = [row for row in rows if row[0] in wanted]
            yield from rows
        else:
            marks = ", ".join("?" * len(part))
            yield from connection.execute(f"{select} IN ({marks}) ORDER BY 1", (*given, *part)).fetchall()


def at(connection: Connection, seq: int) -> Row | None:
    """Return the row with that number, or None. Raises HubCorrupt if it is damaged."""
    return next(stored_rows(connection, [seq]), None)


def names_like(connection: Connection, name: str) -> list[str]:
    """Return the stored names that a misspelt `name` may mean: all, or above 10,000 those with its first three letters."""
    first = connection.execute("SELECT name FROM adapters ORDER BY seq LIMIT ?", (_MOST_NAMES + 1,)).fetchall()
    if len(first) > _MOST_NAMES:
        begin = name[:_NUM_ALIKE]
        between = "SELECT name FROM adapters WHERE name >= ? AND name < ? ORDER BY name LIMIT ?"
        first = connection.execute(between, (begin, begin + chr(0x10FFFF), _MOST_NAMES)).fetchall()
    return [stored_name for (stored_name,) in first]


def find_blob(connection: Connection, content_hash: str) -> BlobRow | None:
    row = connection.execute(f"SELECT {BLOB_COLUMNS} FROM blobs WHERE hash = ?", (content_hash,)).fetchone()
    return None if row is None else _decode_blob(row)


def insert(connection: Connection, record: Record) -> Record:
    """Add a row for an adapter whose blob has a row already, and return its record as a reader will see it.

    The row is read back before the commit: an error after the commit would tell the caller that nothing had changed.
    """
    text = encode(record)
    connection.execute(
        "INSERT INTO adapters (name, hash, record, sha256) VALUES (?, ?, ?, ?)",
        (record.name, record.hash, text, text_digest(text)),
    )
    connection.execute("UPDATE state SET num_adapters = num_adapters + 1")
    if record.quarantined:
        _mark_quarantine(connection, record)
    return _note_change(connection, record.name)


def change(connection: Connection, row: Row, record: Record) -> Record:
    """Replace the record of a row; the new blob has a row already. Return the record as a reader will see it."""
    if record == row.record:
        return row.record
    text = encode(record)
    connection.execute(
        "UPDATE adapters SET name = ?, hash = ?, record = ?, sha256 = ? WHERE seq = ?",
        (record.name, record.hash, text, text_digest(text), row.seq),
    )
    if record.quarantined != row.record.quarantined:
        _mark_quarantine(connection, record)
    return _note_change(connection, record.name)


def delete(connection: Connection, row: Row) -> None:
    """Remove the row and, through foreign keys, its vectors and labels; the blob stays for gc."""
    connection.execute("DELETE FROM adapters WHERE seq = ?", (row.seq,))
    connection.execute("UPDATE state SET num_adapters = num_adapters - 1")
    note(connection, row.seq)


def put_blob(connection: Connection, blob: BlobRow) -> None:
    connection.execute(
        "INSERT INTO blobs (hash, file_sha256, size_bytes, sha256) VALUES (?, ?, ?, ?) ON CONFLICT (hash) DO UPDATE SET "
        "file_sha256 = excluded.file_sha256, size_bytes = excluded.size_bytes, sha256 = excluded.sha256",
        (blob.hash, blob.file_sha256, blob.size_bytes, _blob_sha256(blob)),
    )


def encode(record: Record) -> str:
    """Return the record as canonical JSON in ASCII, which SQLite stores whatever characters a text has.

    The size is left out, since it is that of the blob. Raises AdapterUnsupported if the card is not JSON.
    """
    data = {field: getattr(record, field) for field in (*_PLAIN, *OWN_FIELDS, "target_modules")} | {
        "source": None if record.source is None else [record.source.location, record.source.revision],
        "fingerprint": None if record.fingerprint is None else record.fingerprint.to_json(),
        "anomalies": [[anomaly.kind, anomaly.detail, anomaly.score] for anomaly in record.anomalies],
        # the card has the fields above, too; stored once, they cannot disagree
        "card": {key: value for key, value in record.card.items() if key not in OWN_FIELDS},
    }
    try:
        return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterUnsupported(
            f"the card of adapter {record.name!r} cannot be stored as JSON ({error}); a card holds texts, finite numbers, "
            "booleans, None, lists, and mappings whose keys are texts"
        ) from error


def encode_within_limit(record: Record) -> str:
    """Return `encode(record)`. Raises AdapterUnsupported if it is too long even without the texts, which have limits."""
    text = encode(record)
    if len(text) <= MAX_CARD_BYTES:
        return text
    size_bytes = len(encode(replace(record, description="", examples=(), tags=(), language=())))
    if size_bytes > MAX_CARD_BYTES:
        raise AdapterUnsupported(
            f"the card of adapter {record.name!r} has {size_bytes:,} bytes as JSON; the limit is {MAX_CARD_BYTES:,}"
        )
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _note_change(connection: Connection, name: str) -> Record:
    row = find(connection, name)
    if row is None:
        raise HubCorrupt(f"the catalogue is damaged: the row of adapter {name!r}, just written, cannot be found")
    note(connection, row.seq)
    put_labels(connection, row.seq, row.record)
    return row.record


def decode_version(found: tuple[Any, ...], version: int) -> Row:
    """Decode a row of the table `versions`, which has no column for the name. Raises HubCorrupt if it is damaged."""
    row = _decode(found)
    if row.record.version != version:
        raise HubCorrupt(
            f"row {row.seq} of the catalogue is damaged: its version {version} has the record of {row.record.version}"
        )
    return row


def _decode(found: tuple[Any, ...]) -> Row:
    data = _decode_json(*found[:5])
    if found[5] is None:
        raise HubCorrupt(
            f"the catalogue is damaged: adapter {data['name']!r} has the hash {data['hash']}, which no blob row describes"
        )
    blob = _decode_blob(found[5:])
    return Row(found[0], record_from_json(data, blob.size_bytes), blob)


def _decode_json(seq: int, name: str | None, content_hash: str | None, text: Any, digest: str) -> dict[str, Any]:
    if not isinstance(text, str):
        # a damaged page can change even the type of a strict column
        raise HubCorrupt(f"row {seq} of the catalogue is damaged: its record is {type(text).__name__}, not text")
    if text_digest(text) != digest:
        raise HubCorrupt(
            f"row {seq} of the catalogue (adapter {name!r}) is damaged: its sha256 is {text_digest(text)}, not {digest}; "
            "Hub.verify() lists what can still be read"
        )
    data: dict[str, Any]
    # unlike `loads`, this does not look for surrounding space, which `encode` does not write
    data, _ = _DECODER.raw_decode(text)
    for column, value in (("name", name), ("hash", content_hash)):
        if value is not None and data[column] != value:
            raise HubCorrupt(
                f"row {seq} of the catalogue is damaged: column {column} is {value!r}, its record {data[column]!r}"
            )
    return data


def record_from_json(data: Mapping[str, Any], size_bytes: int = 0) -> Record:
    """Return the record of the JSON that `encode` wrote; `size_bytes`, which the JSON lacks, is the blob's."""
    data = {**_UNKNOWN_TO_SCHEMA_1, **data}
    source, fingerprint = data["source"], data["fingerprint"]
    lists = {key: tuple(data[key]) for key in ("examples", "tags", "language")}
    fields = Fields(description=data["description"], license=data["license"], **lists)
    # a card has lists, and no field that is empty
    card_fields = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(fields).items() if value}
    return Record(
        **{field: data[field] for field in _PLAIN},
        **vars(fields),
        target_modules=tuple(data["target_modules"]),
        size_bytes=size_bytes,
        source=None if source is None else Source(*source),
        fingerprint=None if fingerprint is None else Fingerprint.from_json(fingerprint),
        anomalies=tuple(starmap(Anomaly, data["anomalies"])),
        card={**data["card"], **card_fields},
    )


def _decode_blob(found: tuple[Any, ...]) -> BlobRow:
    blob = BlobRow(*found[:3])
    if _blob_sha256(blob) != found[3]:
        raise HubCorrupt(
            f"the row of blob {blob.hash} is damaged: its sha256 is {_blob_sha256(blob)}, not the stored {found[3]}; "
            "adding the adapter under another name repairs it"
        )
    return blob


def _blob_sha256(blob: BlobRow) -> str:
    return text_digest(f"{blob.hash} {blob.file_sha256} {blob.size_bytes}")


# ten digits; the rank of an adapter is far below
_LARGEST_RANK = 10**10 - 1


def put_labels(connection: Connection, seq: int, record: Record) -> None:
    """Store the labels of a row in place of its former ones. Deleting the row deletes them."""
    connection.execute("DELETE FROM labels WHERE seq = ?", (seq,))
    for kind, value in sorted(labels(record)):
        connection.execute("INSERT INTO labels (kind, value, seq) VALUES (?, ?, ?)", (kind, value, seq))


def labels(record: Record) -> set[tuple[str, str]]:
    """Return a record's labels as (kind, value): tags, license, languages, rank, and the digest of its base's key."""
    pairs = {("base", base_digest(record)), ("rank", rank_label(record.rank))}
    pairs |= {("tag", storable(tag)) for tag in record.tags}
    pairs |= {("language", language) for language in languages(record.language)}
    return pairs if record.license is None else pairs | {("license", storable(record.license))}


def label_values(connection: Connection, kind: str) -> Iterator[str]:
    """Yield the different values of a kind of label in order, each found by one step in the index."""
    following = "SELECT min(value) FROM labels WHERE kind = ? AND value > ?"
    (value,) = connection.execute("SELECT min(value) FROM labels WHERE kind = ?", (kind,)).fetchone()
    while value is not None:
        yield value
        (value,) = connection.execute(following, (kind, value)).fetchone()


def labelled(connection: Connection, kind: str, *wanted: str) -> set[int]:
    """Return the seqs of the adapters that have a label of this kind with one of the values `wanted`."""
    statement = "SELECT seq FROM labels WHERE kind = ? AND value = ?"
    return {seq for value in wanted for (seq,) in connection.execute(statement, (kind, value)).fetchall()}


def first_labelled(connection: Connection, kind: str, value: str) -> int:
    """Return the seq of the first adapter that has the label; at least one must have it."""
    return int(connection.execute("SELECT min(seq) FROM labels WHERE kind = ? AND value = ?", (kind, value)).fetchone()[0])


def base_digest(record: Record) -> str:
    fingerprint = None if record.fingerprint is None else record.fingerprint.to_json()
    settled = json.dumps([record.base_model, record.base_revision, fingerprint], sort_keys=True)
    return text_digest(settled)[:32]


def languages(given: Collection[str] | str) -> set[str]:
    """Return the languages in the form in which they are compared: without case."""
    return {storable(language.casefold()) for language in one_or_many(given)}


def rank_label(rank: int) -> str:
    """Return a rank of 0 or more as text that sorts as the number does."""
    return f"{min(rank, _LARGEST_RANK):010d}"


def storable(text: str) -> str:
    # a lone surrogate has no UTF-8, which databases store text in, and PostgreSQL's text has no NUL
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def note(connection: Connection, seq: int) -> None:
    """Record that the current transaction adds, changes or deletes the row."""
    connection.execute(
        "INSERT INTO changes (seq, generation) SELECT ?, generation + 1 FROM state WHERE true "
        "ON CONFLICT (seq) DO UPDATE SET generation = excluded.generation",
        (seq,),
    )


def _mark_quarantine(connection: Connection, record: Record) -> None:
    """Copy the quarantine flag of the record, which has a row already, to the table `quarantine`."""
    chosen = "(SELECT seq FROM adapters WHERE name = ?)"
    connection.execute(f"DELETE FROM quarantine WHERE seq = {chosen}", (record.name,))
    if record.quarantined:
        connection.execute("INSERT INTO quarantine (seq) SELECT seq FROM adapters WHERE name = ?", (record.name,))


def num_quarantined(connection: Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM quarantine").fetchone()[0])


def quarantined_seqs(connection: Connection) -> list[int]:
    """Return the numbers of the adapters in quarantine, in the order of addition."""
    return [seq for (seq,) in connection.execute("SELECT seq FROM quarantine ORDER BY seq").fetchall()]


def in_quarantine(record: Record) -> AdapterQuarantined:
    """Return the error that an adapter is in quarantine, with the record's anomalies."""
    reasons = "; ".join(anomaly.detail for anomaly in record.anomalies) or "it was put there by hand"
    return AdapterQuarantined(
        f"adapter {record.name!r} is in quarantine: {reasons}; look at it with hub.get({record.name!r}, "
        f"quarantined=True), and hub.release({record.name!r}) if it is sound"
    )


def quarantine_problems(connection: Connection, seqs: Iterable[tuple[int, bool]]) -> Iterator[str]:
    """Yield a sentence for each (seq, True if the record says quarantined) that the table `quarantine` contradicts."""
    marked = set(quarantined_seqs(connection))
    for seq, quarantined in seqs:
        if quarantined != (seq in marked):
            yield f"row {seq} {'is' if quarantined else 'is not'} in quarantine, and the table of those says the opposite"
