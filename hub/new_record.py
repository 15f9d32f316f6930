"""What the catalogue says about an adapter that is added: from the adapter, from its card, and from what the caller gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraweave.hub import licenses, rows
from loraweave.hub.adapter import Adapter
from loraweave.hub.blobs import content_hash
from loraweave.hub.clock import now
from loraweave.hub.fields import MAX_LABEL_BYTES, OWN_FIELDS, checked_fields, checked_text
from loraweave.types import Record


def new_record(adapter: Adapter, name: str, given: Mapping[str, Any], base_model: str | None) -> Record:
    """The record of version 1 under that name. AdapterUnsupported for fields of a wrong type or above their limit."""
    fields = checked_fields(name, _fields_with_card(name, given, adapter.card))
    record = Record(
        name=name,
        hash=content_hash(adapter.layers, adapter.heads),
        base_model=checked_text(name, "base_model", base_model or adapter.base_model, MAX_LABEL_BYTES),
        rank=adapter.rank,
        target_modules=tuple(sorted({layer.rsplit(".", 1)[-1] for layer in adapter.layers})),
        license=fields.license,
        tags=fields.tags,
        description=fields.description,
        size_bytes=0,
        created=now(),
        examples=fields.examples,
        language=fields.language,
        fingerprint=adapter.fingerprint,
        card=adapter.card,
    )
    rows.encode_within_limit(record)
    return record


def _fields_with_card(name: str, given: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    """The fields given; the card's value where none was."""
    fields = {key: given[key] or card.get(key) or given[key] for key in OWN_FIELDS}
    if isinstance(given["license"], str) and given["license"]:
        fields["license"] = licenses.canonical(given["license"])
    elif isinstance(fields["license"], str):
        fields["license"] = licenses.of_card(fields["license"], f"adapter {name!r}")
    return fields
