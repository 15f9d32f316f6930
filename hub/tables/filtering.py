"""The adapters that pass filters, found by indexed look-ups: if few pass, few rows are read.

The table `bases` has the known fingerprints of each base model's id, only to warn: damage of it changes no search.
"""

import json
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from loraweave.common.checks import one_or_many
from loraweave.hub.licenses import is_accepted
from loraweave.hub.stores.protocols import Connection
from loraweave.hub.tables import rows
from loraweave.hub.tables.rows import storable
from loraweave.types import BaseKey, Fingerprint, Record

# the largest integer of a database
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Filters:
    """The conditions that an adapter must meet; None sets no condition. Languages are compared without case.

    It needs this base model, one of the licenses, all tags, one of the languages, and at most this rank and size in bytes.
    """

    base_model: str | BaseKey | None = None
    license: Collection[str] | str | None = None
    tags: Collection[str] | str = ()
    language: Collection[str] | str | None = None
    max_rank: int | None = None
    max_size_bytes: int | None = None

    @property
    def key(self) -> BaseKey | None:
        """The base model if it is the key of a loaded model, else None."""
        return self.base_model if isinstance(self.base_model, BaseKey) else None

    @property
    def pass_all(self) -> bool:
        criteria = (self.base_model, self.license, self.language, self.max_rank, self.max_size_bytes)
        return not self.tags and criteria == (None,) * len(criteria)

    def passes(self, record: Record) -> bool:
        """Return True if the record meets all conditions; `matching` selects the same adapters by look-ups."""
        fits = self.base_model in (None, record.base_model) if self.key is None else not self.key.differs(record.base)
        return (
            fits
            and (self.license is None or is_accepted(record.license, self.license))
            and set(one_or_many(self.tags)).issubset(record.tags)
            and (self.language is None or not rows.languages(self.language).isdisjoint(rows.languages(record.language)))
            and (self.max_rank is None or record.rank <= self.max_rank)
            and (self.max_size_bytes is None or record.size_bytes <= self.max_size_bytes)
        )


def matching(connection: Connection, filters: Filters) -> list[int]:
    """Return the seqs of the adapters that pass and are not in quarantine, in order of addition.

    Warns of adapters left out because only the id of their base fits. A filter by base reads one row of each base.
    """
    passing: list[set[int]] = []
    if filters.base_model is not None:
        passing.append(_for_base(connection, Filters(filters.base_model)))
    if filters.license is not None:
        permitted = [value for value in rows.label_values(connection, "license") if is_accepted(value, filters.license)]
        passing.append(rows.labelled(connection, "license", *permitted))
    passing += [rows.labelled(connection, "tag", storable(tag)) for tag in sorted(set(one_or_many(filters.tags)))]
    if filters.language is not None:
        passing.append(rows.labelled(connection, "language", *sorted(rows.languages(filters.language))))
    if filters.max_rank is not None:
        ranked = "SELECT seq FROM labels WHERE kind = 'rank' AND value <= ?"
        within = connection.execute(ranked, (rows.rank_label(filters.max_rank),)).fetchall()
        passing.append({seq for (seq,) in within})
    if filters.max_size_bytes is not None:
        # the size is that of the blob, which may be rewritten in another form
        statement = "SELECT adapters.seq FROM blobs JOIN adapters ON adapters.hash = blobs.hash WHERE blobs.size_bytes <= ?"
        sized = connection.execute(statement, (min(filters.max_size_bytes, _LARGEST),)).fetchall()
        passing.append({seq for (seq,) in sized})
    if not passing:
        passing.append({seq for (seq,) in connection.execute("SELECT seq FROM adapters").fetchall()})
    return sorted(set.intersection(*passing) - set(rows.quarantined_seqs(connection)))


def bases(connection: Connection) -> list[tuple[Record, int]]:
    """Return the first record of each different base model and the number of its adapters, without those in quarantine."""
    held = set(rows.quarantined_seqs(connection))
    listed = [rows.labelled(connection, "base", value) - held for value in rows.label_values(connection, "base")]
    counts = {min(seqs): len(seqs) for seqs in listed if seqs}
    return [(row.record, counts[row.seq]) for row in rows.stored_rows(connection, list(counts))]


def store_labels(connection: Connection) -> None:
    """Store the labels of all rows, for a catalogue without them; a damaged row, which verify reports, gets none."""
    for seq, text in connection.execute("SELECT seq, record FROM adapters").fetchall():
        try:
            record = rows.record_from_json(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        rows.put_labels(connection, seq, record)


def _for_base(connection: Connection, base: Filters) -> set[int]:
    """Return the seqs of the adapters that pass `base`, which are filters with only a base model.

    An id selects the adapters that name it; a key, those whose base does not contradict it. Warns of adapters that name the
    key's id but were made for another model.
    """
    firsts = [rows.first_labelled(connection, "base", value) for value in rows.label_values(connection, "base")]
    examples = [row.record for row in rows.stored_rows(connection, firsts)]
    fitting = {rows.base_digest(record) for record in examples if base.passes(record)}
    if (key := base.key) is not None:
        namesakes = {rows.base_digest(one) for one in examples if one.base_model == key.id} - fitting
        left_out = [
            row.record for row in rows.stored_rows(connection, sorted(rows.labelled(connection, "base", *namesakes)))
        ]
        if left_out:
            warnings.warn(
                f"{len(left_out)} adapters are left out, {left_out[0].name!r} the first: they name the base model "
                f"{key.id!r}, but were made for another ({key.differs(left_out[0].base)})",
                stacklevel=2,
            )
    return rows.labelled(connection, "base", *fitting)


_MAX_LISTED = 100


def contradiction(connection: Connection, record: Record) -> str:
    """Return a phrase on how the record's base differs from all models that this hub knows by its id; "" if it does not."""
    if record.fingerprint is None or not record.base_model:
        return ""
    known_bases = connection.execute(
        "SELECT fingerprint FROM bases WHERE base_model = ? ORDER BY fingerprint LIMIT ?",
        (storable(record.base_model), _MAX_LISTED),
    ).fetchall()
    reasons = [known.differs(record.fingerprint) for (text,) in known_bases if (known := _read(text)) is not None]
    # a hub that already has both models warned when the second one came
    return "" if "" in reasons else next(iter(reasons), "")


def remember(connection: Connection, record: Record) -> None:
    if record.fingerprint is not None and record.base_model:
        _insert(connection, *_entry(record.base_model, record.fingerprint))


def tidy(connection: Connection, records: Iterable[Record]) -> None:
    """Make the table `bases` hold exactly the base fingerprints of `records`, which are all records of the hub."""
    bases = {(record.base_model, record.fingerprint) for record in records}
    wanted = {_entry(base, fingerprint) for base, fingerprint in bases if fingerprint is not None and base}
    held = {(base, text) for base, text in connection.execute("SELECT base_model, fingerprint FROM bases").fetchall()}
    for entry in sorted(held - wanted):
        connection.execute("DELETE FROM bases WHERE base_model = ? AND fingerprint = ?", entry)
    for entry in sorted(wanted - held):
        _insert(connection, *entry)


def _entry(base_model: str, fingerprint: Fingerprint) -> tuple[str, str]:
    return storable(base_model), json.dumps(fingerprint.to_json(), sort_keys=True)


def _insert(connection: Connection, base_model: str, text: str) -> None:
    connection.execute(
        "INSERT INTO bases (base_model, fingerprint) VALUES (?, ?) ON CONFLICT (base_model, fingerprint) DO NOTHING",
        (base_model, text),
    )


def _read(text: str) -> Fingerprint | None:
    try:
        return Fingerprint.from_json(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
