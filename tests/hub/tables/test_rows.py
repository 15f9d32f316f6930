"""What a row of the catalogue may hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_hubs import adapter

from loraweave.errors import AdapterUnsupported
from loraweave.hub.hub import Hub
from loraweave.hub.tables import rows


def test_texts_that_searches_read_do_not_count_towards_the_limit_of_a_card(tmp_path, monkeypatch):
    with Hub(tmp_path / "hub") as hub:
        record = hub.add(adapter(1, card={"notes": "x" * 100}), description="long " * 50, tags=("tag",), language="de")
    size = len(rows.encode(replace(record, description="", examples=(), tags=(), language=())))
    monkeypatch.setattr(rows, "MAX_CARD_BYTES", size)
    assert rows.encode_within_limit(record) == rows.encode(record)
    monkeypatch.setattr(rows, "MAX_CARD_BYTES", size - 1)
    with pytest.raises(AdapterUnsupported, match=f"has {size:,} bytes as JSON; the limit is {size - 1:,}"):
        rows.encode_within_limit(record)
