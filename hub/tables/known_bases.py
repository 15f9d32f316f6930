"""The fingerprints that adapters of one base model's id came with, so that one id for two models is noticed on adding.

The table only helps to notice: the records have the fingerprints, and a damaged or missing entry changes no search.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from loraweave.hub.stores.protocols import Connection
from loraweave.hub.tables.labels import storable
from loraweave.types import Fingerprint, Record

_MAX_LISTED = 100


def contradiction(connection: Connection, record: Record) -> str:
    """Why the base model's id stands for another model in this hub already, as a phrase; empty when it does not."""
    if record.fingerprint is None or not record.base_model:
        return ""
    found = connection.execute(
        "SELECT fingerprint FROM bases WHERE base_model = ? ORDER BY fingerprint LIMIT ?",
        (storable(record.base_model), _MAX_LISTED),
    ).fetchall()
    reasons = [known.differs(record.fingerprint) for (text,) in found if (known := _read(text)) is not None]
    # a hub that holds adapters of both has said so when the second came
    return "" if "" in reasons else next(iter(reasons), "")


def remember(connection: Connection, record: Record) -> None:
    if record.fingerprint is not None and record.base_model:
        _insert(connection, *_entry(record.base_model, record.fingerprint))


def tidy(connection: Connection, records: Iterable[Record]) -> None:
    """Makes the table hold what these records, all that there are, came with, and nothing else."""
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
