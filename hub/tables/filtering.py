"""Which adapters pass a filter: for the base model, under one of the licenses, with all the tags."""

from __future__ import annotations

import json
from collections.abc import Collection

from loraweave.hub import quarantine
from loraweave.hub.base_filter import for_base
from loraweave.hub.fields import one_or_many
from loraweave.hub.licenses import accepted
from loraweave.hub.stores.protocols import Connection
from loraweave.hub.tables import labels, rows
from loraweave.types import BaseKey, Record


def passes(
    record: Record,
    *,
    base_model: str | BaseKey | None = None,
    license: Collection[str] | str | None = None,
    tags: Collection[str] | str = (),
) -> bool:
    """Whether `matching` gives the record's row."""
    if isinstance(base_model, BaseKey):
        fits = not base_model.differs(record.base)
    else:
        fits = base_model is None or record.base_model == base_model
    return fits and (license is None or accepted(record.license, license)) and set(one_or_many(tags)).issubset(record.tags)


def matching(
    connection: Connection,
    *,
    base_model: str | BaseKey | None = None,
    license: Collection[str] | str | None = None,
    tags: Collection[str] | str = (),
) -> list[int]:
    """The rows that pass and are not in quarantine, in order of addition; one is read for every different base model.

    Adapters that only have the base model's id are left out with a warning.
    """
    found: list[set[int]] = []
    if base_model is not None:
        found.append(_for_base(connection, base_model))
    if license is not None:
        permitted = [value for value in labels.values(connection, "license") if accepted(value, license)]
        found.append({seq for value in permitted for seq in labels.seqs(connection, "license", value)})
    found += [set(labels.seqs(connection, "tag", labels.storable(tag))) for tag in sorted(set(one_or_many(tags)))]
    if not found:
        found.append({seq for (seq,) in connection.execute("SELECT seq FROM adapters").fetchall()})
    return sorted(set.intersection(*found) - set(quarantine.seqs(connection)))


def fill(connection: Connection) -> None:
    """Stores the labels of all rows, for a catalogue that had none; a damaged row, which verify reports, gets none."""
    for seq, text in connection.execute("SELECT seq, record FROM adapters").fetchall():
        try:
            record = rows.record_from_json(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        labels.put(connection, seq, record)


def _for_base(connection: Connection, base_model: str | BaseKey) -> set[int]:
    digests = list(labels.values(connection, "base"))
    examples = [row.record for row in rows.some(connection, [labels.first(connection, "base", value) for value in digests])]
    fitting = {labels.base_digest(record) for record in examples if passes(record, base_model=base_model)}
    if isinstance(base_model, BaseKey):
        namesakes = {labels.base_digest(one) for one in examples if one.base_model == base_model.id} - fitting
        left_out = sorted(seq for value in namesakes for seq in labels.seqs(connection, "base", value))
        # it is this that warns
        for_base((row.record for row in rows.some(connection, left_out)), base_model)
    return {seq for value in fitting for seq in labels.seqs(connection, "base", value)}
