"""What the catalogue says about an adapter that is added: from the adapter, from its card, and from what the caller gave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraweave.hub import licenses
from loraweave.hub.adapter import Adapter
from loraweave.hub.blobs import content_hash
from loraweave.hub.clock import now
from loraweave.hub.fields import MAX_LABEL_BYTES, OWN_FIELDS, checked_fields, checked_text
from loraweave.hub.intake.sample_pairs import card_with_outputs, split_pairs
from loraweave.hub.intake.sources import without_secrets
from loraweave.hub.stored_files import with_files
from loraweave.hub.tables import rows
from loraweave.types import Record, Source


def new_record(
    adapter: Adapter, name: str, given: Mapping[str, Any], base_model: str | None, source: str | Path | None
) -> Record:
    """The record of version 1 under that name. AdapterUnsupported for fields of a wrong type or above their limit."""
    inputs, outputs = split_pairs(name, given["examples"])
    fields = checked_fields(name, _fields_with_card(name, {**given, "examples": inputs}, adapter.card))
    card = card_with_outputs(adapter.card, adapter.card.get("examples") or None, fields.examples, outputs)
    card = with_files(card, adapter.files)
    revision = adapter.base.revision
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
        base_revision=revision if revision is not None and len(revision) <= MAX_LABEL_BYTES else None,
        source=_source(adapter.card, source),
        card=card,
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


def _source(card: Mapping[str, Any], given: str | Path | None) -> Source | None:
    """The repository and commit that the card has from reading it, else the place as the caller named it."""
    known = card.get("source")
    repository = known.get("repository") if isinstance(known, Mapping) else None
    if isinstance(known, Mapping) and isinstance(repository, str) and given in (None, repository):
        revision = known.get("revision")
        return Source(repository, revision if isinstance(revision, str) else None)
    return None if given is None else Source(without_secrets(given))
