"""What filters ask for, in a table of its own: a filter over a million adapters reads the rows that it lets through."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator

from loraweave.hub.fields import one_or_many
from loraweave.hub.stores.protocols import Connection
from loraweave.types import Record

# ten digits; an adapter's is far below
_LARGEST_RANK = 10**10 - 1


def put(connection: Connection, seq: int, record: Record) -> None:
    """Stores the labels of a row, in place of those it had; a row that is deleted takes its labels along."""
    connection.execute("DELETE FROM labels WHERE seq = ?", (seq,))
    for kind, value in sorted(labels(record)):
        connection.execute("INSERT INTO labels (kind, value, seq) VALUES (?, ?, ?)", (kind, value, seq))


def stored(connection: Connection, seq: int) -> set[tuple[str, str]]:
    """The labels of a row as (kind, value)."""
    return set(connection.execute("SELECT kind, value FROM labels WHERE seq = ?", (seq,)).fetchall())


def labels(record: Record) -> set[tuple[str, str]]:
    """What `put` stores for a record: tags, license, languages, rank, a digest of all that is known of its base model."""
    found = {("base", base_digest(record)), ("rank", rank_label(record.rank))}
    found |= {("tag", storable(tag)) for tag in record.tags}
    found |= {("language", language) for language in languages(record.language)}
    return found if record.license is None else found | {("license", storable(record.license))}


def values(connection: Connection, kind: str) -> Iterator[str]:
    """The different values of a kind, each found by one step in the table's order."""
    following = "SELECT min(value) FROM labels WHERE kind = ? AND value > ?"
    (value,) = connection.execute("SELECT min(value) FROM labels WHERE kind = ?", (kind,)).fetchone()
    while value is not None:
        yield value
        (value,) = connection.execute(following, (kind, value)).fetchone()


def seqs(connection: Connection, kind: str, value: str) -> list[int]:
    """The rows that carry a label, in order of addition."""
    found = connection.execute("SELECT seq FROM labels WHERE kind = ? AND value = ? ORDER BY seq", (kind, value)).fetchall()
    return [seq for (seq,) in found]


def seqs_up_to(connection: Connection, kind: str, value: str) -> list[int]:
    """The rows that carry a label of the kind which is not behind that value."""
    found = connection.execute("SELECT seq FROM labels WHERE kind = ? AND value <= ?", (kind, value)).fetchall()
    return [seq for (seq,) in found]


def first(connection: Connection, kind: str, value: str) -> int:
    """The first row that carries a label, which one does."""
    return int(connection.execute("SELECT min(seq) FROM labels WHERE kind = ? AND value = ?", (kind, value)).fetchone()[0])


def base_digest(record: Record) -> str:
    fingerprint = None if record.fingerprint is None else record.fingerprint.to_json()
    settled = json.dumps([record.base_model, record.base_revision, fingerprint], sort_keys=True)
    return hashlib.sha256(settled.encode()).hexdigest()[:32]


def languages(given: Collection[str] | str) -> set[str]:
    """Languages as they are compared: without case."""
    return {storable(language.casefold()) for language in one_or_many(given)}


def rank_label(rank: int) -> str:
    """A rank of 0 or more as text whose order is that of the number."""
    return f"{min(rank, _LARGEST_RANK):010d}"


def storable(text: str) -> str:
    # a lone surrogate has no UTF-8, which databases store text in, and PostgreSQL's text has no NUL
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
