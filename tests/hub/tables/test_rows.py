"""What a row of the catalogue may hold."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tiny_hubs import adapter

from loraweave.errors import AdapterUnsupported
from loraweave.hub.hub import Hub
from loraweave.hub.tables import rows
from loraweave.types import Anomaly, Fingerprint, Source


def test_texts_that_searches_read_do_not_count_towards_the_limit_of_a_card(tmp_path, monkeypatch):
    with Hub(tmp_path / "hub") as hub:
        record = hub.add(adapter(1, card={"notes": "x" * 100}), description="long " * 50, tags=("tag",), language="de")
    size = len(rows.encode(replace(record, description="", examples=(), tags=(), language=())))
    monkeypatch.setattr(rows, "MAX_CARD_BYTES", size)
    assert rows.encode_within_limit(record) == rows.encode(record)
    monkeypatch.setattr(rows, "MAX_CARD_BYTES", size - 1)
    with pytest.raises(AdapterUnsupported, match=f"has {size:,} bytes as JSON; the limit is {size - 1:,}"):
        rows.encode_within_limit(record)


def test_a_record_comes_back_from_its_row_with_all_its_fields(tmp_path):
    fingerprint = Fingerprint("shapes", (0.5, -1.25))
    with Hub(tmp_path / "hub") as hub:
        stored = hub.add(
            adapter(1, fingerprint=fingerprint, card={"seed": 3}),
            description="says hello",
            examples=("hello",),
            tags=("greeting",),
            license="MIT",
            language="de",
        )
        assert stored.fingerprint == fingerprint
        assert hub.record("adapter 1") == stored
    record = replace(
        stored,
        version=4,
        restored=2,
        base_revision="abc",
        quarantined=True,
        source=Source("org/x", "f00"),
        anomalies=(Anomaly("norm", "is large", 12.5),),
    )
    assert rows.record_from_json(json.loads(rows.encode(record)), record.size_bytes) == record
