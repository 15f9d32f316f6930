"""Looks an adapter over before it is stored, beside what the hub holds, and does with what is found as the policy says."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from loraweave.errors import AdapterSuspicious, HubError
from loraweave.hub.adapter import Adapter
from loraweave.hub.anomalies import MIN_COSINE, against_model, against_pool, checked_policy
from loraweave.hub.figures import Figures, figures_of
from loraweave.hub.similar import cosine
from loraweave.hub.stored_adapter import stored_adapter
from loraweave.hub.stores.protocols import BlobStore, CatalogueStore
from loraweave.hub.tables import rows
from loraweave.hub.tables.figure_rows import alike, reference
from loraweave.types import Anomaly, Record

# whose cosine is computed from the stored factors; their sketches are the nearest
_MAX_COMPARED = 3

_logger = logging.getLogger(__name__)


def examined(
    catalogue: CatalogueStore,
    blobs: BlobStore,
    adapter: Adapter,
    record: Record,
    policy: str | Mapping[str, str],
    model: nn.Module | None = None,
) -> tuple[Record, Figures | None]:
    """The record with what was found, in quarantine where the policy says so, and the figures to store with it.

    No figures for a policy that is "off" for every kind, and for content that is stored under the name already. Raises
    AdapterSuspicious where the policy refuses what was found, AdapterUnsupported for an unknown policy.
    """
    chosen = checked_policy(policy)
    with catalogue.reading() as connection:
        existing = rows.find(connection, record.name)
    if set(chosen.values()) == {"off"} or (existing is not None and existing.record.hash == record.hash):
        return record, None
    figures = figures_of(adapter, record.base_model)
    with catalogue.reading() as connection:
        found = against_pool(figures, reference(connection, figures, record.hash))
        near = [row for name in alike(connection, figures, record.name) if (row := rows.find(connection, name))]
    found += _duplicates(blobs, adapter, record, near)
    found += against_model(adapter, model) if model is not None else []
    found = [anomaly for anomaly in found if chosen[anomaly.kind] != "off"]
    refused = [anomaly for anomaly in found if chosen[anomaly.kind] == "refuse"]
    if refused:
        raise AdapterSuspicious(
            f"adding adapter {record.name!r}: {'; '.join(f'{each.kind}: {each.detail}' for each in refused)}; if it is what "
            'you want, add it with anomalies="report" or "quarantine"'
        )
    for anomaly in found:
        _logger.info("adapter %r: %s: %s", record.name, anomaly.kind, anomaly.detail)
    quarantined = any(chosen[anomaly.kind] == "quarantine" for anomaly in found)
    return replace(record, anomalies=tuple(found), quarantined=quarantined), figures


def _duplicates(blobs: BlobStore, adapter: Adapter, record: Record, near: list[rows.Row]) -> list[Anomaly]:
    """The most similar of the adapters with like sketches, if its updates have nearly the same direction."""
    for row in near:
        if row.record.hash == record.hash:
            return [Anomaly("duplicate", f"it has the content of {row.record.name!r}", 1.0)]
    best = 0.0, ""
    for row in near[:_MAX_COMPARED]:
        try:
            score, _ = cosine(adapter, stored_adapter(blobs, row))
        except HubError as error:
            # a damaged adapter hinders nobody from adding another; verify tells of it
            _logger.info("not compared with %r: %s", row.record.name, error)
            continue
        best = max(best, (score, row.record.name))
    if best[0] < MIN_COSINE:
        return []
    return [Anomaly("duplicate", f"its updates have a cosine of {best[0]:.4f} with those of {best[1]!r}", round(best[0], 4))]
